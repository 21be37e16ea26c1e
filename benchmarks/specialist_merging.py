"""The merges of benchmarks/specialists.py: what is tried of each method, and a model by task after it."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jobs import Job
from specialist_tasks import base_model, descend, draw, loaded, model_file
from torch import Tensor, nn

import folklora
from folklora.adapters.composition import Composition
from folklora.merge import PerTask
from folklora.merge.twins import Twins

Served = Callable[[int], Any]
"""The model that serves a task, given its number."""

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
    "tsv-m, equal norms": NEAR_ONE,
    "r-tsvm": NEAR_ONE,
    "r-tsvm, small scale": [{"lambda_": value} for value in (0.1, 0.2, 0.3, 0.4, 0.5)],
    "r-tsvm, rank alone": _each(NEAR_ONE, outlier_mode="off"),
    "r-tsvm, weights alone": _each(NEAR_ONE, rank_gamma=0.0),
    "r-tsvm, share": _each(NEAR_ONE, weight_measure="share"),
    "r-tsvm, by row": _each(NEAR_ONE, outlier_scope="row", weight_scope="row"),
    "r-tsvm, inverse": _each(NEAR_ONE, outlier_mode="inverse"),
    "r-tsvm, clip": _each(NEAR_ONE, outlier_mode="clip"),
    "r-tsvm, zero": _each(NEAR_ONE, outlier_mode="zero"),
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


# what these make of a specialist's every matrix takes long, and does not depend on λ: θ = θ_0 + λ D
SCALED = ("tsv-m", "r-tsvm")


@dataclass
class Parts:
    """What a job merges.

    Args:
        model: Takes the merged tensors.
        base: Its tensors before.
        specialists: Those of each task's.
        changes: D of a method of SCALED, once a setting has needed it.
    """

    model: Any
    base: dict[str, Tensor]
    specialists: list[dict[str, Tensor]]
    changes: dict[str, Tensor] = field(default_factory=dict)


def method_of(job: Job) -> str:
    """The method of a contender, which may name after a comma what is special about it."""
    return job["method"].partition(", ")[0]


def of_tensors(parts: Parts, setting: dict[str, Any], job: Job, options: argparse.Namespace) -> Served:
    """The model by task, after a method that merges the tensors of one name."""
    if job["method"] == "base":
        merged = parts.base
    elif method_of(job) in SCALED:
        merged = scaled(parts, setting, job, options)
    else:
        merged = dict(results(parts.base, parts.specialists, setting, job, options))

    def served(task: int) -> Any:
        with torch.no_grad():
            for name, parameter in parts.model.named_parameters():
                found = merged[name]
                parameter.copy_(found.for_task(task) if isinstance(found, PerTask) else found)
        return parts.model

    return served


def scaled(parts: Parts, setting: dict[str, Any], job: Job, options: argparse.Namespace) -> dict[str, Tensor]:
    """θ_0 + λ D by name, bit for bit what the method gives, with one D for all settings of the job."""
    if not parts.changes:
        zero = {name: torch.zeros_like(value) for name, value in parts.base.items()}
        vectors = [{name: own[name] - value for name, value in parts.base.items()} for own in parts.specialists]
        parts.changes.update(results(zero, vectors, {**setting, "lambda_": 1.0}, job, options))
    return {name: value + setting["lambda_"] * parts.changes[name] for name, value in parts.base.items()}


def results(
    base: Mapping[str, Tensor], specialists: list[dict[str, Tensor]], setting: dict[str, Any], job: Job,
    options: argparse.Namespace,
) -> Iterator[tuple[str, Any]]:  # fmt: skip
    """Name and merged tensor; where a method needs a statistic that a tensor has not, the mean."""
    method = method_of(job)
    merge = next(m.factory for m in folklora.methods("merge") if m.name == method)
    kind, argument = STATISTICS.get(method, (None, None))
    found = [
        folklora.Statistics.load(model_file(options, t, job["seed"], "statistics")) if kind else {}
        for t in options.tasks
    ]
    if kind and not any(f"{layer}.weight" in base for layer in found[0]):
        raise ValueError(f"the statistics for {method} are of none of the model's layers: {sorted(found[0])}")
    for name, value in base.items():
        tensors, more = [own[name] for own in specialists], dict(setting)
        layer = name.removesuffix(".weight")
        if kind and layer not in found[0]:
            yield name, folklora.merge.average(tensors)
            continue
        if kind:
            more[argument] = [one[layer][kind].to(value.device) for one in found]
        if method.startswith(("dare", "della")):
            seeds = [f"{job['seed']}:{name}:{t}" for t in options.tasks]
            more["generator"] = [
                torch.Generator(value.device).manual_seed(random.Random(s).getrandbits(60)) for s in seeds
            ]
        if job["method"] in PREPARED:
            tensors = PREPARED[job["method"]](tensors, value)
        yield name, merge(tensors, None if method in WITHOUT_BASE else value, **more)


def of_equal_norm(tensors: Sequence[Tensor], base: Tensor) -> list[Tensor]:
    """The specialists with task vectors of one Frobenius norm, their mean: a control of ours, no published method."""
    vectors = [tensor - base for tensor in tensors]
    norms = torch.stack([vector.norm() for vector in vectors])
    factors = torch.where(norms > 0, norms.mean() / norms, 0.0)
    return [base + factor * vector for factor, vector in zip(factors, vectors, strict=True)]


PREPARED = {"tsv-m, equal norms": of_equal_norm}
STATISTICS = {"fisher": ("fisher", "fisher"), "regmean": ("covariance", "gram")}
WITHOUT_BASE = ("average", "karcher", "fisher", "regmean")


def of_atlas(parts: Parts, setting: dict[str, Any], job: Job, options: argparse.Namespace) -> Served:
    """aTLAS: coefficients of the task vectors, one for each and each tensor, learnt from a few rows a task."""
    model = parts.model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(parts.base[name])
    composed = Composition(model, dict(zip(options.tasks, parts.specialists, strict=True)), init=0.3)
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


def of_twins(parts: Parts, setting: dict[str, Any], job: Job, options: argparse.Namespace) -> Served:
    """Twin-Merging as it is served: the shared model, and each row's mixture of what lies beyond by a router."""
    split = dict(results(parts.base, parts.specialists, setting, job, options))
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


MAKERS: dict[str, Callable[..., Served]] = {"atlas": of_atlas, "twin-merging, routed": of_twins}
