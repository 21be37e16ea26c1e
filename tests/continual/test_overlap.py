"""How far adapters read the same: closed forms of the overlap, what random rows have, and what a run tells of it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from folklora import KaSA, LoRA, LoRAXS
from folklora.adapters.host.layer import layers_of
from folklora.continual import SLM, IncLoRA
from folklora.continual.overlap import reading_overlap
from folklora.spectrum import row_overlap

# sums of squares of float64 rows, as many as a row is long, of bases whose condition is below 100
CLOSE = 32 * 100**2 * torch.finfo(torch.float64).eps


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_angles(rows, others):
    """The mean squared cosine of the principal angles, these being singular values of the bases' product."""
    first, second = (torch.linalg.qr(matrix.detach().double().T)[0] for matrix in (rows, others))
    return torch.linalg.svdvals(first.T @ second).square().mean()


def test_known_angles_whatever_the_rows_lengths_and_the_basis():
    e = torch.linalg.qr(normal(9, 9))[0]
    angles = torch.tensor([0.2, 1.1, math.pi / 2], dtype=torch.float64)
    turned = angles.cos().unsqueeze(1) * e[:3] + angles.sin().unsqueeze(1) * e[3:6]
    expected = angles.cos().square().mean()
    torch.testing.assert_close(row_overlap(e[:3], turned), expected, rtol=0, atol=CLOSE)
    mixed, scaled = normal(3, 3, seed=1) @ e[:3], 1e-4 * normal(3, 3, seed=2) @ turned
    torch.testing.assert_close(row_overlap(mixed, scaled), expected, rtol=0, atol=CLOSE)
    torch.testing.assert_close(row_overlap(scaled, mixed), by_angles(mixed, scaled), rtol=0, atol=CLOSE)
    # orthogonal, the same space, one within the other
    for others, value in ((e[3:5], 0.0), (mixed, 1.0), (e[:2], 1.0), (e[2:5], 1 / 3)):
        assert row_overlap(e[:3], others).item() == pytest.approx(value, abs=CLOSE)


def test_rows_that_span_less_than_they_are_many_and_batches():
    e = torch.linalg.qr(normal(9, 9))[0]
    twice = torch.stack([e[0], 2 * e[0], torch.zeros(9)])
    assert row_overlap(twice, e[:2]).item() == pytest.approx(1.0, abs=CLOSE)
    assert row_overlap(twice, e[1:3]).item() == pytest.approx(0.0, abs=CLOSE)
    assert row_overlap(torch.zeros(2, 9), e[:2]).item() == 0
    one, many = normal(2, 9, seed=3), normal(5, 4, 9, seed=4)
    each = torch.stack([by_angles(one, others) for others in many])
    torch.testing.assert_close(row_overlap(one, many), each, rtol=0, atol=CLOSE)
    with pytest.raises(ValueError, match="must be a matrix"):
        row_overlap(one, one[0])


@pytest.mark.parametrize("r", [3, 6])
def test_random_rows_overlap_by_their_rank_over_the_width(r):
    found = row_overlap(normal(4000, r, 20), normal(4000, 3, 20, seed=1))
    # five standard errors of the mean
    assert abs(found.mean() - r / 20) < 5 * found.std() / math.sqrt(4000)


def three(model, method):
    torch.manual_seed(0)
    adapted = method.start(model)
    for index in range(3):
        method.prepare(adapted, None, [], index)
    return adapted


def test_a_task_is_set_beside_all_earlier_ones_in_every_layer(tiny_llama):
    method = IncLoRA(adapter=LoRA(r=3, target_modules=["q_proj", "down_proj"]))
    model = three(tiny_llama(), method)
    assert method.measures(model, 0) == {}
    found = method.measures(model, 2)
    layers = [layer.folklora_updates for layer in layers_of(model)]
    pairs = [(updates["task_2"].A, updates[f"task_{i}"].A) for updates in layers for i in range(2)]
    expected = sum(by_angles(*pair).item() for pair in pairs) / len(pairs)
    # written with six digits, of float32 rows
    assert found["reading_overlap"] == pytest.approx(expected, abs=1e-6)
    widths = [A.shape[1] for A, _ in pairs]
    assert len(set(widths)) == 2
    assert found["reading_overlap_by_chance"] == pytest.approx(
        sum(3 / width for width in widths) / len(pairs), abs=1e-6
    )


