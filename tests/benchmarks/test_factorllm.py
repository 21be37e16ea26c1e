"""What benchmarks/factorllm.py cuts from the tokens, and how it times."""

from __future__ import annotations

import argparse
import lzma
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def factorllm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import factorllm

    return factorllm


def test_the_first_tokens_are_cut_from_low_and_high_bytes(factorllm: ModuleType, tmp_path: Path) -> None:
    tokens = torch.randint(0, 16384, (50,), generator=torch.Generator().manual_seed(0))
    low, high = bytes((tokens % 256).tolist()), bytes((tokens // 256).tolist())
    (tmp_path / "train.bin.xz").write_bytes(lzma.compress(low + high))
    (tmp_path / "valid.bin").write_bytes(bytes(range(40)))
    out = tmp_path / "cut"
    out.mkdir()
    factorllm.cut(argparse.Namespace(data=tmp_path, out=out), train=30, valid=5)
    assert torch.equal(factorllm.tokens_of(out / "train.bin"), tokens[:30])
    assert factorllm.tokens_of(out / "valid.bin").tolist() == [256 * (2 * i + 1) + 2 * i for i in range(5)]


def test_a_ratio_is_to_the_first_one_of_the_same_round(factorllm: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import factorllm_speed

    # each round is slower than the one before, and the second takes three times the first's time
    clock, round_ = [0.0], [0]

    def first() -> None:
        round_[0] += 1
        clock[0] += round_[0]

    def second() -> None:
        clock[0] += 3 * round_[0]

    monkeypatch.setattr(factorllm_speed, "now", lambda: clock[0])
    found = factorllm_speed.timed({"dense": first, "K=1": second, "K=2": "no graph"}, 5)
    assert found["K=1"]["ratio"] == found["K=1"]["low"] == found["K=1"]["high"] == 3
    assert found["dense"]["ms"] == 1000 * (factorllm_speed.WARMUPS + 3)
    assert found["K=2"] == {"failed": "no graph"}
