"""What benchmarks/long_stream.py records of each task, and the tables and plots that it makes of that."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def long_stream(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import long_stream

    return long_stream


def test_tasks_are_as_many_and_as_small_as_asked_for(long_stream):
    tasks = long_stream.long_stream(12, 8, 2)
    assert len({task.name for task in tasks}) == 12
    assert {(len(task.train), len(task.test)) for task in tasks} == {(8, 2)}
    assert tasks[0].train != tasks[5].train
    assert tasks[0].name.rpartition("-")[0] == tasks[5].name.rpartition("-")[0]


def test_every_task_of_a_method_is_recorded(long_stream, tmp_path):
    options = argparse.Namespace(
        out=tmp_path, tasks=3, train_rows=8, test_rows=1, evaluate="last", rank=2, targets=["q_proj"]
    )
    assert "inc-lora" in long_stream.learn_one("inc-lora", options)
    (file,) = tmp_path.glob("long-*.json")
    record = json.loads(file.read_text())
    rows = record["tasks"]
    assert [row["stored_parameters"] for row in rows] == [n * 4 * 2 * 512 for n in (1, 2, 3)]
    assert all(row["train_seconds"] > 0 and row["memory"] > 2**26 for row in rows)
    assert [row["evaluate_seconds"] > 0.005 for row in rows] == [False, False, True]
    assert record["average_accuracy"] is not None
    long_stream.write_report(tmp_path)
    (line,) = (line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("| inc-lora"))
    # a task stores 4 layers of 2 (256 + 256) float32 numbers
    assert line.endswith("| 16 |")
    assert "<svg" in (tmp_path / "costs.svg").read_text()


def test_moments_are_those_of_tasks_that_were_learnt(long_stream):
    times = dict.fromkeys((f"{part}_seconds" for part in long_stream.TIMES), 0.0)
    tasks = [
        {**times, "processor_seconds": n, "memory": 2**20 * n, "stored_parameters": 1000 * n} for n in range(1, 51)
    ]
    found = [{"method": "long", "tasks": tasks}, {"method": "short", "tasks": tasks[:10]}]
    heads, _, long, short = long_stream.moments(found)
    assert "task 50, CPU s" in heads
    assert "100" not in heads
    # the median of tasks 6 to 10, and of 46 to 50
    assert long == "| long | 8.00 | 48.00 | 1 | 9.0 | 49.0 | 1,000 | 10,000 | 50,000 |"
    assert short == "| short | 8.00 |  | 1 | 9.0 |  | 1,000 | 10,000 |  |"
