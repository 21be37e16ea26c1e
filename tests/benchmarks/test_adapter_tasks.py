"""What benchmarks/adapters.py measures: BLEU by hand, losses row by row, and no meaning on both sides of a split."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def tasks(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import adapter_tasks

    return adapter_tasks


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        # 5/6 · 4/5 · 3/4 · 2/3 = 1/3
        ("a b c d e f", ["a b c d x y", "a b c d e"], 100 * (1 / 3) ** 0.25),
        # "a" counts once: 4/5 · 3/4 · 2/3 · 1/2
        ("a a b c d", ["a b c d"], 100 * 0.2**0.25),
        # all n-grams are right, and the answer is too short: exp(1 - 6/4)
        ("A b c D", ["a b c d e f"], 100 * 0.6065306597),
        # as near to 4 as to 6 words: the shorter counts
        ("a b c d e", ["a b c d", "a b c d e f"], 100.0),
        ("a b c x", ["a b c d"], 0.0),
    ],
)
def test_bleu_is_the_papers(tasks, answer, references, expected):
    assert tasks.bleu([answer], [references]) == pytest.approx(expected)


def test_bleu_adds_up_counts_over_the_corpus(tasks):
    # with the two answers above: 9/11 · 7/9 · 5/7 · 3/5, no mean of the two scores
    both = tasks.bleu(["a b c d e f", "a a b c d"], [["a b c d x y", "a b c d e"], ["a b c d"]])
    assert both == pytest.approx(100 * (3 / 11) ** 0.25)


@pytest.fixture
def data(tmp_path) -> Path:
    (tmp_path / "e2e").mkdir()
    (tmp_path / "math").mkdir()

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))

    meanings = [f"name[n{i}], eatType[pub]" for i in range(20)]
    write("e2e/e2e_train.jsonl", [{"mr": m, "ref": f"{m[5:7]} {k}"} for m in meanings for k in range(3)])
    write("e2e/e2e_test.jsonl", [{"mr": "name[z], eatType[pub]", "refs": ["z is a pub.", "a pub: z"]}])
    sums = [{"instruction": f"{i} + 1?", "output": f"One more. The answer is {i + 1}."} for i in range(30)]
    write("math/math_instruct_train.jsonl", [*sums, {"instruction": "?", "output": "nobody knows"}])
    write("math/math_instruct_test.jsonl", sums[:7])
    return tmp_path


def test_no_meaning_is_on_both_sides_and_each_prompt_has_all_its_references(tasks, data, tiny_tokenizer):
    task = tasks.load_task("e2e", data, tiny_tokenizer, tasks.Sizes(99, 99, 99, 200))
    sides = [{row.prompt for row in rows} for rows in (task.train, task.validation)]
    assert [len(side) for side in sides] == [18, 2]
    assert not sides[0] & sides[1]
    assert tiny_tokenizer.decode(task.test[0].prompt) == "name : z | eatType : pub\n"
    assert sorted(task.asked[0].references) == ["a pub: z", "z is a pub."]
    assert len(task.test) == 2


def test_a_problems_answer_is_right_where_greedy_generation_gives_it(tasks, data, tiny_llama, tiny_tokenizer):
    task = tasks.load_task("math", data, tiny_tokenizer, tasks.Sizes(20, 5, 7, 200))
    assert (len(task.train), len(task.validation), len(task.test)) == (20, 5, 7)
    row = task.test[0]
    assert tiny_tokenizer.decode(row.answer[-1 - row.checked : -1]) == " 1."
    model = tiny_llama(3)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    # some problems are learnt by heart, the others are not
    for _ in range(60):
        model(**tasks.batch_of(task.test[:3], task, 1, model.device)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    right, total, count = 0, 0.0, 0
    for row in task.test:
        cut = len(row.answer) - 1 - row.checked
        ids = torch.tensor([row.prompt + row.answer[:cut]])
        out = model.generate(input_ids=ids, max_new_tokens=row.checked, do_sample=False)
        right += tuple(out[0, ids.shape[1] :].tolist()) == row.answer[cut:-1]
        alone = tasks.batch_of([row], task, 1, model.device)
        total += model(**alone).loss.item() * len(row.answer)
        count += len(row.answer)
    found = tasks.measured(model, task, tiny_tokenizer, task.test, batch=4, generate=False)
    assert 0 < right < 7, "the check needs right and wrong answers"
    assert found["score"] == pytest.approx(100 * right / 7)
    assert found["loss"] == pytest.approx(total / count, rel=1e-5)


def test_each_row_is_trained_once_a_pass(tasks, data, tiny_tokenizer):
    task = tasks.load_task("math", data, tiny_tokenizer, tasks.Sizes(12, 5, 7, 200))
    first, again, other = (tasks.training_rows(task, 8, seed) for seed in (1, 1, 2))
    three = [next(first) for _ in range(3)]
    assert Counter(row for rows in three for row in rows) == Counter(dict.fromkeys(task.train, 2))
    assert [next(again) for _ in range(3)] == three
    assert next(other) != three[0]


def test_a_long_row_keeps_its_answer(tasks):
    row = tasks._fitted(tasks.Row(tuple(range(9)), (50, 51, 52)), tasks.Sizes(1, 1, 1, 5))
    assert (row.prompt, row.answer) == ((7, 8), (50, 51, 52))
    row = tasks._fitted(tasks.Row(tuple(range(9)), (50, 51, 52, 53)), tasks.Sizes(1, 1, 1, 3))
    assert (row.prompt, row.answer) == ((8,), (52, 53))
