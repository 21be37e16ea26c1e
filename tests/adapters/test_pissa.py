"""PiSSA: the start from the strongest singular triplets, with a full decomposition and PEFT's PiSSA as oracles."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from folklora import PiSSA, export_lora
from folklora.adapters.host.layer import layers_of, updates_of

EPS32 = torch.finfo(torch.float32).eps
TARGETS = ["q", "v"]
R = 4
# alpha, rslora and the scaling that they mean
SCALINGS = [(None, False, 1.0), (10.0, False, 2.5), (None, True, 2.0), (3.0, True, 1.5)]


class Net(nn.Module):
    """A wide and a tall layer."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(32, 20), nn.Linear(20, 36, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.v(torch.tanh(self.q(x)))


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = Conv1D(20, 32), Conv1D(36, 20)

    forward = Net.forward


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def transposed() -> Transposed:
    linear, model = net(), Transposed()
    with torch.no_grad():
        for name in TARGETS:
            model.get_submodule(name).weight.copy_(linear.get_submodule(name).weight.T)
        model.q.bias.copy_(linear.q.bias)
        model.v.bias.zero_()
    return model


def adapted(base: nn.Module | None = None, **options: Any) -> PeftModel:
    return get_peft_model(base or net(), PiSSA(**{"r": R, "target_modules": TARGETS} | options))


def inputs() -> Tensor:
    return torch.randn(5, 7, 32, generator=torch.Generator().manual_seed(2))


def train(model: nn.Module, steps: int = 5, **options: Any) -> float:
    """A few steps on random goals; returns the last loss."""
    goal = torch.randn(5, 7, 36, generator=torch.Generator().manual_seed(9))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(model(inputs()), goal)
        loss.backward()
        optimizer.step()
    return loss.item()


def assert_close32(actual: Tensor, expected: Tensor, slack: int = 100) -> None:
    # sums of at most 36 terms in each of a few layers
    tolerance = slack * EPS32 * float(expected.detach().abs().max())
    torch.testing.assert_close(actual, expected.to(actual), rtol=0, atol=tolerance)


def weights(model: nn.Module) -> list[Tensor]:
    return [layer.get_base_layer().weight.detach().clone() for layer in layers_of(model)]


@pytest.mark.parametrize("kind", [net, transposed])
@pytest.mark.parametrize(("alpha", "rslora", "scale"), SCALINGS)
def test_the_start_holds_the_strongest_triplets(alpha: float | None, rslora: bool, scale: float, kind: Any):
    model, plain = adapted(kind(), alpha=alpha, rslora=rslora), net()
    for layer, update in updates_of(model, "default"):
        weight = plain.get_submodule(layer.name).weight.detach().double()
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        A0, B0 = update.A0.double(), update.B0.double()
        assert update.scale == pytest.approx(scale)
        assert_close32(scale * B0 @ A0, (U[:, :R] * S[:R]) @ Vh[:R])
        assert_close32(A0 @ A0.T, torch.diag(S[:R] / scale))
        assert_close32(B0.T @ B0, torch.diag(S[:R] / scale))
        residual = weight - scale * B0 @ A0
        assert torch.linalg.matrix_norm(residual, 2).item() == pytest.approx(S[R].item(), rel=1e-4)
        assert residual.square().sum().item() == pytest.approx(S[R:].square().sum().item(), rel=1e-5)


@pytest.mark.parametrize("kind", [net, transposed])
@pytest.mark.parametrize(("alpha", "rslora", "scale"), SCALINGS)
def test_the_start_is_the_base(alpha: float | None, rslora: bool, scale: float, kind: Any):
    x, model = inputs(), adapted(kind(), alpha=alpha, rslora=rslora)
    assert_close32(model(x), net()(x))
    for layer, update in updates_of(model, "default"):
        assert torch.equal(update.A, update.A0)
        assert torch.equal(update.B, update.B0)
        size = float(net().get_submodule(layer.name).weight.detach().abs().max())
        # each entry cancels in a sum of 2 r terms
        assert update.factors().dense().detach().abs().max() <= 4 * R * EPS32 * size


def test_a_half_precision_base_keeps_float32_masters_and_its_output():
    base, x = net().bfloat16(), inputs().bfloat16()
    expected = base(x)
    model = adapted(base)
    assert {p.dtype for _, update in updates_of(model, "default") for p in update.parameters()} == {torch.float32}
    # the trained and the frozen half are rounded alike, so what is left is one rounding of a layer's output
    error = (model(x) - expected).float().abs().max()
    assert error <= 4 * torch.finfo(torch.bfloat16).eps * expected.float().abs().max()


def test_trainable_count_is_loras():
    config = PiSSA(r=R, target_modules=TARGETS)
    trainable, _ = get_peft_model(net(), config).get_nb_trainable_parameters()
    assert trainable == R * (32 + 20) + R * (20 + 36)
    assert trainable == config.trainable_count((20, 32)) + config.trainable_count((36, 20))


