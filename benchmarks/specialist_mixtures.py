"""The data mixtures of benchmarks/specialists.py: which rows a model of all tasks is trained on, and in what order."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from adapter_tasks import IGNORED, Row, batch_of
from jobs import Job
from safetensors.torch import load_file, save_file
from specialist_tasks import base_model, loaded, model_file, precision
from torch import Tensor
from torch.nn.functional import cross_entropy

from folklora.merge.mixtures import by_agreement, by_quota, by_reward

# the same choice among the rows of each task, so that none is lost
WITHIN = ", of each task"
NEED_REWARDS = tuple(f"mixture: {name}{where}" for where in ("", WITHIN) for name in ("reward", "agreement"))
MIXTURES = ("mixture: quota", *NEED_REWARDS)


def rows_of(job: Job, options: argparse.Namespace) -> dict[str, list[Row]]:
    """Training rows by task: of one, of all, or of all those that a mixture keeps."""
    tasks = [job["task"]] if job["task"] in options.tasks else options.tasks
    rows = {name: loaded(name, options)[0].task.train for name in tasks}
    if job["task"] not in MIXTURES:
        return rows
    axis = torch.cat([torch.full((len(rows[name]),), index) for index, name in enumerate(tasks)])
    kept = chosen(job["task"], axis, job["seed"], options)
    first = torch.tensor([0, *(len(rows[name]) for name in tasks)]).cumsum(0)
    places = {name: kept[axis[kept] == index] - first[index] for index, name in enumerate(tasks)}
    return {name: [rows[name][place] for place in places[name].tolist()] for name in tasks}


def chosen(mixture: str, axis: Tensor, seed: int, options: argparse.Namespace) -> Tensor:
    """Numbers of the rows that a mixture keeps, `--mixture-share` of all; axis [n] has each row's task."""
    generator = torch.Generator().manual_seed(seed)
    if mixture == "mixture: quota":
        quota = [int(options.mixture_share * size) for size in torch.bincount(axis).tolist()]
        return by_quota(axis, quota, generator=generator)
    rewards = load_file(model_file(options, "all", seed, "rewards"))["rewards"]
    parts = [(axis == index).nonzero().flatten() for index in range(len(options.tasks))]
    if not mixture.endswith(WITHIN):
        parts = [torch.arange(len(axis))]
    choose = best_rewarded if mixture.startswith("mixture: reward") else least_disputed
    return torch.cat([part[choose(rewards[part], options.mixture_share, generator)] for part in parts])


def best_rewarded(rewards: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """The rows with the largest sum of all tasks' rewards, each task's in units of its standard deviation."""
    weight = (1 / rewards.std(0).clamp_min(1e-6)).tolist()
    return by_reward(rewards, share, weight=weight)


def least_disputed(rewards: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Rows that the fewest tasks are against: a draw of those with at most as many as are needed."""
    count = int(share * len(rewards))
    for conflicts in range(rewards.shape[1] + 1):
        kept = by_agreement(rewards, conflicts)
        if len(kept) >= count:
            break
    return kept[by_quota(torch.zeros_like(kept), [count], generator=generator)]


def rewards_job(job: Job, options: argparse.Namespace) -> dict[str, Any]:
    """What each specialist thinks of each task's training rows; kept in a file, and its means in the record.

    A specialist's reward of a row is the mean over the answer's tokens of log p(token) less that of the base, as DPO's
    implicit reward has it: positive where the specialist finds the answer likelier than the base does. It stands for
    the reward models of the strategies' papers, which do not exist for these tasks.
    """
    model = base_model(options)
    base = likelihoods(model, options)
    columns = []
    for name in options.tasks:
        state = load_file(model_file(options, name, job["seed"]))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.copy_(state[key])
        columns.append(likelihoods(model, options) - base)
    rewards = torch.stack(columns, 1)
    save_file({"rewards": rewards}, model_file(options, "all", job["seed"], "rewards"))
    sizes = [len(loaded(name, options)[0].task.train) for name in options.tasks]
    parts = zip(options.tasks, rewards.split(sizes), strict=True)
    means = {name: dict(zip(options.tasks, part.mean(0).tolist(), strict=True)) for name, part in parts}
    return {"means": means, "score": float(rewards.mean())}


@torch.no_grad()
def likelihoods(model: Any, options: argparse.Namespace) -> Tensor:
    """Each training row's log-likelihood a token of its answer, [n] over all tasks."""
    model.eval()
    found = []
    for name in options.tasks:
        task, tokenizer = loaded(name, options)
        for start in range(0, len(task.task.train), options.eval_batch):
            rows = task.task.train[start : start + options.eval_batch]
            inputs = batch_of(rows, task.task, tokenizer.pad_token_id, model.device)
            labels = inputs.pop("labels")[:, 1:]
            with precision(model.device):
                logits = model(**inputs).logits[:, :-1]
            losses = cross_entropy(logits.float().mT, labels, ignore_index=IGNORED, reduction="none")
            found.append(-(losses.sum(1) / (labels != IGNORED).sum(1)).cpu())
    return torch.cat(found)


def turns(sizes: Mapping[str, int]) -> Iterator[str]:
    """Tasks, each as often as its share of the rows says and as evenly as can be; of equal ones, in turn."""
    names, total = list(sizes), sum(sizes.values())
    had = dict.fromkeys(names, 0)
    while True:
        step = sum(had.values()) + 1
        name = max(names, key=lambda n: (sizes[n] * step - had[n] * total, -names.index(n)))
        had[name] += 1
        yield name
