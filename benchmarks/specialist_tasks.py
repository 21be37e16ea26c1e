"""Tasks of benchmarks/specialists.py: seven kinds of text, all answered in words, so that one model can hold them."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from adapter_tasks import Row, Sizes, Task, batch_of, load_task, measured
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from folklora.stream.evaluate import rank_labels

TASKS = ("agnews", "dbpedia", "yelp", "sst2", "trec6", "e2e", "math")
LONGEST_TEXT = 500  # characters


@dataclass(frozen=True)
class Choice:
    """A question with its possible answers.

    Args:
        prompt: The text, with what asks for the answer.
        label: Index of the right one.
    """

    prompt: str
    label: int


@dataclass(frozen=True)
class Work:
    """A task as rows to train on, and questions of its validation and test rows.

    Args:
        task: Rows of token ids; of tasks whose answers are ranked only the training rows are used.
        answers: Possible answers, with a leading space; none where the answer is free.
        asked: By split, the questions; none where the answer is free.
    """

    task: Task
    answers: tuple[str, ...] = ()
    asked: dict[str, list[Choice]] | None = None


@lru_cache
def load_work(name: str, model: Path, data: Path, sizes: Sizes) -> tuple[Work, PreTrainedTokenizerBase]:
    """One of TASKS, and the model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    if name in ("e2e", "math"):
        return Work(load_task(name, data, tokenizer, sizes)), tokenizer
    answers, train, test = _choices(name, data)
    random.Random(0).shuffle(train)
    split = {"validation": train[: sizes.validation], "test": test[: sizes.test]}
    rows = [_row(tokenizer, choice, answers, sizes.length) for choice in train[sizes.validation :][: sizes.train]]
    return Work(Task(name, "accuracy", rows, [], []), answers, split), tokenizer


def _choices(name: str, data: Path) -> tuple[tuple[str, ...], list[Choice], list[Choice]]:
    if (data / "cl_benchmark" / name).is_dir():
        labels = json.loads((data / "cl_benchmark" / "tasks.json").read_text())["tasks"][name]["labels"]
        read = [_lines(data / "cl_benchmark" / name / f"{split}.jsonl") for split in ("train", "test")]
        parts = [[(row["text"], labels.index(row["label"])) for row in rows] for rows in read]
    else:
        labels = json.loads((data / "glue" / "tasks.json").read_text())[name]["labels"]
        read = [_lines(data / "glue" / f"{name}_{split}.jsonl") for split in ("train", "test")]
        parts = [[(row["sentence1"], row["label"]) for row in rows] for rows in read]
    train, test = ([Choice(f"{text[:LONGEST_TEXT]}\nAnswer:", label) for text, label in rows] for rows in parts)
    return tuple(f" {label}" for label in labels), train, test


def _row(tokenizer: PreTrainedTokenizerBase, choice: Choice, answers: Sequence[str], length: int) -> Row:
    texts = choice.prompt, answers[choice.label]
    prompt, answer = (tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    answer += (tokenizer.eos_token_id,)
    return Row(prompt[-(length - len(answer)) :], answer)


def _lines(path: Path) -> list[dict[str, Any]]:
    # not splitlines: some texts hold other signs that it takes for the end of a line
    return [json.loads(line) for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n")]


def score(model: Any, work: Work, tokenizer: PreTrainedTokenizerBase, split: str, batch: int) -> float:
    """Percent: right answers, BLEU (e2e), or final numbers that follow the working (math)."""
    with precision(model.device):
        if work.asked is None:
            rows = getattr(work.task, split)
            task = work.task
            if task.asked and split == "validation":
                task = replace(task, asked=_with_references(rows, tokenizer))
            return measured(model, task, tokenizer, rows, batch, generate=True)["score"]
        asked = work.asked[split]
        found = rank_labels(model, tokenizer, [c.prompt for c in asked], work.answers, batch_size=batch)
    right = found.argmax(1) == torch.tensor([choice.label for choice in asked])
    return 100 * float(right.float().mean())


def _with_references(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> tuple[Row, ...]:
    """Each prompt once, with the answers of all its rows."""
    known: dict[tuple[int, ...], list[str]] = {}
    for row in rows:
        known.setdefault(row.prompt, []).append(tokenizer.decode(row.answer, skip_special_tokens=True))
    return tuple(Row(prompt, references=tuple(answers)) for prompt, answers in known.items())


def precision(device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def base_model(options: argparse.Namespace) -> Any:
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def loaded(name: str, options: argparse.Namespace) -> tuple[Any, Any]:
    sizes = Sizes(options.train_rows, options.validation_rows, options.test_rows, options.length)
    return load_work(name, options.model, options.data, sizes)


def model_file(options: argparse.Namespace, task: str, seed: int, what: str = "model") -> Path:
    return options.out / "models" / f"{task}-seed{seed}-{what}.safetensors"


def descend(call: Any, model: Any, name: str, rows: list[Row], options: argparse.Namespace) -> None:
    """One batch's loss and its gradient."""
    task, tokenizer = loaded(name, options)
    with precision(model.device):
        loss = call(**batch_of(rows, task.task, tokenizer.pad_token_id, model.device)).loss
    loss.backward()


def draw(rows: list[Row], batch: int, seed: str) -> Iterator[list[Row]]:
    generator, queue = random.Random(seed), []
    while True:
        while len(queue) < batch:
            queue += generator.sample(rows, len(rows))
        yield queue[:batch]
        queue = queue[batch:]
