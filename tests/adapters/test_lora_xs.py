"""LoRA-XS: frozen singular factors and a trained r x r matrix, with a dense one and PEFT's TinyLoRA as oracles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, TinyLoraConfig, get_peft_model
from torch import Tensor, nn

from folklora import LoRAXS, export_lora, tiny
from folklora.adapters.host.layer import layers_of, updates_of

EPS32 = torch.finfo(torch.float32).eps
TARGETS = ["q", "v"]
R = 4


def adapted(base: nn.Module | None = None, **options: Any) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(base or tiny.TwoLayers(), LoRAXS(**{"r": R, "target_modules": TARGETS} | options))


def inputs() -> Tensor:
    return torch.randn(5, 7, 32, generator=torch.Generator().manual_seed(2))


def train(model: nn.Module) -> None:
    goal = torch.randn(5, 7, 36, generator=torch.Generator().manual_seed(9))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        F.mse_loss(model(inputs()), goal).backward()
        optimizer.step()


def assert_close32(actual: Tensor, expected: Tensor) -> None:
    # sums of at most 36 terms in each of a few layers
    tolerance = 100 * EPS32 * float(expected.detach().abs().max())
    torch.testing.assert_close(actual, expected.to(actual), rtol=0, atol=tolerance)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_factors_are_the_strongest_triplets_with_the_values_on_the_input_side(transposed: bool) -> None:
    for layer, update in updates_of(adapted(tiny.TwoLayers(transposed)), "default"):
        W = tiny.TwoLayers().get_submodule(layer.name).weight.detach().double()
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        A, B = update.A.detach().double(), update.B.detach().double()
        assert_close32(B.T @ B, torch.eye(R))
        assert_close32(A @ A.T, torch.diag(S[:R].square()))
        assert_close32(B @ A, (U[:, :R] * S[:R]) @ Vh[:R])
        assert (W - B @ A).norm().item() == pytest.approx(S[R:].norm().item(), rel=1e-4)
        # the signs of singular vectors are free, their span is not
        assert_close32(B @ B.T, U[:, :R] @ U[:, :R].T)


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (16.0, 4.0)])
def test_r_as_the_identity_adds_the_principal_part(alpha: float | None, scale: float) -> None:
    model, base = adapted(alpha=alpha), tiny.TwoLayers()
    with torch.no_grad():
        for layer, update in updates_of(model, "default"):
            assert update.scale == scale
            update.R.copy_(torch.eye(R) / scale)
            U, S, Vh = torch.linalg.svd(base.get_submodule(layer.name).weight, full_matrices=False)
            base.get_submodule(layer.name).weight += (U[:, :R] * S[:R]) @ Vh[:R]
    assert_close32(model(inputs()), base(inputs()))


def test_the_start_is_the_base_up_to_sigma() -> None:
    expected = tiny.TwoLayers()(inputs())
    drawn = adapted()
    assert 0 < (drawn(inputs()) - expected).abs().max() <= 1e-3
    R0 = torch.cat([update.R.detach().flatten() for _, update in updates_of(adapted(r=20), "default")])
    # 800 draws: the standard deviation of their standard deviation is a fortieth
    assert R0.std().item() == pytest.approx(1e-5, rel=0.15)
    exact = adapted(sigma=0.0)
    assert_close32(exact(inputs()), expected)
    assert all(update.starts_at_base for _, update in updates_of(exact, "default"))
    assert not any(update.starts_at_base for _, update in updates_of(drawn, "default"))
    exact(inputs()).square().mean().backward()
    assert all(update.R.grad.abs().max() > 0 for _, update in updates_of(exact, "default"))


def test_only_r_squared_numbers_are_trained_and_the_factors_stay() -> None:
    model = adapted()
    assert model.get_nb_trainable_parameters()[0] == 2 * R**2
    before = [(update.A.clone(), update.B.clone(), update.R.clone()) for _, update in updates_of(model, "default")]
    train(model)
    for (A, B, R0), (layer, update) in zip(before, updates_of(model, "default"), strict=True):
        assert not update.A.requires_grad
        assert not update.B.requires_grad
        assert torch.equal(update.A, A)
        assert torch.equal(update.B, B)
        assert (update.R - R0).abs().max() > 0.01
        delta = update.factors().dense().detach()
        P, Q = B @ B.T, torch.linalg.pinv(A) @ A
        assert_close32(P @ delta, delta)
        assert_close32(delta @ Q, delta)
        assert torch.linalg.matrix_rank(delta, rtol=1e-5) <= R
        assert torch.equal(layer.get_base_layer().weight, tiny.TwoLayers().get_submodule(layer.name).weight)


@pytest.mark.parametrize("transposed", [False, True])
def test_merging_and_export_compute_the_same(transposed: bool, tmp_path: Path) -> None:
    model = adapted(tiny.TwoLayers(transposed), alpha=10.0)
    train(model)
    expected = model(inputs())
    assert export_lora(model, tmp_path / "lora") == dict.fromkeys(TARGETS, R)
    assert_close32(PeftModel.from_pretrained(tiny.TwoLayers(transposed), tmp_path / "lora")(inputs()), expected)
    model.merge_adapter()
    assert_close32(model(inputs()), expected)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(inputs()), tiny.TwoLayers(transposed)(inputs()))


def test_a_trained_matrix_equals_pefts_tinylora() -> None:
    """TinyLoRA splits √S between the sides and makes R of a trained vector and fixed matrices; the product is one."""
    torch.manual_seed(3)
    theirs = get_peft_model(tiny.TwoLayers(), TinyLoraConfig(r=R, target_modules=TARGETS, u=5))
    model = adapted()
    with torch.no_grad():
        for layer, update in updates_of(model, "default"):
            other = theirs.base_model.model.get_submodule(layer.name)
            A, B = other.tinylora_A["default"], other.tinylora_B["default"]
            assert_close32(update.B @ update.A, B @ A)
            for key, value in theirs.named_parameters():
                if value.requires_grad and "tinylora" in key:
                    value.copy_(torch.randn_like(value) * 0.1)
        for layer, update in updates_of(model, "default"):
            other = theirs.base_model.model.get_submodule(layer.name)
            delta = other.get_delta_weight("default")
            update.R.copy_(update.B.T @ delta @ torch.linalg.pinv(update.A))
    assert_close32(model(inputs()), theirs(inputs()))
    assert (model(inputs()) - tiny.TwoLayers()(inputs())).abs().max() > 0.01


def test_rank_pattern_and_wrong_options() -> None:
    model = adapted(rank_pattern={"v": 2}, alpha=8.0)
    assert [update.scale for _, update in updates_of(model, "default")] == [2.0, 4.0]
    assert model.get_nb_trainable_parameters()[0] == 4**2 + 2**2
    with pytest.raises(ValueError, match=r"(?s)rank 21 is above 20.*'q'.*'v'"):
        adapted(r=21)
    with pytest.raises(ValueError, match="sigma must be at least 0"):
        LoRAXS(sigma=-1.0)
    assert len(list(layers_of(model))) == 2
