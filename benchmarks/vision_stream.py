"""A stream of image domains: masks in one network (ExSSNeT) beside whole, sparse and low-rank training.

    python benchmarks/vision_stream.py --data DATA --out OUT [--seeds 0 1 2] [--start random|pretrained]

DATA is a folder with pacs64.zip, and cifar10_sample.zip for `--start pretrained`. The tasks are the four domains of
PACS (photo, art painting, cartoon, sketch), at 32 x 32, with the same seven classes: a stream of domains. The network
is three convolutions (32, 64, 128 channels, stride 2, each followed by a group norm without parameters) and a linear
head, without biases. Its weights are frozen: random signs times a constant, as in the supermask papers, or convolutions
trained on the CIFAR-10 sample under a random head. Each method is one of `folklora.continual` over its adapter on all
four weights, trained by a plain loop on images: Adam, half of the images mirrored, a cosine a phase. All methods have
the same number of epochs a task; those with two phases share them between the phases.

Six settings of each method are tried, on validation images, with the seed `--tuning-seed`: learning rates; for EWC, for
LT-SFT and for masks three values of λ or of the density, each at two rates. (Multi-task training takes the rate of
whole training a task; ExSSNeT with transfer takes what is best without.) Then all learn the stream for each seed, which
draws the network and the split of the images, and are scored on test images. Where a method is told the task at test
time, the table says so.

Checked on the way, and raised if not so: what a task trains is disjoint from all earlier masks; the logits of earlier
tasks stay the same to the bit. Recorded besides: how much of its mask each task could still train, and how good the
nearest neighbours were that transfer is judged by.
Runs on one core of a CPU; a row of results is written as soon as it is there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel, TaskType
from torch import Tensor
from vision_tasks import DOMAINS, Domain, Network, accuracy, pacs, start, train

from folklora import LTSFT, ExSSNeT, LoRA
from folklora.adapters.exssnet import choose_task
from folklora.adapters.host.layer import updates_of
from folklora.adapters.sparse import unpacked
from folklora.continual import EWC, ExSSNeTStream, LTSFTStream, MultiTask, PerTask, SeqLoRA
from folklora.continual.base import ContinualMethod
from folklora.stream import metrics
from folklora.stream.run import stored_tensors

TARGETS = ["convolutions.0", "convolutions.1", "convolutions.2", "head"]
SHARED = {"target_modules": TARGETS, "task_type": TaskType.FEATURE_EXTRACTION}
RATES = (3e-4, 1e-3, 2e-3, 4e-3, 1e-2, 2e-2)
DENSITIES = (0.1, 0.3, 0.5)
PENALTIES = (10.0, 100.0, 1000.0)
# of scores and weights; the authors' 0.01 and 0.001 are for several times as many steps, and learnt less here
MASK_RATES = ((3e-2, 3e-3), (1e-1, 1e-2))
FISHER_IMAGES = 200


@dataclass(frozen=True)
class Contender:
    """One method with its settings.

    Args:
        make: What makes the method.
        lr: Learning rate of training, or of its last phase.
        told: Whether it is told the task at test time.
    """

    make: Callable[[], ContinualMethod]
    lr: float
    told: bool = False


class ImageEWC(EWC):
    """EWC whose Fisher information is taken over images."""

    def fisher(self, model: PeftModel, tokenizer: None, task: Domain, examples: int) -> dict[str, Tensor]:
        """As for texts: one image at a time."""
        images, labels = task.train
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        fisher = {name: torch.zeros_like(parameter) for name, parameter in trained.items()}
        rows = torch.randperm(len(labels))[:examples]
        for row in rows.split(1):
            loss = F.cross_entropy(network(model)(images[row]), labels[row])
            for name, gradient in zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True):
                fisher[name] += gradient.square() / len(rows)
        return fisher


class ImageExSSNeT(ExSSNeTStream):
    """ExSSNeT whose transfer is judged by the features of images."""

    rates: list[list[float]]

    def transfer_rates(self, model: PeftModel, tokenizer: None, tasks: Sequence[Domain], index: int) -> list[float]:
        """a_i of each earlier task."""
        images, labels = tasks[index].train
        rows = torch.randperm(len(labels))[: math.ceil(self.transfer_share * len(labels)) + 1]
        found = []
        for i in range(index):
            choose_task(model, i)
            with torch.no_grad():
                found.append(self.vote_rate(network(model).features(images[rows]), labels[rows]))
        self.rates = [*getattr(self, "rates", []), found]
        return found


def main() -> None:
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    began = time.perf_counter()
    images = pacs(options.data)
    pretraining = options.data if options.start == "pretrained" else None
    base, tasks = start(images, options.tuning_seed, pretraining)
    tuning = Tuning(base, tasks, options.epochs, options.tuning_seed)
    chosen, asked = tuned(tuning), {key: str(value) for key, value in vars(options).items()}
    result: dict[str, Any] = {"options": asked, "tuned": tuning.tried, "runs": []}
    for seed in options.seeds:
        base, tasks = start(images, seed, pretraining)
        for name, contender in chosen.items():
            found = learned(base, tasks, contender, options.epochs, seed)
            run = {"method": name, "seed": seed, "told": contender.told, **found}
            result["runs"].append(run)
            print(f"  {seed} {name:24} {run['average_accuracy']:5.1f}  {run['seconds']:.0f} s", flush=True)
            result["seconds"] = round(time.perf_counter() - began)
            (options.out / "vision_stream.json").write_text(json.dumps(result, indent=1))
    text = table(result)
    (options.out / "vision_stream.md").write_text(text)
    print(text)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tuning-seed", type=int, default=100)
    parser.add_argument("--start", choices=["random", "pretrained"], default="random")
    parser.add_argument("--epochs", type=int, default=16, help="of each task")
    return parser.parse_args()


def network(model: PeftModel) -> Network:
    return model.get_base_model()


def learned(
    base: Network, tasks: Sequence[Domain], contender: Contender, epochs: float, seed: int, part: str = "test"
) -> dict[str, Any]:
    """The stream learnt by one method: its matrix of scores, what it keeps, what was checked."""
    began, method = time.perf_counter(), contender.make()
    torch.manual_seed(seed)
    model = method.start(base)
    matrix, stored, seen, stages = [], [], [], 1 if method.joint else len(tasks)
    try:
        for index in range(stages):
            torch.manual_seed(1000 * seed + index)
            carried = teach(method, model, tasks, index, epochs, contender.lr)
            tensors = [*stored_tensors(model), *carried.values()]
            stored.append([sum(v.numel() for v in tensors), sum(v.nbytes for v in tensors)])
            matrix.append([])
            for j, task in enumerate(tasks):
                method.route(model, j, len(tasks) if method.joint else index + 1)
                matrix[-1].append(accuracy(network(model), getattr(task, part)))
            if isinstance(method, ExSSNeTStream):
                check_kept(method, model, tasks, index, seen)
        found = {"free": check_masks(model)} if isinstance(method, ExSSNeTStream) else {}
    finally:
        model.base_model.enable_adapter_layers()
        model.unload()
    matrix = [[None] * len(tasks)] * (len(tasks) - stages) + matrix
    found |= {"transfer_rates": getattr(method, "rates", None), "stored": stored, "matrix": matrix}
    return {**found, **metrics.summary(matrix), "seconds": time.perf_counter() - began}


def teach(
    method: ContinualMethod, model: PeftModel, tasks: Sequence[Domain], index: int, epochs: float, lr: float
) -> dict[str, Tensor]:
    """One task, or all where they are one; what the method carries on."""
    method.prepare(model, None, tasks, index)
    rows = tasks[index].train
    if method.joint:
        rows = tuple(torch.cat(values) for values in zip(*(task.train for task in tasks), strict=True))
    for number, phase in enumerate(method.phases):
        method.enter(model, None, tasks, index, number)
        own = phase.learning_rate or lr
        train(model, network(model), rows, epochs / len(method.phases), own, partial(method.penalty, model))
    return method.finish(model, None, tasks, index)


@torch.no_grad()
def check_kept(
    method: ExSSNeTStream, model: PeftModel, tasks: Sequence[Domain], index: int, seen: list[Tensor]
) -> None:
    """Compare the logits of the earlier tasks with what they were, to the bit."""
    for task in range(index + 1):
        method.route(model, task, index + 1)
        logits = network(model)(tasks[task].test[0])
        if task == index:
            seen.append(logits)
        elif not torch.equal(logits, seen[task]):
            raise RuntimeError(f"the logits of task {task} changed while task {index} was learnt")


def check_masks(model: PeftModel) -> list[float]:
    """Whether what each task trained is disjoint from all earlier masks; the share of its mask that it trained."""
    sizes: dict[int, list[int]] = {}
    for layer, update in updates_of(model, "default"):
        taken = torch.zeros(update.shape, dtype=torch.bool)
        for task, (bits, indices) in enumerate(zip(update.masks, update.indices, strict=True)):
            mask, own = unpacked(bits, update.shape), indices.long()
            if taken.flatten()[own].any() or not mask.flatten()[own].all():
                raise RuntimeError(f"task {task} trained weights of '{layer.name}' that are not its own")
            taken |= mask
            trained, kept = sizes.get(task, (0, 0))
            sizes[task] = [trained + len(own), kept + int(mask.sum())]
    return [trained / kept for trained, kept in sizes.values()]


def masks(density: float, rates: tuple[float, float], transfer: str, weight_epochs: float | None = None) -> Contender:
    def make() -> ContinualMethod:
        adapter = ExSSNeT(density=density, **SHARED)
        return ImageExSSNeT(adapter, transfer, weight_epochs=weight_epochs, mask_learning_rate=rates[0])

    return Contender(make, rates[1], told=True)


def held(weight: float, lr: float) -> Contender:
    return Contender(lambda: ImageEWC(whole(), ewc_lambda=weight, fisher_examples=FISHER_IMAGES), lr)


def sparse(density: float, lr: float) -> Contender:
    return Contender(lambda: LTSFTStream(LTSFT(density=density, **SHARED)), lr)


def low_rank() -> LoRA:
    # the head has seven rows
    return LoRA(r=8, rank_pattern={"head": 7}, **SHARED)


def whole(targets: Sequence[str] = TARGETS) -> LTSFT:
    """An adapter that trains all entries of the targets."""
    return LTSFT(**SHARED | {"target_modules": list(targets)})


class Tuning:
    """Tries settings on validation images; `tried` has what they scored."""

    def __init__(self, base: Network, tasks: Sequence[Domain], epochs: float, seed: int) -> None:
        self.learn = partial(learned, base, tasks, epochs=epochs, seed=seed, part="validation")
        self.tried: dict[str, Any] = {}

    def best(self, name: str, choices: dict[str, Contender]) -> str:
        """The name of the setting with the highest average accuracy."""
        runs = {key: self.learn(contender) for key, contender in choices.items()}
        scores = {key: run["average_accuracy"] for key, run in runs.items()}
        self.tried[name] = {key: {"score": scores[key], "free": run.get("free")} for key, run in runs.items()}
        shown = ", ".join(f"{key} {score:.1f}" for key, score in scores.items())
        print(f"{name}: {shown}  ({sum(run['seconds'] for run in runs.values()):.0f} s)", flush=True)
        return max(scores, key=scores.get)

    def of(self, name: str, choices: dict[str, Contender]) -> Contender:
        """The best contender."""
        return choices[self.best(name, choices)]

    def rates(self, name: str, make: Callable[[], ContinualMethod], told: bool = False) -> Contender:
        """The best learning rate."""
        return self.of(name, {f"rate {lr:g}": Contender(make, lr, told) for lr in RATES})


def tuned(tuning: Tuning) -> dict[str, Contender]:
    """Each method with the best of six settings."""
    chosen = {
        "in turn": tuning.rates("in turn", lambda: SeqLoRA(whole())),
        "head alone, in turn": tuning.rates("head alone, in turn", lambda: SeqLoRA(whole(["head"]))),
        "per-task, whole": tuning.rates("per-task, whole", lambda: PerTask(whole()), told=True),
        "per-task, LoRA": tuning.rates("per-task, LoRA", lambda: PerTask(low_rank()), told=True),
    }
    low, high = chosen["in turn"].lr, chosen["per-task, whole"].lr
    chosen["multi-task"] = Contender(lambda: MultiTask(whole()), high)
    pairs = (low, high) if low != high else (low, 3 * low)
    penalties = itertools.product(PENALTIES, pairs)
    chosen["ewc"] = tuning.of("ewc", {f"λ {w:g}, rate {lr:g}": held(w, lr) for w, lr in penalties})
    shares = itertools.product(DENSITIES, pairs)
    chosen["lt-sft"] = tuning.of("lt-sft", {f"density {d:g}, rate {lr:g}": sparse(d, lr) for d, lr in shares})
    grid = {f"density {d:g}, rates {a:g} {b:g}": (d, (a, b)) for d, (a, b) in itertools.product(DENSITIES, MASK_RATES)}
    chosen["supsup"] = tuning.of("supsup", {key: masks(*one, "none", weight_epochs=0) for key, one in grid.items()})
    one = grid[tuning.best("exssnet", {key: masks(*one, "none") for key, one in grid.items()})]
    return {**chosen, "exssnet": masks(*one, "none"), "exssnet, transfer": masks(*one, "best")}


def table(result: dict[str, Any]) -> str:
    """Means over seeds in Markdown, ± the sample standard deviation."""
    runs = result["runs"]
    heads = ["method", "told the task", "average accuracy", "backward transfer", *DOMAINS, "stored numbers", "kB"]
    lines = [f"| {' | '.join(heads)} |", "| --- | --- |" + " ---: |" * (len(heads) - 2)]
    for name in dict.fromkeys(run["method"] for run in runs):
        own = [run for run in runs if run["method"] == name]
        cells = [spread([run[key] for run in own]) for key in ("average_accuracy", "backward_transfer")]
        cells += [f"{mean(run['matrix'][-1][j] for run in own):.1f}" for j in range(len(own[0]["matrix"]))]
        numbers, size = (mean(run["stored"][-1][i] for run in own) for i in range(2))
        told = "yes" if own[0]["told"] else "no"
        lines.append(f"| {name} | {told} | {' | '.join(cells)} | {numbers:,.0f} | {size / 1000:,.0f} |")
    lines += ["", "| method | settings tried, average accuracy on validation images |", "| --- | --- |"]
    for name, tries in result["tuned"].items():
        shown = ", ".join(f"{key}: {found['score']:.1f}" for key, found in tries.items())
        lines.append(f"| {name} | {shown} |")
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float | None]) -> str:
    if None in values:
        return "–"
    return f"{mean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{mean(values):.1f}"


if __name__ == "__main__":
    main()