def test_several_adapters_a_task_other_ranks_and_adapters_without_such_rows(tiny_llama):
    method = SLM(adapter=LoRA(r=2, target_modules=["q_proj"]), keys_per_task=2)
    model = method.start(tiny_llama())
    method.prepare = super(SLM, method).prepare
    method.prepare(model, None, [], 0)
    method.prepare(model, None, [], 1)
    model.add_adapter("wide", LoRA(r=5, target_modules=["q_proj"]))
    pairs = list(itertools.product(("task_1_key_0", "task_1_key_1"), ("task_0_key_0", "task_0_key_1", "wide")))
    each = [
        by_angles(layer.folklora_updates[a].A, layer.folklora_updates[b].A)
        for layer in layers_of(model)
        for a, b in pairs
    ]
    found = reading_overlap(model, ["task_1_key_0", "task_1_key_1"], ["task_0_key_0", "task_0_key_1", "wide"])
    assert found["reading_overlap"] == pytest.approx(float(sum(each)) / len(each), abs=1e-6)
    assert found["reading_overlap_by_chance"] == pytest.approx((2 + 2 + 5) / 3 / 32, abs=1e-6)
    frozen = IncLoRA(adapter=LoRAXS(r=2, target_modules=["q_proj"]))
    assert frozen.measures(three(tiny_llama(), frozen), 2) == {}, "its A is the base's, the same for all tasks"


def test_a_run_keeps_it_by_task_and_a_heavy_penalty_lowers_it(teach, tmp_path):
    plain, heavy = teach("inc-lora", "inc"), teach("o-lora", "o", lambda_1=50.0, ortho_norm="l2")
    assert teach("seq-lora", "seq")["measures_by_task"] == [{}, {}]
    first, second = plain["measures_by_task"]
    assert first == {}
    assert second["reading_overlap_by_chance"] == 2 / 32
    assert heavy["measures_by_task"][1]["reading_overlap"] < second["reading_overlap"] / 2
    page = (tmp_path / "inc" / "report.html").read_text(encoding="utf-8")
    row = page.split('<tr><th scope="row">inc-lora</th><td class="text">reading overlap</td>')[1].split("</tr>")[0]
    assert row == f"<td>–</td><td>{second['reading_overlap']:.3g}</td>"
    assert "What methods measured of themselves" not in (tmp_path / "seq" / "report.html").read_text(encoding="utf-8")


def test_it_is_of_what_is_trained_where_an_adapter_has_frozen_parts_too(tiny_llama):
    method = IncLoRA(adapter=KaSA(r=2, target_modules=["v_proj"]))
    model = three(tiny_llama(), method)
    pairs = [(u["task_1"].A, u["task_0"].A) for u in (layer.folklora_updates for layer in layers_of(model))]
    expected = sum(by_angles(*pair).item() for pair in pairs) / len(pairs)
    assert method.measures(model, 1)["reading_overlap"] == pytest.approx(expected, abs=1e-6)


def test_of_training_that_diverged_there_is_nothing_to_measure(tiny_llama):
    method = IncLoRA(adapter=LoRA(r=2, target_modules=["q_proj", "v_proj"]))
    model = three(tiny_llama(), method)
    whole = method.measures(model, 2)
    for number, layer in enumerate(layers_of(model)):
        layer.folklora_updates["task_1"].A.data[0, number] = float("nan")
    rest = reading_overlap(model, ["task_2"], ["task_0"])
    assert method.measures(model, 2) == rest != whole
    assert method.measures(model, 1) == {}
