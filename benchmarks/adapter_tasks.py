"""Tasks of benchmarks/adapters.py: real data as token ids, batches of it, and how well a model does on them."""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

IGNORED = -100
ANSWER = "The answer is"
LONGEST_ANSWER = 64  # tokens generated for BLEU


@dataclass(frozen=True)
class Row:
    """One example as token ids: a text with its label, or a prompt with its answer.

    Args:
        prompt: The text, or the prompt.
        answer: Tokens that are learnt; empty for a text with a label.
        label: Index of the label.
        checked: How many tokens before the end of text make up the final answer of a problem.
        references: All human answers to the prompt, where it stands for all of them.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...] = ()
    label: int = 0
    checked: int = 0
    references: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """Training, held-out training, and test rows.

    Args:
        name: As on the command line.
        measure: What the score counts, in percent.
        labels: How many; 0 where the answer is text.
        asked: Prompts with all their references, for generation.
    """

    name: str
    measure: str
    train: list[Row]
    validation: list[Row]
    test: list[Row]
    labels: int = 0
    asked: tuple[Row, ...] = ()


@dataclass(frozen=True)
class Sizes:
    """How much of the data is used: rows, and tokens of a row."""

    train: int
    validation: int
    test: int
    length: int


def load_task(name: str, data: Path, tokenizer: PreTrainedTokenizerBase, sizes: Sizes) -> Task:
    """`e2e`, `math`, or a task of glue/tasks.json that has labels."""
    if name == "e2e":
        return _e2e(data / "e2e", tokenizer, sizes)
    if name == "math":
        return _math(data / "math", tokenizer, sizes)
    table = json.loads((data / "glue" / "tasks.json").read_text())
    known = [key for key, entry in table.items() if entry.get("labels")]
    if name not in known:
        raise SystemExit(f"there is no task '{name}'; there are e2e, math, {', '.join(known)}")

    def row(entry: dict[str, Any]) -> Row:
        text = "\n".join(entry[key] for key in ("sentence1", "sentence2") if key in entry)
        return Row(_ids(tokenizer, text)[: sizes.length], label=entry["label"])

    parts = _parts(*(_lines(data / "glue" / f"{name}_{split}.jsonl") for split in ("train", "test")), sizes)
    train, validation, test = ([row(entry) for entry in part] for part in parts)
    return Task(name, "accuracy", train, validation, test, labels=len(table[name]["labels"]))


def _e2e(folder: Path, tokenizer: PreTrainedTokenizerBase, sizes: Sizes) -> Task:
    end = (tokenizer.eos_token_id,)

    def row(meaning: str, reference: str, references: tuple[str, ...] = ()) -> Row:
        pairs = re.findall(r"(\w[\w ]*)\[([^\]]*)\]", meaning)
        prompt = _ids(tokenizer, " | ".join(f"{key} : {value}" for key, value in pairs) + "\n")
        return _fitted(Row(prompt, _ids(tokenizer, f" {reference}") + end, references=references), sizes)

    read = [(entry["mr"], entry["ref"]) for entry in _lines(folder / "e2e_train.jsonl")]
    # by meaning, so that none is on both sides
    meanings = sorted({meaning for meaning, _ in read})
    random.Random(0).shuffle(meanings)
    held = set(meanings[: max(1, len(meanings) // 10)])
    validation = [pair for pair in read if pair[0] in held][: sizes.validation]
    train = [pair for pair in read if pair[0] not in held][: sizes.train]
    tested = _lines(folder / "e2e_test.jsonl")
    pairs = [(entry["mr"], reference) for entry in tested for reference in entry["refs"]]
    random.Random(0).shuffle(pairs)
    random.Random(0).shuffle(tested)
    asked = tuple(row(e["mr"], e["refs"][0], tuple(e["refs"])) for e in tested[: max(1, sizes.test // 2)])
    rows = ([row(*pair) for pair in part] for part in (train, validation, pairs[: sizes.test]))
    return Task("e2e", "BLEU", *rows, asked=asked)


def _math(folder: Path, tokenizer: PreTrainedTokenizerBase, sizes: Sizes) -> Task:
    end = (tokenizer.eos_token_id,)

    def row(entry: dict[str, Any]) -> Row:
        working, found, final = entry["output"].rpartition(ANSWER)
        prompt, last = _ids(tokenizer, f"{entry['instruction']}\n"), _ids(tokenizer, final.rstrip())
        return _fitted(Row(prompt, _ids(tokenizer, working + found) + last + end, checked=len(last)), sizes)

    read = (_lines(folder / f"math_instruct_{split}.jsonl") for split in ("train", "test"))
    parts = _parts(*([entry for entry in entries if ANSWER in entry["output"]] for entries in read), sizes)
    train, validation, test = ([row(entry) for entry in part] for part in parts)
    return Task("math", "answers right", train, validation, test)


def _parts(train: list[dict[str, Any]], test: list[dict[str, Any]], sizes: Sizes) -> tuple[list[dict[str, Any]], ...]:
    """Training, held-out and test entries; what is held out is drawn from the training entries, always the same."""
    random.Random(0).shuffle(train)
    return train[sizes.validation :][: sizes.train], train[: sizes.validation], test[: sizes.test]


def _fitted(row: Row, sizes: Sizes) -> Row:
    """A row that is too long loses the beginning of its prompt, then of its answer."""
    room = max(1, sizes.length - len(row.answer))
    return Row(row.prompt[-room:], row.answer[1 - sizes.length :], row.label, row.checked, row.references)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _lines(path: Path) -> list[dict[str, Any]]:
    # not splitlines: some texts hold other signs that it takes for the end of a line
    return [json.loads(line) for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n")]


def batch_of(rows: Sequence[Row], task: Task, pad: int, device: torch.device) -> dict[str, Tensor]:
    """Input ids and mask, padded on the right, and labels: of the texts, or of the answers' tokens."""
    ids = [torch.tensor(row.prompt + row.answer) for row in rows]
    whole = {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
        "attention_mask": pad_sequence([torch.ones_like(one) for one in ids], batch_first=True),
    }
    if task.labels:
        whole["labels"] = torch.tensor([row.label for row in rows])
    else:
        learnt = [torch.tensor((IGNORED,) * len(row.prompt) + row.answer) for row in rows]
        whole["labels"] = pad_sequence(learnt, batch_first=True, padding_value=IGNORED)
    return {key: value.to(device) for key, value in whole.items()}


