"""What the tests of continual methods share: two small tasks that contradict each other, a model, a stopped run."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from folklora import learn
from folklora.stream.tasks import Example, Task
from folklora.stream.tokens import IGNORED, encode

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
    """The two tasks with the same answers the other way round, a token each, which few steps suffice to learn."""

    def plain(example: Example) -> Example:
        return replace(example, completion=example.completion.replace(" positive", " yes"))

    first, second = stream
    train, test = (tuple(map(plain, rows)) for rows in (second.train, second.test))
    return [first, replace(second, train=train, test=test, labels=(" no", " yes"))]


@pytest.fixture(scope="session")
def contradicting(stream: list[Task]) -> list[Task]:
    """Two tasks of the same questions, of which one is always answered with yes and the other always with no."""
    rows = [[Example(e.prompt, answer) for e in stream[0].train] for answer in stream[0].labels]
    names = ("agreeing", "refusing")
    return [Task(name, tuple(told), tuple(told[:6]), stream[0].labels) for name, told in zip(names, rows, strict=True)]


@pytest.fixture
def teach(
    tiny_llama: Any, tiny_tokenizer: Any, stream: list[Task], bytes_on_disk: Callable[[Path], int], tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    """`teach(method, out, model=..., **options)`: the method's entry in the results of the stream, without times.

    An option of None is left out, for methods that do not know it.
    """

    def run(
        method: Any, out: str, model: Any = None, stop_in: int | None = None, phase: str = "", **options: Any
    ) -> dict[str, Any]:
        # None leaves out what a method does not know
        chosen = {key: value for key, value in (QUICK | options).items() if value is not None}
        asked = {"out": tmp_path / out, "options": chosen, "tokenizer": tiny_tokenizer, "seed": 3}
        base = tiny_llama(1) if model is None else model
        if stop_in is not None:
            with pytest.raises(StoppedError):
                learn(base, stream, method, **asked, progress=_stopper(stop_in, phase))
            base, asked["resume"] = tiny_llama(1), True
        finished = learn(base, stream, method, **asked)
        ((name, entry),) = finished.results["methods"].items()
        entry = json.loads(json.dumps(entry))
        assert entry["stored_bytes"] == bytes_on_disk(finished.state_folder(name, finished.finished(name)))
        return {key: value for key, value in entry.items() if not key.endswith(("seconds", "seconds_by_task"))}

    return run


@pytest.fixture(scope="session")
def drill(tiny_tokenizer: Any) -> Callable[..., None]:
    """`drill(model, task)`: a few steps of a new AdamW on what is trained, where a whole trainer would be slow."""

    def run(model: Any, task: Task, count: int = 4) -> None:
        rows = [encode(tiny_tokenizer, example, 48) for example in task.train]
        batch = {
            key: pad_sequence([torch.tensor(row[key]) for row in rows], batch_first=True, padding_value=blank)
            for key, blank in (("input_ids", 1), ("labels", IGNORED))
        }
        mask = batch["input_ids"] != 1
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.0)
        model.train()
        for _ in range(count):
            model(**batch, attention_mask=mask).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


def _stopper(index: int, phase: str) -> Callable[..., None]:
    """Stops a run in the middle of the training of task number `index`, in a phase if one is named."""
    at: dict[str, Any] = {}

    def progress(event: str, **details: Any) -> None:
        if event == "train":
            at.update(details)
        if event == "step" and at["index"] == index and phase in at["task"] and details["step"] == 3:
            raise StoppedError

    return progress
