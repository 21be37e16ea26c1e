"""What benchmarks/vision_stream.py says of masks: a stream is learnt with them, and a change of them is noticed."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

from folklora.adapters.host.layer import updates_of

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def stream(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import vision_stream

    return vision_stream


@pytest.fixture
def tasks(stream: ModuleType) -> list:
    draw = torch.Generator().manual_seed(0)

    def rows(brightness: float) -> tuple:
        labels = torch.arange(28) % 7
        # each class is another colour, in another order of channels for the other task
        images = torch.rand(28, 3, 32, 32, generator=draw) / 10 + brightness * labels.view(-1, 1, 1, 1) / 7
        return images, labels

    return [
        stream.Domain(name, *(rows(sign) for _ in range(3)), labels=list("abcdefg"))
        for name, sign in (("light", 1.0), ("dark", -1.0))
    ]


def base_of(stream: ModuleType) -> torch.nn.Module:
    torch.manual_seed(0)
    return stream.Network(7).requires_grad_(False)


def test_masks_are_learnt_checked_and_counted(stream, tasks):
    base = base_of(stream)
    before = [weight.clone() for weight in base.parameters()]
    found = stream.learned(base, tasks, stream.masks(0.3, (3e-2, 3e-3), "always"), epochs=2, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(before, base.parameters(), strict=True))
    assert found["matrix"][0][0] == found["matrix"][1][0]
    assert found["backward_transfer"] == 0
    assert found["free"][0] == 1 > found["free"][1] > 0
    assert [len(rates) for rates in found["transfer_rates"]] == [1]
    total = sum(weight.numel() for weight in before)
    # a byte for eight entries of a mask, and float32 scores of all entries, for each task
    assert found["stored"][1][1] - found["stored"][0][1] > total * 4 + total / 8
    assert found["stored"][1][0] == found["stored"][0][0] + total * (1 + 1 / 8) + 2 * round(
        found["free"][1] * sum(w.numel() - int(0.7 * w.numel()) for w in before)
    )


def test_a_changed_answer_or_mask_is_noticed(stream, tasks):
    method, base = stream.masks(0.3, (3e-2, 3e-3), "none").make(), base_of(stream)
    model, seen = method.start(base), []
    for index in range(2):
        stream.teach(method, model, tasks, index, 1, 3e-3)
        stream.check_kept(method, model, tasks, index, seen)
    stream.check_masks(model)
    (_, update), *_ = updates_of(model, "default")
    update.values[0].data += 0.1
    with pytest.raises(RuntimeError, match="the logits of task 0 changed while task 1 was learnt"):
        stream.check_kept(method, model, tasks, 1, seen)
    update.indices[1] = update.indices[0]
    with pytest.raises(RuntimeError, match=r"task 1 trained weights of 'convolutions\.0' that are not its own"):
        stream.check_masks(model)


def test_other_methods_take_the_same_loop(stream, tasks):
    total = sum(weight.numel() for weight in base_of(stream).parameters())
    joint = stream.learned(
        base_of(stream), tasks, stream.Contender(lambda: stream.MultiTask(stream.whole()), 3e-3), 2, 0
    )
    assert joint["matrix"][0] == [None, None]
    assert joint["stored"] == [[total, 4 * total]]
    held = stream.learned(base_of(stream), tasks, stream.held(100.0, 3e-3), 2, 0)
    assert held["stored"][-1] == [3 * total, 12 * total], "an importance and an anchor each"
    runs = [{"method": name, "seed": 0, "told": False, **run} for name, run in (("joint", joint), ("ewc", held))]
    lines = stream.table({"runs": runs, "tuned": {"ewc": {"λ 1": {"score": 12.34}}}}).splitlines()
    assert lines[2].startswith(f"| joint | no | {joint['average_accuracy']:.1f} | – |")
    assert lines[-1] == "| ewc | λ 1: 12.3 |"
