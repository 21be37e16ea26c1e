"""Seconds and peak memory of merging models on disk; mergekit beside it where it is installed.

Random Llama-shaped checkpoints in bfloat16 (a base and two that were "tuned" from it) are written to a scratch folder
and read once, so that every run finds them in the system's memory. Each merge is a process of its own, from its start
to the last byte on the disk, with each program's own default of threads. *CPU seconds* are what it computed, and count
where others use the machine too. *Resident* is the most that all its processes held at once, in which pages of input
files count while they are mapped; *anonymous* is without these. The GPU's memory is what the driver says is in use more
than before. The row *nothing* is the start of the program alone.

Every run is recorded in a JSON file at once. The same command again does what is left; with `--budget-seconds` it ends
by itself. A run that goes beyond its limit is stopped, and its row says what it had come to.

    python benchmarks/merge.py --shape 1b --scratch /tmp/merge --mergekit VENV/bin/mergekit-yaml --out merge.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from merge_checkpoints import SHAPES, difference, keep_part, read_once, write_models
from merge_processes import GPU, Run, measure

_EACH = {"weight": 0.5}
_SPARSE = {"weight": 0.5, "density": 0.5}
METHODS: dict[str, dict[str, Any]] = {
    "linear": {"each": {"weight": 1.0}},
    "slerp": {"whole": {"t": 0.5}, "base": True, "models": 1},
    "nuslerp": {"each": _EACH, "base": True},
    "task_arithmetic": {"each": _EACH, "base": True},
    "ties": {"each": _SPARSE, "base": True},
    "dare_linear": {"each": _SPARSE, "base": True},
    "dare_ties": {"each": _SPARSE, "base": True},
    "della": {"each": _SPARSE, "base": True},
    "della_linear": {"each": _SPARSE, "base": True},
    "breadcrumbs": {"each": _SPARSE, "base": True},
    "breadcrumbs_ties": {"each": _SPARSE, "base": True},
    "model_stock": {"base": True},
    "sce": {"whole": {"select_topk": 0.5}, "base": True},
    "karcher": {},
    "nearswap": {"whole": {"t": 0.001}, "base": True, "models": 1},
    "passthrough": {"models": 1},
    "ram": {"base": True},
}
# two programs draw other masks
DRAWN = ("dare_linear", "dare_ties", "della", "della_linear")
_LEAST_SECONDS = 10.0


class OutOfTimeError(Exception):
    """The budget is used up."""


@dataclass(frozen=True)
class Contender:
    """A program as it is started.

    Args:
        name: What the rows call it.
        words: The command, without the configuration and the folder to write.
        ours: Whether it is Folklora.
    """

    name: str
    words: tuple[str, ...]
    ours: bool

    def command(self, config: Path, out: Path) -> list[str]:
        if self.ours:
            return [sys.executable, "-m", "folklora", "merge", str(config), "--out", str(out), *self.words]
        return [self.words[0], str(config), str(out), *self.words[1:]]


def contenders(asked: argparse.Namespace, device: str) -> list[Contender]:
    found = []
    for count in asked.workers if device == "cpu" else asked.gpu_workers:
        words = ("--device", device, "--overwrite", "--workers", str(count))
        found.append(Contender(f"Folklora, {count} process{'es' * (count > 1)}", words, True))
    for options in ["", *asked.mergekit_options] if asked.mergekit else []:
        words = (asked.mergekit, "--quiet", "--no-copy-tokenizer", *options.split())
        found.append(Contender(f"mergekit {options}".strip(), (*words, *(["--cuda"] * (device == "cuda"))), False))
    return found


def request(root: Path, method: str) -> dict[str, Any]:
    """A configuration that both take as it is; both compute in float32."""
    given = METHODS[method]
    models: list[dict[str, Any]] = [
        {"model": str(root / name), "parameters": dict(given.get("each", {}))}
        for name in ("a", "b")[: given.get("models", 2)]
    ]
    config = {"merge_method": method, "models": models, "parameters": given.get("whole", {})}
    if given.get("base"):
        config["base_model"] = str(root / "base")
    return {**config, "dtype": "float32", "out_dtype": "bfloat16"}


class Bench:
    """The runs of one shape, and the file that they are recorded in."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked, self.ends = asked, time.monotonic() + asked.budget_seconds
        self.root = asked.scratch / asked.shape
        self.results = (asked.results or asked.scratch) / f"{asked.shape}-results"
        self.gpu = GPU() if "cuda" in asked.devices else None
        self.rows: list[dict[str, Any]] = json.loads(asked.out.read_text()) if asked.out.is_file() else []

    def row(self, method: str, device: str, name: str) -> dict[str, Any]:
        """The record of a method, device and contender, on this machine and with as many threads as now."""
        key = {
            "shape": self.asked.shape, "device": device, "method": method, "with": name,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores", "threads": torch.get_num_threads(),
        }  # fmt: skip
        key |= {"gpu": self.gpu.name()} if self.gpu is not None and device == "cuda" else {}
        found = next((row for row in self.rows if all(row.get(k) == v for k, v in key.items())), None)
        if found is None:
            found = {**key, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "runs": []}
            self.rows.append(found)
        return found

    def save(self) -> None:
        temporary = self.asked.out.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.rows, indent=1))
        os.replace(temporary, self.asked.out)

    def measured(self, row: dict[str, Any], words: list[str], out: Path, limit: float) -> Run:
        """One more run; it is not recorded where it was the budget that ended it."""
        left = self.ends - time.monotonic()
        if left < _LEAST_SECONDS:
            raise OutOfTimeError
        shutil.rmtree(out, ignore_errors=True)
        gpu = self.gpu if row["device"] == "cuda" else None
        run = measure(words, out, self.asked.out.with_suffix(".log"), min(limit, left), gpu)
        if run.status == "stopped" and left < limit:
            raise OutOfTimeError
        row["runs"].append(run.record())
        self.save()
        print(f"{row['device']} {row['method']} {row['with']}: {_cells(row)}", file=sys.stderr, flush=True)
        return run

    def starts(self) -> None:
        """What it takes to start the programs."""
        programs = {"Folklora": [sys.executable, "-c", "import folklora.merge.engine, folklora.cli"]}
        programs |= {"mergekit": [self.asked.mergekit, "--help"]} if self.asked.mergekit else {}
        for name, words in programs.items():
            row = self.row("nothing", "cpu", name)
            if not row["runs"]:
                # the first start compiles what is imported
                measure(words, self.results, self.asked.out.with_suffix(".log"), self.asked.limit_seconds)
                self.measured(row, words, self.results / "nothing", self.asked.limit_seconds)

    def compare(self, method: str, device: str) -> None:
        """One method's runs, and how far Folklora's first contender and mergekit are apart."""
        config = self.asked.out.parent / f"{method}.yaml"
        config.write_text(yaml.safe_dump(request(self.root, method)))
        every = contenders(self.asked, device)
        rows = {contender.name: self.row(method, device, contender.name) for contender in every}
        compared = rows.get("mergekit", {}) if method not in DRAWN else {}
        kept = self.results / "kept"
        for repeat in range(self.asked.repeats):
            shutil.rmtree(kept, ignore_errors=True)
            for contender in every:
                row = rows[contender.name]
                wanted = bool(compared) and "difference" not in compared and contender in (every[0], _mergekit(every))
                if len(row["runs"]) > repeat and not (wanted and contender.ours and len(compared["runs"]) <= repeat):
                    continue
                if any(run["status"] != "done" for run in row["runs"]):
                    continue
                out = self.results / "out"
                run = self.measured(row, contender.command(config, out), out, self.limit(rows, contender))
                if wanted and run.status == "done":
                    self.set_beside(contender, out, kept, compared)
                shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(kept, ignore_errors=True)

    def set_beside(self, contender: Contender, out: Path, kept: Path, compared: dict[str, Any]) -> None:
        """Keep Folklora's result, or compare it with mergekit's."""
        entries = self.asked.compare_entries
        if contender.ours and entries is None:
            out.rename(kept)
        elif contender.ours:
            keep_part(out, kept, entries)
        elif kept.is_dir():
            compared["difference"] = difference(kept, out, entries)
            self.save()

    def limit(self, rows: dict[str, dict[str, Any]], contender: Contender) -> float:
        """mergekit may take so many times Folklora's slowest contender, where that is asked for."""
        taken = [run["seconds"] for name, row in rows.items() if name.startswith("Folklora") for run in row["runs"]]
        if contender.ours or self.asked.limit_factor is None or not taken:
            return self.asked.limit_seconds
        return min(self.asked.limit_seconds, self.asked.limit_factor * max(taken))


