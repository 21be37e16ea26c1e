"""The means over orders and seeds that benchmarks/standard_stream.py shows."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def standard_stream(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import standard_stream

    return standard_stream


def run(order: str, seed: int, accuracy: float, **more: Any) -> dict[str, Any]:
    return {"order": order, "seed": seed, "entry": {"average_accuracy": accuracy, **more}}


def test_a_seed_that_lacks_an_order_is_left_out_of_the_means(standard_stream):
    own = [run("order4", 0, 10.0), run("order5", 0, 20.0), run("order4", 1, 30.0), run("order5", 1, 50.0)]
    found = standard_stream.summarise([*own, run("order5", 2, 90.0)])
    assert found["average_accuracy"] == [15.0, 40.0]
    # all stay where each has one order, as those of methods that do not depend on it
    assert standard_stream.summarise(own[::2])["average_accuracy"] == [10.0, 30.0]


def test_a_measure_that_a_run_lacks_is_none(standard_stream):
    own = [run("order4", 0, 10.0, backward_transfer=-1.0), run("order4", 1, 30.0)]
    found = standard_stream.summarise(own)
    assert found["backward_transfer"] is None
    assert found["average_accuracy"] == [10.0, 30.0]


def test_a_rate_that_diverges_is_never_the_best(standard_stream, tmp_path):
    scores = {1e-3: {"average_accuracy": 20.0}, 1e-2: None}
    for rate, entry in scores.items():
        (tmp_path / f"tune-ewc-{rate:g}.json").write_text(json.dumps({"method": "ewc", "rate": rate, "entry": entry}))
    options = argparse.Namespace(out=tmp_path)
    assert standard_stream.best_rates(options) == {"ewc": (1e-3, 20.0)}
    (tmp_path / "tune-ewc-0.001.json").unlink()
    assert standard_stream.best_rates(options) == {}