def training_rows(task: Task, batch: int, seed: int) -> Iterator[list[Row]]:
    """Batches without end, each row once a pass, in an order that depends on the seed and the task alone."""
    draw = random.Random(f"{seed}:{task.name}")
    queue: list[Row] = []
    while True:
        while len(queue) < batch:
            queue += draw.sample(task.train, len(task.train))
        yield queue[:batch]
        queue = queue[batch:]


@torch.no_grad()
def measured(
    model: Any, task: Task, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], batch: int, generate: bool
) -> dict[str, float]:
    """The mean loss (an example's, or a token's) and the score in percent, which is 0 where BLEU is not asked for."""
    model.eval()
    total, count, right = 0.0, 0, 0
    for start in range(0, len(rows), batch):
        chunk = rows[start : start + batch]
        inputs = batch_of(chunk, task, tokenizer.pad_token_id, model.device)
        labels = inputs.pop("labels")
        logits = model(**inputs).logits.float()
        if task.labels:
            right += int((logits.argmax(-1) == labels).sum())
        else:
            logits, labels = logits[:, :-1], labels[:, 1:]
            right += _answered(logits.argmax(-1) == labels, labels, chunk)
        total += float(cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum"))
        count += int((labels != IGNORED).sum())
    score = 100 * right / len(rows)
    if task.asked:
        score = (
            bleu(generated(model, task, tokenizer, batch), [row.references for row in task.asked]) if generate else 0
        )
    return {"loss": total / count, "score": score}


def _answered(hits: Tensor, labels: Tensor, rows: Sequence[Row]) -> int:
    """In how many rows all the checked tokens, those before the end of text, are the most likely ones."""
    last = (labels != IGNORED).int().cumsum(1).argmax(1).tolist()
    return sum(bool(hits[i, last[i] - row.checked : last[i]].all()) for i, row in enumerate(rows) if row.checked)


def generated(model: Any, task: Task, tokenizer: PreTrainedTokenizerBase, batch: int) -> list[str]:
    """Greedy answers to the task's prompts."""
    answers, pad = [], tokenizer.pad_token_id
    for start in range(0, len(task.asked), batch):
        prompts = [row.prompt for row in task.asked[start : start + batch]]
        longest = max(map(len, prompts))
        ids = torch.tensor([(pad,) * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
        mask = torch.tensor(
            [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device
        )
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=LONGEST_ANSWER, do_sample=False, use_cache=True
        )
        answers += tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
    return answers


def bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU-4 in percent (Papineni et al. 2002) over lower-cased words and signs, no smoothing.

    exp(min(0, 1 - r/c) + mean over n = 1 ... 4 of log p_n): p_n is the share of n-grams that are in a reference, each
    as often at most as in the reference that has most of it; c is the answers' length, and r that of the references
    nearest to it (the shorter of two).
    """
    hits, counts, length, wanted = [0] * 4, [0] * 4, 0, 0
    for answer, known in zip(answers, references, strict=True):
        words, others = _words(answer), [_words(reference) for reference in known]
        length += len(words)
        wanted += min((len(other) for other in others), key=lambda size: (abs(size - len(words)), size))
        for n in range(1, 5):
            own = _grams(words, n)
            most: Counter[tuple[str, ...]] = Counter()
            for other in others:
                most |= _grams(other, n)
            hits[n - 1] += sum((own & most).values())
            counts[n - 1] += sum(own.values())
    if 0 in hits:
        return 0.0
    precision = sum(math.log(hit / count) for hit, count in zip(hits, counts, strict=True)) / 4
    return 100 * math.exp(min(0.0, 1 - wanted / length) + precision)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


def _grams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
