"""What a stream of many tasks costs, task by task: time, memory, what is stored; for every continual method.

    python benchmarks/long_stream.py --out OUT [--tasks 100] [--methods o-lora replay ...] [--workers 1]

The demo's model learns tiny tasks of the demo's five kinds, each written by a seed of its own. Every method runs in a
process of its own, and each finished one is kept in OUT, so that the script resumes. For each task are recorded:
prepare_seconds (before the trainer is made), train_seconds (the trainer: its making and its steps), finish_seconds
(after the last step, before scoring), evaluate_seconds (by default all tasks are scored after the last one only),
save_seconds, resident memory, and stored parameters. OUT gets moments.md (the 1st, 10th, 50th and 100th task),
table.md, costs.svg and a JSON record a method; table.md sets the last tenth of the tasks beside an early one, so that
what grows with the number of tasks is seen.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from jobs import file_name, records

TIMES = ("prepare", "train", "finish", "evaluate", "save")
REFUSED = ("multi-task",)  # it learns all tasks at once
OWN_OPTIONS: dict[str, dict[str, Any]] = {
    "replay": {"memory": 0.1},
    "ewc": {"fisher_examples": 8},
    "osft": {"r": None},
    "lt-sft": {"r": None},
    "exssnet": {"r": None},
    "progprompt": {"r": None, "target_modules": None, "prompt_length": 2},
    "l2p": {"r": None, "target_modules": None, "prompt_length": 2},
    "adapt-infty": {"budget": 16, "pool": 32, "n_clusters": 4, "proj_dim": 256},
    "codyra": {"kappa_max": 0.5},
}


def main() -> None:
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    todo = [name for name in methods(options) if not record_file(options, name).is_file()]
    print(f"{len(todo)} methods to do: {' '.join(todo)}", flush=True)
    # a process for each method: memory that one leaves behind is not counted for the next
    with multiprocessing.get_context("spawn").Pool(options.workers, maxtasksperchild=1) as pool:
        for line in pool.imap_unordered(partial(learn_one, options=options), todo):
            print(line, flush=True)
    write_report(options.out)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--methods", nargs="+", help="all that learn task after task, if not given")
    parser.add_argument("--train-rows", type=int, default=16, help="training examples a task")
    parser.add_argument("--test-rows", type=int, default=2, help="test examples a task")
    parser.add_argument("--evaluate", choices=("all", "seen", "last"), default="last", help="what is scored when")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--targets", nargs="+", default=["q_proj", "v_proj"])
    parser.add_argument("--workers", type=int, default=1, help="methods at once")
    return parser.parse_args()


def methods(options: argparse.Namespace) -> list[str]:
    from folklora.methods import methods as installed

    return options.methods or [one.name for one in installed("continual") if one.name not in REFUSED]


def record_file(options: argparse.Namespace, method: str) -> Path:
    return options.out / file_name("long", method, options.tasks)


def long_stream(count: int, train: int, test: int) -> list[Any]:
    """Tasks of the demo's kinds in turn; no two have an example in common but by chance."""
    import dataclasses

    from folklora.demo.tasks import LABELS, demo_tasks

    # a task must be written with an example of each label
    least = max(map(len, LABELS.values()))
    tasks: list[Any] = []
    while len(tasks) < count:
        seed = len(tasks)
        for task in demo_tasks(seed, max(train, least), max(test, least)):
            cut = {"train": task.train[:train], "test": task.test[:test]}
            tasks.append(dataclasses.replace(task, name=f"{task.name}-{seed}", **cut))
    return tasks[:count]