@pytest.mark.parametrize(("alpha", "rslora", "scale"), SCALINGS)
def test_start_and_trained_model_equal_pefts(alpha: float | None, rslora: bool, scale: float):
    model = adapted(alpha=alpha, rslora=rslora)
    config = LoraConfig(
        r=R,
        lora_alpha=R if alpha is None else alpha,
        use_rslora=rslora,
        init_lora_weights="pissa",
        target_modules=TARGETS,
    )
    theirs = get_peft_model(net(), config)
    for layer, update in updates_of(model, "default"):
        other = theirs.base_model.model.get_submodule(layer.name)
        # the signs of singular vectors are free: products are compared
        product = other.lora_B["default"].weight @ other.lora_A["default"].weight
        assert_close32(update.B0 @ update.A0, product)
        residual = layer.get_base_layer().weight - update.scale * update.B0 @ update.A0
        assert_close32(residual, other.get_base_layer().weight)
    x = inputs()
    assert_close32(model(x), theirs(x))
    before = model(x).detach()
    assert train(model) == pytest.approx(train(theirs), rel=1e-4)
    assert (model(x) - before).abs().max() > 0.1
    # Adam divides by the gradient's size: rounding of small entries grows over five steps of 0.01
    torch.testing.assert_close(model(x), theirs(x), rtol=0, atol=1e-3)


def test_gradients_equal_pefts():
    model = adapted()
    theirs = get_peft_model(net(), LoraConfig(r=R, lora_alpha=R, init_lora_weights="pissa", target_modules=TARGETS))
    with torch.no_grad():
        for layer, update in updates_of(model, "default"):
            other = theirs.base_model.model.get_submodule(layer.name)
            other.lora_A["default"].weight.copy_(update.A)
            other.lora_B["default"].weight.copy_(update.B)
    model(inputs()).square().mean().backward()
    theirs(inputs()).square().mean().backward()
    for layer, update in updates_of(model, "default"):
        other = theirs.base_model.model.get_submodule(layer.name)
        # PEFT decomposes in float32: its residual is a few roundings of the largest singular value away
        assert_close32(update.A.grad, other.lora_A["default"].weight.grad, slack=1000)
        assert_close32(update.B.grad, other.lora_B["default"].weight.grad, slack=1000)
        assert update.A.grad.abs().max() > 0


def test_training_leaves_the_frozen_start_and_the_base_alone():
    model = adapted()
    before = weights(model)
    starts = [(update.A0.clone(), update.B0.clone()) for _, update in updates_of(model, "default")]
    train(model, weight_decay=0.5)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    for (A0, B0), (_, update) in zip(starts, updates_of(model, "default"), strict=True):
        assert torch.equal(update.A0, A0)
        assert torch.equal(update.B0, B0)
        assert not torch.equal(update.A, A0)


@pytest.mark.parametrize("kind", [net, transposed])
def test_merging_keeps_the_output_and_the_base_comes_back_bit_for_bit(kind: Any):
    model = adapted(kind(), alpha=10.0)
    train(model)
    x, before = inputs(), weights(model)
    expected = model(x)
    model.merge_adapter()
    assert_close32(model(x), expected)
    model.unmerge_adapter()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    with model.disable_adapter():
        assert torch.equal(model(x), kind()(x))


@pytest.mark.parametrize(("alpha", "rslora", "scale"), SCALINGS)
def test_it_exports_as_a_lora_of_rank_2r(tmp_path: Path, alpha: float | None, rslora: bool, scale: float):
    model = adapted(alpha=alpha, rslora=rslora)
    train(model)
    assert export_lora(model, tmp_path / "lora") == dict.fromkeys(TARGETS, 2 * R)
    stock = PeftModel.from_pretrained(net(), tmp_path / "lora")
    assert_close32(stock(inputs()), model(inputs()))


def test_saved_and_loaded_nothing_is_decomposed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = adapted(alpha=10.0)
    train(model)
    model.save_pretrained(tmp_path)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("loading decomposed a weight")

    monkeypatch.setattr(torch.linalg, "eigh", refuse)
    monkeypatch.setattr(torch.linalg, "svd", refuse)
    assert torch.equal(PeftModel.from_pretrained(net(), tmp_path)(inputs()), model(inputs()))


def test_a_second_adapter_starts_from_the_weight_and_not_from_a_residual():
    model = adapted()
    train(model)
    model.add_adapter("second", PiSSA(r=R, target_modules=TARGETS))
    for layer in layers_of(model):
        first, second = layer.folklora_updates["default"], layer.folklora_updates["second"]
        assert torch.equal(first.A0, second.A0)
        assert torch.equal(second.A, second.A0)
    trained = model(inputs())
    model.base_model.set_adapter(["default", "second"])
    assert_close32(model(inputs()), trained)


def test_the_scaling_follows_a_rank_pattern():
    model = adapted(rank_pattern={"v": 2})
    assert [update.scale for _, update in updates_of(model, "default")] == [1.0, 1.0]
    model = adapted(rank_pattern={"v": 2}, alpha=8.0, rslora=True)
    assert [update.scale for _, update in updates_of(model, "default")] == [4.0, pytest.approx(8 / math.sqrt(2))]


def test_full_rank_is_allowed_and_more_is_refused():
    for _, update in updates_of(adapted(r=20), "default"):
        assert update.A0.shape[0] == 20
    with pytest.raises(ValueError, match=r"(?s)rank 21 is above 20.*'q'.*'v'"):
        adapted(r=21)


def test_dropout_is_refused():
    with pytest.raises(ValueError, match="no dropout"):
        PiSSA(dropout=0.1)
