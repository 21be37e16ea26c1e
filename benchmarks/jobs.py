"""Independent jobs over several processes and GPUs. Each finished one is kept as JSON, so that a benchmark resumes."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

Job = dict[str, Any]
Run = Callable[[Job], tuple[dict[str, Any], str]]
"""A job's record and a line to show; a function of a module, or a partial of one, so that it reaches a process."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """What a benchmark over a model, data and seeds is told besides its own."""
    for name in ("--model", "--data", "--out"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=1)


def work(jobs: Sequence[tuple[str, Job]], run: Run, folder: Path, *, workers: int, deadline: float) -> None:
    """Do the jobs that have no record in the folder yet.

    Args:
        jobs: The file name of each job's record, and the job.
        run: Does one.
        folder: Where the records are kept.
        workers: Processes; they take the GPUs in turn. One works in this process.
        deadline: By `time.time()`; no job begins after it.
    """
    todo = [(folder / name, job) for name, job in jobs if not (folder / name).is_file()]
    print(f"{len(todo)} of {len(jobs)} jobs to do", flush=True)
    # a single job too: of several GPUs, a worker sees its own, and a trainer refuses to see more
    if workers == 1 or not todo:
        for path, job in todo:
            if time.time() < deadline:
                print(_kept(path, job, run), flush=True)
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(workers, len(todo)), _take_device) as pool:
        lines = []
        for line in pool.imap_unordered(partial(_guarded, run=run, deadline=deadline), todo):
            print(line, flush=True)
            lines.append(line)
    if any(line.startswith("failed") for line in lines):
        raise SystemExit("some jobs failed; the finished ones are kept, and running this again goes on")


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The records whose names begin with the kind."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"{kind}-*.json"))]


def file_name(*words: object) -> str:
    """A file's name made of words."""
    plain = ("".join(c if c.isalnum() or c in ".-" else "_" for c in str(word)) for word in words)
    return "-".join(plain) + ".json"


def _kept(path: Path, job: Job, run: Run) -> str:
    record, line = run(job)
    path.with_suffix(".part").write_text(json.dumps(record))
    os.replace(path.with_suffix(".part"), path)
    return line


def _take_device() -> None:
    """Give this worker one of the GPUs in turn; before torch looks for them."""
    import torch

    count, place = torch.cuda.device_count(), multiprocessing.current_process()._identity[0] - 1
    if count > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(place % count)


def _guarded(packed: tuple[Path, Job], run: Run, deadline: float) -> str:
    path, job = packed
    if time.time() > deadline:
        return f"not begun: {path.name}"
    if path.is_file():
        return f"done meanwhile: {path.name}"
    try:
        return _kept(path, job, run)
    except Exception:
        return f"failed: {path.name}\n{traceback.format_exc()}"
