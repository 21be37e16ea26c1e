"""The processes that share a merge: started here, or by torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

import torch

from folklora.stream.files import read_json, write_json

BEGUN = "begun.json"
_POLL_SECONDS = 0.2

Item = TypeVar("Item")


def in_processes(work: Path, done: set[str], count: int, device: str, tell: Callable[[Iterable[str]], None]) -> None:
    """Do what is left of a merge in `count` processes, and wait for them.

    Raises:
        ValueError: What one of them raised.
        OSError: Likewise, or one was killed.
    """
    write_json(work / BEGUN, sorted(done))
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // count))}
    words = [sys.executable, "-m", "folklora.merge.engine.worker", str(work), device, str(count)]
    for path in work.glob("error-*.json"):
        path.unlink()
    running = [subprocess.Popen([*words, str(rank)], env=environment) for rank in range(count)]
    try:
        while any(process.poll() is None for process in running):
            if any(process.returncode for process in running):
                break
            time.sleep(_POLL_SECONDS)
            tell(())
    finally:
        for process in running:
            process.kill()
            process.wait()
    tell(())
    for path in sorted(work.glob("error-*.json")):
        error = read_json(path)
        raise (ValueError if error["kind"] == "ValueError" else OSError)(error["message"])
    failed = [process.returncode for process in running if process.returncode]
    if failed:
        raise OSError(f"a worker ended with code {failed[0]}; the same command goes on where the merge was")


def side_by_side(
    do: Callable[[Item], None], items: Sequence[Item], threads: int, stop: Callable[[BaseException], None]
) -> None:
    """Do each item in a thread of its own, in which torch uses no others; the first error ends all.

    One operation's rows shared out to many threads would have them wait for each other at its end, and for the reading
    and writing between.

    Args:
        do: Does one.
        items: All of them.
        threads: How many at a time.
        stop: Called with the first error, also of the user who interrupts; ends those that are being done.
    """
    ended = threading.Event()

    def end(error: BaseException) -> None:
        ended.set()
        stop(error)

    def one(item: Item) -> None:
        if ended.is_set():
            return
        try:
            do(item)
        except BaseException as error:
            end(error)
            raise

    before = torch.get_num_threads()
    # of the threads that begin after it, and of this one
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            running = [pool.submit(one, item) for item in items]
            try:
                for future in as_completed(running):
                    future.result()
            except BaseException as error:
                end(error)
                raise
    finally:
        torch.set_num_threads(before)


def torchrun_team(device: str) -> Any:
    """What torchrun's processes share; None outside of it."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    from accelerate import PartialState

    return PartialState(cpu=not device.startswith("cuda"))


def together(team: Any) -> None:
    """Wait for all of torchrun's processes."""
    if team is not None:
        team.wait_for_everyone()
