"""What the tests of continual methods share: two small tasks that contradict each other, a model, a stopped run."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from folklora import learn
from folklora.stream.tasks import Example, Task

QUICK = {"r": 2, "dropout": 0.0, "learning_rate": 0.02, "batch_size": 8, "max_length": 48, "epochs": 2}


class StoppedError(Exception):
    """The run was stopped on purpose."""


def _task(name: str, labels: tuple[str, str]) -> Task:
    draw = random.Random(name)

    def example(i: int) -> Example:
        # prompts of different lengths, so that micro-batches differ in padding
        word = "abcdefgh"[draw.randrange(4) + 4 * (i % 2)] * (1 + i % 3)
        return Example(f"{name}: {word}\nAnswer:", labels[i % 2])

    return Task(name, tuple(map(example, range(24))), tuple(map(example, range(12))), labels)


@pytest.fixture(scope="session")
def stream() -> list[Task]:
    """Two tasks; the labels of one take a single token and those of the other several."""
    return [_task("xx", (" yes", " no")), _task("yy", (" no", " positive"))]


@pytest.fixture(scope="session")
def opposed(stream: list[Task]) -> list[Task]:
    """Two tasks of the same questions, of which one is always answered with yes and the other always with no."""
    rows = [[Example(e.prompt, answer) for e in stream[0].train] for answer in stream[0].labels]
    names = ("agreeing", "refusing")
    return [Task(name, tuple(told), tuple(told[:6]), stream[0].labels) for name, told in zip(names, rows, strict=True)]


@pytest.fixture
def teach(tiny_llama: Any, tiny_tokenizer: Any, stream: list[Task], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`teach(method, out, model=..., **options)`: the method's entry in the results of the stream, without times.

    An option of None is left out, for methods that do not know it.
    """

    def run(method: Any, out: str, model: Any = None, stop_in: int | None = None, **options: Any) -> dict[str, Any]:
        chosen = {name: value for name, value in (QUICK | options).items() if value is not None}
        asked = {"out": tmp_path / out, "options": chosen, "tokenizer": tiny_tokenizer, "seed": 3}
        base = tiny_llama(1) if model is None else model
        if stop_in is not None:
            with pytest.raises(StoppedError):
                learn(base, stream, method, **asked, progress=_stopper(stop_in))
            base, asked["resume"] = tiny_llama(1), True
        entry = next(iter(learn(base, stream, method, **asked).results["methods"].values()))
        entry = json.loads(json.dumps(entry))
        return {key: value for key, value in entry.items() if not key.endswith(("seconds", "seconds_by_task"))}

    return run


def _stopper(index: int) -> Callable[..., None]:
    """Stops a run in the middle of the training of task number `index`."""
    at: dict[str, int] = {}

    def progress(event: str, **details: Any) -> None:
        if event == "train":
            at["index"] = details["index"]
        if event == "step" and at["index"] == index and details["step"] == 3:
            raise StoppedError

    return progress
