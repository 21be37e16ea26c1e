"""EMR and TALL masks: what each task is served, what is stored, consensus; and masks in bits."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from folklora.merge import common_scale, consensus, emr, tall, task_arithmetic, tsv_c
from folklora.merge.bits import pack, unpack

CLOSE = {"rtol": 0, "atol": 1e-6}


@pytest.fixture
def tasks(normal, around):
    base = normal(9, 7)
    models = around(base, 4, scale=1.0)
    return base, models, [model - base for model in models]


@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (3, 5), (2, 3, 4)])
def test_bits_come_back(shape, normal):
    mask = normal(*shape) > 0
    assert pack(mask).dtype == torch.uint8
    assert len(pack(mask)) == (mask.numel() + 7) // 8
    assert torch.equal(unpack(pack(mask), mask.shape), mask)


def test_emr_has_each_tasks_signs_and_size(tasks):
    base, models, changes = tasks
    merged = emr(models, base)
    for i, change in enumerate(changes):
        own = merged.for_task(i) - base
        active = own.abs() > 1e-6
        assert torch.equal(own.sign()[active], change.sign()[active])
        # the scale makes the sum of magnitudes the task's own
        torch.testing.assert_close(own.abs().sum(), change.abs().sum(), rtol=1e-5, atol=0)


def test_emr_by_hand():
    base = torch.zeros(3)
    merged = emr([torch.tensor([1.0, 2.0, 0.0]), torch.tensor([2.0, -1.0, 3.0])], base)
    assert merged.unified.tolist() == [2.0, 2.0, 3.0]
    torch.testing.assert_close(merged.for_task(0), torch.tensor([2.0, 2.0, 0.0]) * 3 / 4, **CLOSE)
    torch.testing.assert_close(merged.for_task(1), torch.tensor([2.0, 0.0, 3.0]) * 6 / 5, **CLOSE)


def test_emrs_unified_delta_is_the_largest_that_agrees(tasks):
    base, models, changes = tasks
    stacked = torch.stack(changes)
    sign = torch.where(stacked.sum(0) > 0, 1.0, -1.0)
    expected = torch.where(stacked * sign > 0, stacked.abs(), 0.0).amax(0) * sign
    torch.testing.assert_close(emr(models, base).unified, expected, **CLOSE)


def test_one_scale_for_all_tensors_of_a_model(tasks, normal, around):
    base, models, _ = tasks
    other = normal(6)
    others = around(other, 4)
    parts = [emr(models, base), emr(others, other)]
    whole = emr(
        [torch.cat([a.flatten(), b]) for a, b in zip(models, others, strict=True)], torch.cat([base.flatten(), other])
    )
    for i in range(4):
        served = torch.cat([part.for_task(i).flatten() for part in common_scale(parts)])
        torch.testing.assert_close(served, whole.for_task(i), rtol=0, atol=1e-5)


def test_tall_serves_the_sum_where_it_is_the_tasks(tasks):
    base, models, changes = tasks
    total = sum(changes)
    merged = tall(models, base, mu=[0.2, 0.3, 0.4, 0.5])
    for i, mu in enumerate([0.2, 0.3, 0.4, 0.5]):
        mask = changes[i].abs() > mu * (total - changes[i]).abs()
        torch.testing.assert_close(merged.for_task(i) - base, total * mask, rtol=0, atol=1e-5)
    strict = tall(models, base, mu=[0.6]).delta(0)
    assert int((strict != 0).sum()) < int((tall(models, base, mu=[0.2]).delta(0) != 0).sum())


def test_consensus_keeps_what_enough_tasks_need(tasks):
    base, models, changes = tasks
    total = sum(changes)
    needed = sum((change.abs() > 0.4 * (total - change).abs()).int() for change in changes)
    for agreement in range(6):
        change = consensus(models, base, agreement=agreement, lambda_=0.3) - base
        torch.testing.assert_close(change, 0.3 * total * (needed >= agreement), rtol=0, atol=1e-6)
    torch.testing.assert_close(consensus(models, base, agreement=0), task_arithmetic(models, base), rtol=0, atol=1e-5)
    assert torch.equal(consensus(models, base, agreement=5), base)


@pytest.mark.parametrize("method", [emr, tall, tsv_c])
def test_what_is_stored_serves_the_same(tasks, method, tmp_path):
    base, models, _ = tasks
    merged = method(models, base)
    save_file({name: tensor.contiguous() for name, tensor in merged.state().items()}, tmp_path / "state.safetensors")
    again = type(merged).of_state(base, load_file(tmp_path / "state.safetensors"))
    for i in range(4):
        assert torch.equal(again.for_task(i), merged.for_task(i))


def test_a_mask_costs_a_bit_an_entry(tasks):
    base, models, _ = tasks
    assert emr(models, base).masks.shape == (4, 8)  # 63 entries
    assert tall(models, base).masks.shape == (4, 8)