class Clock:
    """Notes, for each task, when it began, was prepared, had its last step, and was saved, and the memory then."""

    def __init__(self) -> None:
        self.begun = self.prepared = self.stepped = 0.0
        self.own = 0.0  # seconds of noting
        self.computed = time.process_time()
        self.tasks: list[dict[str, float]] = []

    def tell(self, event: str, **details: Any) -> None:
        """Take one event of `folklora.learn`; a row is told of when it is saved."""
        now = time.perf_counter()
        if event == "method":
            self.begun, self.computed = now, time.process_time()
        elif event == "train":
            self.prepared = now
        elif event == "step":
            self.stepped = now
        elif event == "row":
            times = {"prepared": self.prepared, "stepped": self.stepped, "saved": now}
            since = {key: value - self.begun for key, value in times.items()}
            self.tasks.append({**since, "computed": time.process_time() - self.computed, "memory": resident()})
            if len(self.tasks) == 1:
                # the libraries' own objects: walking over them after each task would cost more than some of the tasks
                gc.freeze()
            self.begun, self.computed = time.perf_counter(), time.process_time()
            self.own += self.begun - now


def costs(noted: dict[str, float], state: dict[str, Any]) -> dict[str, float]:
    """What one task cost, from what the clock noted and the run recorded."""
    return {
        "prepare_seconds": noted["prepared"],
        "train_seconds": noted["stepped"] - noted["prepared"],
        "finish_seconds": max(0.0, state["train_seconds"] - noted["stepped"]),
        "evaluate_seconds": state["seconds"] - state["train_seconds"],
        "save_seconds": max(0.0, noted["saved"] - state["seconds"]),
        "processor_seconds": noted["computed"],
        "memory": noted["memory"],
        "stored_parameters": state["stored_parameters"],
    }