def _mergekit(every: list[Contender]) -> Contender | None:
    return next((contender for contender in every if contender.name == "mergekit"), None)


def _cells(row: dict[str, Any]) -> str:
    """A row's figures: the median of seconds, the largest of memory."""
    runs = row["runs"]
    if any(run["status"] == "failed" for run in runs):
        return "failed | | | | |"
    sign = "> " if any(run["status"] == "stopped" for run in runs) else ""
    least = "≥ " if sign else ""
    seconds, computed = (statistics.median(run[key] for run in runs) for key in ("seconds", "cpu_seconds"))
    resident, anonymous = (max(run[key] for run in runs) / 1e9 for key in ("resident", "anonymous"))
    gpus = [run["gpu"] for run in runs if run["gpu"] is not None]
    gpu = f"{least}{max(gpus) / 1e9:.2f}" if gpus else ""
    memory = f"{least}{resident:.2f} | {least}{anonymous:.2f} | {gpu}"
    found = row.get("difference")
    apart = "" if found is None else f"{found['share']:.2%}, ≤ {found['largest']:.1e}" if found["share"] else "none"
    return f"{sign}{seconds:.1f} ({len(runs)}) | {sign}{computed:.1f} | {memory} | {apart}"


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """All rows, with the runs in brackets."""
    yield "| shape | device | method | with | seconds (runs) | CPU s | resident, GB | anonymous | GPU | differs |"
    yield "| --- | --- | --- | --- | --: | --: | --: | --: | --: | --: |"
    for row in rows:
        if row["runs"]:
            yield f"| {row['shape']} | {row['device']} | {row['method']} | {row['with']} | {_cells(row)} |"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--scratch", type=Path, required=True, help="a folder with room for three models")
    parser.add_argument("--results", type=Path, help="a folder with room for two merged ones; scratch by default")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file of the records; read if it is there")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--mergekit", help="mergekit-yaml, perhaps of another environment")
    parser.add_argument("--mergekit-options", nargs="*", default=[], help="each a further contender, such as '-j 1'")
    parser.add_argument("--devices", nargs="+", choices=("cpu", "cuda"), default=["cpu"])
    parser.add_argument("--workers", type=int, nargs="+", default=[1], help="processes on the CPU")
    parser.add_argument("--gpu-workers", type=int, nargs="+", default=[1], help="processes on the GPU")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--limit-seconds", type=float, default=3600.0, help="of one run")
    parser.add_argument("--limit-factor", type=float, help="mergekit's limit, in times of what Folklora took")
    parser.add_argument("--budget-seconds", type=float, default=float("inf"), help="of all runs of this call")
    parser.add_argument("--compare-entries", type=int, help="how many of each tensor; all by default")
    parser.add_argument("--keep", action="store_true", help="leave the models there, and use those that are there")
    return parser.parse_args()


def main() -> None:
    asked = options()
    bench = Bench(asked)
    if not (asked.keep and (bench.root / "b" / "model.safetensors.index.json").is_file()):
        shutil.rmtree(bench.root, ignore_errors=True)
        # a process of its own, with which its share of the GPU's memory ends
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            pool.submit(write_models, bench.root, asked.shape).result()
    bench.results.mkdir(parents=True, exist_ok=True)
    read_once(bench.root)
    try:
        bench.starts()
        for method in asked.methods:
            for device in asked.devices:
                bench.compare(method, device)
    except OutOfTimeError:
        print("the budget is used up; the same command goes on", file=sys.stderr)
    finally:
        print("\n".join(table(bench.rows)))
        shutil.rmtree(bench.results)
        if not asked.keep:
            shutil.rmtree(bench.root)


if __name__ == "__main__":
    main()
