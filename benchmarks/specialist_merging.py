"""The merges of benchmarks/specialists.py: what is tried of each method, and a model by task after it."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jobs import Job
from specialist_tasks import base_model, descend, draw, loaded, model_file
from torch import Tensor, nn

import folklora
from folklora.adapters.composition import Composition
from folklora.merge import PerTask
from folklora.merge.twins import Twins

SCALES = [{"lambda_": value} for value in (0.2, 0.4, 0.6, 0.8, 1.0)]
# of a mean, where those above are of a sum
MEAN_SCALES = [{"lambda_": value} for value in (0.6, 1.0, 1.5, 2.0, 3.0)]
NEAR_ONE = [{"lambda_": value} for value in (0.6, 0.8, 1.0, 1.25, 1.5)]


def _each(scales: Sequence[dict[str, Any]], **more: Any) -> list[dict[str, Any]]:
    return [{**more, **scale} for scale in scales]


CONFIGURATIONS: dict[str, list[dict[str, Any]]] = {
    "average": [{}],
    "task-arithmetic": SCALES,
    "ties": _each(MEAN_SCALES, density=(0.2,)),
    "dare-linear": _each(SCALES, density=(0.2,)),
    "dare-ties": _each(SCALES, density=(0.2,)),
    "della": _each(MEAN_SCALES, density=(0.4,)),
    "della-linear": _each(SCALES, density=(0.4,)),
    "breadcrumbs": _each(SCALES, density=(0.85,)),
    "breadcrumbs-ties": _each(SCALES, density=(0.85,)),
    "consensus": SCALES,
    "model-stock": [{}, {"filter_wise": True}],
    "karcher": [{}],
    "ram": [{}],
    "sce": [{"select_topk": value} for value in (0.1, 0.3, 0.5, 0.7, 1.0)],
    "fisher": [{}],
    "regmean": [{"off_diagonal": value} for value in (0.7, 0.8, 0.9, 0.95, 1.0)],
    "tsv-m": NEAR_ONE,
    "r-tsvm": NEAR_ONE,
    "iso-c": NEAR_ONE,
    "wudi": NEAR_ONE,
    "wudi-closed-form": NEAR_ONE,
    "atlas": [{"learning_rate": value} for value in (0.01, 0.03, 0.1)],
    "twin-merging, routed": [{"rank": value} for value in (8, 32, 128)],
    "emr": [{}],
    "tall": [{"mu": (value,)} for value in (0.2, 0.3, 0.4, 0.5, 0.6)],
    "tsv-c": [{}],
    "twin-merging": [{"rank": value} for value in (8, 32, 128)],
}


def of_tensors(
    model: Any, base: dict[str, Tensor], specialists: list[dict[str, Tensor]], setting: dict[str, Any], job: Job,
    options: argparse.Namespace,
) -> Callable[[int], Any]:  # fmt: skip
    """The model by task, after a method that merges the tensors of one name."""
    merged = base if job["method"] == "base" else dict(results(base, specialists, setting, job, options))

    def served(task: int) -> Any:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                found = merged[name]
                parameter.copy_(found.for_task(task) if isinstance(found, PerTask) else found)
        return model

    return served


def results(
    base: Mapping[str, Tensor], specialists: list[dict[str, Tensor]], setting: dict[str, Any], job: Job,
    options: argparse.Namespace,
) -> Iterator[tuple[str, Any]]:  # fmt: skip
    """Name and merged tensor; where a method needs a statistic that a tensor has not, the mean."""
    merge = next(m.factory for m in folklora.methods("merge") if m.name == job["method"])
    kind = {"fisher": "fisher", "regmean": "covariance"}.get(job["method"])
    argument = {"fisher": "fisher", "regmean": "gram"}.get(job["method"])
    found = [
        folklora.Statistics.load(model_file(options, t, job["seed"], "statistics")) if kind else {}
        for t in options.tasks
    ]
    for name, value in base.items():
        tensors, more = [own[name] for own in specialists], dict(setting)
        layer = name.removesuffix(".weight")
        if kind and layer not in found[0]:
            yield name, folklora.merge.average(tensors)
            continue
        if kind:
            more[argument] = [one[layer][kind].to(value.device) for one in found]
        if job["method"].startswith(("dare", "della")):
            seeds = [f"{job['seed']}:{name}:{t}" for t in options.tasks]
            more["generator"] = [
                torch.Generator(value.device).manual_seed(random.Random(s).getrandbits(60)) for s in seeds
            ]
        yield name, merge(tensors, None if job["method"] in WITHOUT_BASE else value, **more)


WITHOUT_BASE = ("average", "karcher", "fisher", "regmean")


def of_atlas(
    model: Any, base: dict[str, Tensor], specialists: list[dict[str, Tensor]], setting: dict[str, Any], job: Job,
    options: argparse.Namespace,
) -> Callable[[int], Any]:  # fmt: skip
    """aTLAS: coefficients of the task vectors, one for each and each tensor, learnt from a few rows a task."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(base[name])
    composed = Composition(model, dict(zip(options.tasks, specialists, strict=True)), init=0.3)
    optimizer = torch.optim.AdamW([composed.coefficients], lr=setting["learning_rate"], weight_decay=0.0)
    rows = {name: loaded(name, options)[0].task.train[: options.few] for name in options.tasks}
    batches = {name: draw(own, min(8, options.few), f"{job['seed']}:{name}") for name, own in rows.items()}
    for _ in range(options.few_steps):
        for name in options.tasks:
            descend(composed, model, name, next(batches[name]), options)
        optimizer.step()
        optimizer.zero_grad()
    state = composed.merged_state()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state[name])
    return lambda task: model


def of_twins(
    model: Any, base: dict[str, Tensor], specialists: list[dict[str, Tensor]], setting: dict[str, Any], job: Job,
    options: argparse.Namespace,
) -> Callable[[int], Any]:  # fmt: skip
    """Twin-Merging as it is served: the shared model, and each row's mixture of what lies beyond by a router."""
    split = dict(results(base, specialists, setting, {**job, "method": "twin-merging"}, options))
    shared = base_model(options)
    with torch.no_grad():
        for name, parameter in shared.named_parameters():
            parameter.copy_(split[name].base)
    layers = [name for name, module in shared.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    beyond = {
        task: {layer: split[f"{layer}.weight"].factors(t) for layer in layers} for t, task in enumerate(options.tasks)
    }
    twins = Twins(shared, beyond)
    tokenizer = loaded(options.tasks[0], options)[1]
    twins.learn_router(tokenizer, {name: prompts(name, options) for name in options.tasks})
    return lambda task: twins.model


def prompts(name: str, options: argparse.Namespace) -> list[str]:
    """The held-out questions of a task."""
    task, tokenizer = loaded(name, options)
    if task.asked is not None:
        return [choice.prompt for choice in task.asked["validation"]]
    return [tokenizer.decode(row.prompt) for row in task.task.validation]


MAKERS: dict[str, Callable[..., Callable[[int], Any]]] = {"atlas": of_atlas, "twin-merging, routed": of_twins}
