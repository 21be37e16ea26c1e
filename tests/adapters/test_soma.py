"""SoMA: the start from the weakest singular triplets, against a full decomposition and PiSSA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor

from folklora import PiSSA, SoMA, early_blocks, export_lora, spectrum, tiny
from folklora.adapters.host.layer import updates_of

EPS32 = torch.finfo(torch.float32).eps
SHAPES = [(20, 32), (36, 20), (24, 24)]
SCALINGS = [(None, False, 1.0), (10.0, False, 2.5), (3.0, True, 1.5)]
R = 4


def weight_of(shape: tuple[int, ...], seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("alpha", "rslora", "scale"), SCALINGS)
def test_the_start_holds_the_weakest_triplets(shape: tuple[int, int], alpha: float, rslora: bool, scale: float):
    weight = weight_of(shape).double()
    update = SoMA(r=R, alpha=alpha, rslora=rslora).update(weight)
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    k = len(S)
    A0, B0 = update.A0.double(), update.B0.double()
    minor = scale * B0 @ A0
    torch.testing.assert_close(minor, (U[:, -R:] * S[-R:]) @ Vh[-R:], rtol=0, atol=1e-5)
    residual = weight - minor
    assert torch.linalg.matrix_norm(residual, 2).item() == pytest.approx(S[0].item(), rel=1e-5)
    assert torch.linalg.matrix_norm(minor, 2).item() == pytest.approx(S[k - R].item(), rel=1e-5)
    assert minor.square().sum().item() == pytest.approx(S[-R:].square().sum().item(), rel=1e-5)
    for product in (A0 @ A0.T, B0.T @ B0):
        torch.testing.assert_close(product, torch.diag(S[-R:] / scale), rtol=0, atol=1e-5)
    assert (U[:, : k - R].T @ B0).abs().max() < 1e-5
    assert (A0 @ Vh[: k - R].T).abs().max() < 1e-5


@pytest.mark.parametrize(("alpha", "rslora", "scale"), SCALINGS)
def test_the_start_is_the_base(alpha: float, rslora: bool, scale: float):
    update = SoMA(r=R, alpha=alpha, rslora=rslora).update(weight_of((20, 32)))
    assert torch.equal(update.A, update.A0)
    assert torch.equal(update.B, update.B0)
    assert update.scale == pytest.approx(scale)
    assert update.factors().dense().detach().abs().max() <= 4 * R * EPS32 * scale
    model = tiny.adapted(SoMA(r=R, alpha=alpha, rslora=rslora, target_modules=tiny.TARGETS))
    torch.testing.assert_close(tiny.logits(model), tiny.logits(tiny.llama()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_at_the_other_end_of_the_spectrum_it_would_be_pissa(shape: tuple[int, int]):
    # of full rank, both ends are the whole weight
    k = min(shape)
    ours, theirs = SoMA(r=k).update(weight_of(shape)), PiSSA(r=k).update(weight_of(shape))
    torch.testing.assert_close(ours.A, theirs.A, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.B, theirs.B, rtol=0, atol=1e-5)
    B, A = spectrum.balanced(spectrum.top(weight_of(shape), R), 2.5)
    theirs = PiSSA(r=R, alpha=2.5 * R).update(weight_of(shape))
    assert torch.equal(A, theirs.A)
    assert torch.equal(B, theirs.B)


@pytest.mark.parametrize("floor", [1e-6, 0.0])
def test_a_weight_without_minor_components_still_learns(floor: float):
    weight = weight_of((20, 3)) @ weight_of((3, 32), 2)
    update = SoMA(r=R, floor=floor).update(weight)
    x, goal = weight_of((50, 32), 3), weight_of((50, 20), 4)
    assert update.factors().dense().detach().abs().max() <= 4 * R * EPS32
    F.mse_loss(x @ (weight + update.factors().dense()).T, goal).backward()
    largest = torch.linalg.svdvals(weight)[0]
    if floor:
        torch.testing.assert_close(update.A0.norm(dim=1), (floor * largest).sqrt().expand(R), rtol=1e-3, atol=0)
        assert update.A.grad.norm() > 1e-4
    else:
        assert (update.A0.norm(dim=1) <= (EPS32 * largest).sqrt()).all()
    # a weight that has them is taken as it is
    assert torch.equal(SoMA(r=R, floor=floor).update(goal).A, SoMA(r=R).update(goal).A)


def test_weight_decay_takes_the_minor_components_out():
    update = SoMA(r=R).update(weight_of((20, 32)))
    optimizer = torch.optim.SGD([update.A, update.B], lr=1.0, weight_decay=1.0)
    for parameter in (update.A, update.B):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(update.factors().dense(), -(update.B0 @ update.A0), rtol=0, atol=1e-6)


def test_what_is_trained_and_where():
    base = tiny.llama(layers=3)
    excluded = early_blocks(base, 2)
    config = SoMA(r=R, target_modules="all-linear", exclude_modules=excluded, modules_to_save=["lm_head"])
    model = get_peft_model(base, config)
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    targets = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    targets += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    expected = {
        f"base_model.model.model.layers.2.{target}.folklora_updates.default.{factor}"
        for target in targets
        for factor in "AB"
    }
    assert trained == expected | {"base_model.model.lm_head.modules_to_save.default.weight"}


def test_trainable_count_of_vit_large():
    config = SoMA(r=16)
    block = 4 * config.trainable_count((1024, 1024)) + 2 * config.trainable_count((4096, 1024))
    assert 16 * block == 4718592


def test_it_merges_exports_and_reloads(tmp_path: Path):
    model = tiny.trained(SoMA(r=R, alpha=6.0, target_modules=tiny.TARGETS))
    before = tiny.logits(model)
    assert set(export_lora(model, tmp_path / "lora").values()) == {2 * R}
    model.save_pretrained(tmp_path)
    with tiny.NoDecomposition():
        loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert isinstance(loaded.peft_config["default"], SoMA)
    assert torch.equal(tiny.logits(loaded), before)
    model.merge_adapter()
    torch.testing.assert_close(tiny.logits(model), before, rtol=0, atol=1e-4)
    for (_, one), (_, other) in zip(updates_of(model, "default"), updates_of(loaded, "default"), strict=True):
        assert torch.equal(one.A0, other.A0)


def test_options_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="floor"):
        SoMA(floor=1.0)
    with pytest.raises(ValueError, match="SoMA takes no dropout"):
        SoMA(dropout=0.1)