def resident() -> int:
    """This process's memory in bytes, without what the garbage collector and (with glibc) the heap would give back.

    The heap keeps what the largest step needed for a while; it is no part of what a method holds between its tasks.
    """
    import ctypes

    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def learn_one(method: str, options: argparse.Namespace) -> str:
    """Let one method learn the stream and keep its record; a line to show."""
    import logging

    import torch

    from folklora import learn
    from folklora.demo import model_folder

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    tasks = long_stream(options.tasks, options.train_rows, options.test_rows)
    common = {
        "r": options.rank, "target_modules": options.targets, "learning_rate": 1e-3, "batch_size": 8,
        "max_length": 96, "eval_batch_size": 60, "evaluate": options.evaluate,
    }  # fmt: skip
    own = {key: value for key, value in {**common, **OWN_OPTIONS.get(method, {})}.items() if value is not None}
    clock, began = Clock(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run = learn(model_folder(), tasks, method, out=Path(folder) / "run", options=own, progress=clock.tell)
        whole = time.perf_counter() - began
        states, size = run.states(method), sum(p.stat().st_size for p in run.path.rglob("*") if p.is_file())
        entry, machine = run.results["methods"][method], run.results["machine"]
    rows = [costs(noted, state) for noted, state in zip(clock.tasks, states, strict=True)]
    record = {
        "method": method, "tasks": rows, "seconds": whole, "run_bytes": size, "machine": machine, "options": own,
        "rows": [options.train_rows, options.test_rows],
        # before the first task, between tasks, and the results and report at the end
        "other_seconds": whole - clock.own - sum(row[f"{part}_seconds"] for row in rows for part in TIMES),
        "average_accuracy": entry["average_accuracy"],
    }  # fmt: skip
    path = record_file(options, method)
    path.with_suffix(".part").write_text(json.dumps(record))
    os.replace(path.with_suffix(".part"), path)
    return f"{whole:7.1f} s  {method}"


def write_report(out: Path) -> None:
    """Write moments.md, table.md and costs.svg into the folder, and print the tables."""
    found = records(out, "long")
    for name, lines in (("moments", moments(found)), ("table", table(found))):
        text = "\n".join(lines) + "\n"
        (out / f"{name}.md").write_text(text, encoding="utf-8")
        print(text)
    if found:
        plot(out / "costs.svg", found)


def moments(found: list[dict[str, Any]]) -> list[str]:
    """Some tasks of each stream: the processor's seconds, memory above that after the first, and what is stored.

    Seconds, which other work on the machine hardly changes, are the median over the five tasks that end there, so that
    what is done once does not count; memory and numbers are those after the task.
    """
    longest = max((len(record["tasks"]) for record in found), default=0)
    at = [number for number in (10, 50, 100) if number <= longest]
    heads = [f"task {number}, CPU s" for number in at] + ["MiB after task 1"]
    heads += [f"+ MiB after {number}" for number in at] + [f"stored after {number}" for number in (1, *at)]
    lines = ["| " + " | ".join(["method", *heads]) + " |", "| --- |" + " --: |" * len(heads)]
    for record in found:
        rows, start = record["tasks"], record["tasks"][0]["memory"]
        whole = [row["processor_seconds"] for row in rows]
        there = [number if number <= len(rows) else None for number in at]
        cells = [f"{statistics.median(whole[n - 5 : n]):.2f}" if n else "" for n in there]
        cells.append(f"{start / 2**20:.0f}")
        cells += [f"{(rows[n - 1]['memory'] - start) / 2**20:.1f}" if n else "" for n in there]
        cells += [f"{rows[n - 1]['stored_parameters']:,}" if n else "" for n in (1, *there)]
        lines.append("| " + " | ".join([record["method"], *cells]) + " |")
    return lines


def table(found: list[dict[str, Any]]) -> list[str]:
    """Early → late, each the median over a tenth of the tasks (the early one leaves the first task out)."""
    parts = [part for part in TIMES if part != "evaluate"]
    heads = ["method", "tasks", *(f"{part} s" for part in parts), "last evaluation s", "other s"]
    heads += ["memory MiB", "memory KiB a task", "stored KiB a task"]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for record in found:
        rows = record["tasks"]
        tenth = max(1, len(rows) // 10)
        early, late = rows[1 : 1 + tenth], rows[-tenth:]
        cells = [f"{middle(early, f'{part}_seconds'):.2f} → {middle(late, f'{part}_seconds'):.2f}" for part in parts]
        cells += [f"{rows[-1]['evaluate_seconds']:.1f}", f"{record['other_seconds']:.1f}"]
        cells.append(f"{middle(early, 'memory') / 2**20:.0f} → {middle(late, 'memory') / 2**20:.0f}")
        apart = max(1, len(rows) - 1 - tenth)
        grown = [(middle(late, key) - middle(early, key)) / apart for key in ("memory", "stored_parameters")]
        # numbers are float32
        cells += [f"{grown[0] / 1024:.0f}", f"{4 * grown[1] / 1024:.0f}"]
        lines.append("| " + " | ".join([record["method"], str(len(rows)), *cells]) + " |")
    return lines


def middle(rows: list[dict[str, float]], key: str) -> float:
    return statistics.median(row[key] for row in rows)


def plot(path: Path, found: list[dict[str, Any]]) -> None:
    """Three panels by task: the processor's seconds (median of five tasks), memory above the start, stored numbers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({"svg.hashsalt": "folklora", "font.size": 8})
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 4), constrained_layout=True)
    for i, record in enumerate(found):
        rows, look = (
            record["tasks"],
            {"linestyle": ("-", "--", ":")[i // 10 % 3], "color": f"C{i % 10}", "linewidth": 1},
        )
        columns = {
            "processor": [row.get("processor_seconds") for row in rows],
            "memory": [(row["memory"] - rows[0]["memory"]) / 2**20 for row in rows],
            "stored": [4 * row["stored_parameters"] / 2**20 for row in rows],
        }
        if None in columns["processor"]:
            columns["processor"] = []
        columns["processor"] = [
            statistics.median(columns["processor"][k - 5 : k]) for k in range(6, len(columns["processor"]) + 1)
        ]
        for axis, values in zip(axes, columns.values(), strict=True):
            axis.plot(range(len(rows) - len(values) + 1, len(rows) + 1), values, label=record["method"], **look)
    titles = ("processor, s", "resident memory above that after task 1, MiB", "stored, MiB of float32")
    for axis, title in zip(axes, titles, strict=True):
        # some methods hold a hundred times what others do
        axis.set(title=title, xlabel="task", yscale="log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
