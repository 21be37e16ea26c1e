"""How much each task's adapter changes on the other tasks' inputs, which orthogonal reading is meant to prevent.

    python benchmarks/adapter_reach.py --model MODEL --data cl_benchmark --out OUT [--methods o-lora inc-lora]

A method that keeps an adapter for each task and adds them up learns order 1 as in standard_stream.py, one seed, and its
run is kept. Then, over the test prompts of each task s and every layer, for each task's adapter t

    reach[t][s] = mean over layers of  ||B_t A_t x||_F / ||W x||_F            x: the layer's inputs [tokens, in]

with all adapters in place. Shown as reach[t][s] / reach[t][t]: 1 where an adapter changes another task's outputs as
much as its own task's, 0 where it leaves them. `energy` is the share of ||x||^2 that lies in the rows of A_t, over what
a random subspace of that size would hold, r/in: where it is the same for all tasks, the adapter's directions are no
sign of its task.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jobs import file_name, work
from standard_stream import learn_stream, load_order
from torch import Tensor, nn

from folklora.adapters.host.layer import FolkloraLayer, layers_of

SETTINGS = {"epochs": 2, "batch": 32, "rank": 8, "targets": "all-linear", "test_rows": 32, "evaluate": "last"}


def main() -> None:
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    jobs = [
        (file_name(method, f"seed{seed}"), {"method": method, "seed": seed, "rate": options.rate})
        for method in options.methods
        for seed in options.seeds
    ]
    work(jobs, partial(reach_job, options=options), options.out, workers=options.workers, deadline=float("inf"))
    for name, job in jobs:
        show(job, json.loads((options.out / name).read_text()))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("--model", "--data", "--out"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=["o-lora", "inc-lora"])
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--train-rows", type=int, default=500)
    parser.add_argument("--prompts", type=int, default=32, help="of each task that are measured")
    parser.add_argument("--workers", type=int, default=1)
    return parser.parse_args(namespace=argparse.Namespace(**SETTINGS))


def reach_job(job: dict[str, Any], options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    stream = {**job, "order": "order1", "names": "named"}
    run = learn_stream(stream, options, options.out / f"run-{job['method']}-{job['seed']}")
    (method,) = run.results["methods"]
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    model, _ = run.load_adapters(method, model)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tasks = load_order(options, "order1", named=True)
    reach: dict[str, list[list[float]]] = {"reach": [], "energy": []}
    for task in tasks:
        found = measured(model, tokenizer, [example.prompt for example in task.test[: options.prompts]])
        for name, values in found.items():
            reach[name].append(values)
    # so far by task of the input; a row is one adapter
    turned = {name: [list(row) for row in zip(*rows, strict=True)] for name, rows in reach.items()}
    record = {**job, **turned, "tasks": [task.name for task in tasks], "entry": run.results["methods"][method]}
    return record, f"{job['method']} seed {job['seed']}: AA {record['entry']['average_accuracy']:.1f}"


@torch.no_grad()
def measured(model: nn.Module, tokenizer: Any, prompts: list[str]) -> dict[str, list[float]]:
    """Of each adapter in their order: what it changes, and how much of the inputs it reads."""
    sums: dict[str, dict[tuple[str, str], float]] = {"change": defaultdict(float), "read": defaultdict(float)}
    sizes: dict[str, dict[str, float]] = {"out": defaultdict(float), "in": defaultdict(float)}
    names = sorted(next(layers_of(model)).folklora_updates, key=lambda name: (len(name), name))
    # orthonormal bases of what each reads
    bases = {
        (layer.name, name): torch.linalg.qr(layer.folklora_updates[name].A.mT).Q
        for layer in layers_of(model)
        for name in names
    }

    def see(layer: FolkloraLayer, x: Tensor) -> None:
        sizes["in"][layer.name] += float(x.square().sum())
        sizes["out"][layer.name] += float(F.linear(x, layer.base_layer.weight).square().sum())
        for name in names:
            change = layer.folklora_updates[name].factors().dense()
            sums["change"][layer.name, name] += float(F.linear(x, change).square().sum())
            sums["read"][layer.name, name] += float((x @ bases[layer.name, name]).square().sum())

    model.eval()
    with seen(model, see):
        for prompt in prompts:
            model(**tokenizer(prompt, return_tensors="pt"))
    reach, energy = [], []
    for name in names:
        change = [(sums["change"][place, name] / size) ** 0.5 for place, size in sizes["out"].items()]
        read = [
            sums["read"][place, name] / size / (bases[place, name].shape[1] / bases[place, name].shape[0])
            for place, size in sizes["in"].items()
        ]
        reach.append(statistics.mean(change))
        energy.append(statistics.mean(read))
    return {"reach": reach, "energy": energy}


@contextmanager
def seen(model: nn.Module, see: Callable[[FolkloraLayer, Tensor], None]) -> Iterator[None]:
    """While open, `see` is called with every adapted layer and its inputs [tokens, in]."""
    hooks = [
        layer.register_forward_pre_hook(lambda layer, inputs: see(layer, inputs[0].flatten(0, -2).float()))
        for layer in layers_of(model)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def show(job: dict[str, Any], record: dict[str, Any]) -> None:
    print(f"\n{job['method']}, seed {job['seed']}\n\n| adapter of | " + " | ".join(record["tasks"]) + " | energy |")
    print("| --- |" + " --: |" * (len(record["tasks"]) + 1))
    for index, (name, row) in enumerate(zip(record["tasks"], record["reach"], strict=True)):
        cells = [f"{value / row[index]:.2f}" for value in row]
        read = " ".join(f"{value:.2f}" for value in record["energy"][index])
        print(f"| {name} ({row[index]:.2f}) | " + " | ".join(cells) + f" | {read} |")


if __name__ == "__main__":
    main()
