"""SORSA: the start, the parametrisation and the regulariser, with PiSSA and dense float64 computations as oracles."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import folklora
from folklora import SORSA, PiSSA, export_lora, factored_linear, tiny
from folklora.adapters.host.layer import updates_of

EPS32, EPS64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps
R = 4
SHAPES = [(20, 32), (36, 20), (24, 24)]
SCALINGS = [(None, 1.0), (10.0, 2.5), (2.0, 0.5)]


def weight_of(shape: tuple[int, int]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def moved(update: nn.Module) -> nn.Module:
    """The update with noise on what is trained."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for part in (update.A, update.B, update.d):
            part += 0.3 * torch.randn(part.shape, generator=generator)
    return update


def regularised(gamma: float = 1.0, **options: Any) -> SORSA:
    return SORSA(**{"r": R, "gamma": gamma, "peak_learning_rate": 1.0, "target_modules": tiny.TARGETS} | options)


def exact_regulariser(model: nn.Module) -> Tensor:
    """The mean over all factor matrices of their unsquared distance from orthonormality."""
    errors = [
        torch.linalg.matrix_norm(rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype))
        for _, update in updates_of(model, "default")
        for rows in (update.A, update.B.T)
    ]
    return torch.stack(errors).mean()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("alpha", "scale"), SCALINGS)
def test_the_start_is_the_top_triplets_and_the_update_is_zero(
    shape: tuple[int, int], alpha: float | None, scale: float
):
    weight = weight_of(shape)
    update = SORSA(r=R, alpha=alpha).update(weight)
    U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    A, B, d = (part.detach().double() for part in (update.A, update.B, update.d))
    eye = torch.eye(R, dtype=torch.float64)
    torch.testing.assert_close(A @ A.T, eye, rtol=0, atol=1e-5)
    torch.testing.assert_close(B.T @ B, eye, rtol=0, atol=1e-5)
    torch.testing.assert_close(d, S[:R], rtol=1e-6, atol=0)
    torch.testing.assert_close(B @ torch.diag(d) @ A, (U[:, :R] * S[:R]) @ Vh[:R], rtol=0, atol=1e-5)
    # W_res + s B diag(d) A = W for any s, since the trained and the frozen part are equal
    assert update.scale == scale
    frozen = update.split()[1].dense().double()
    torch.testing.assert_close(weight + frozen + scale * B @ torch.diag(d) @ A, weight.double(), rtol=0, atol=1e-5)
    assert update.factors().dense().detach().abs().max() <= 4 * R * EPS32 * scale * float(S[0])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_start_is_the_same_function_as_pissas(shape: tuple[int, int]):
    weight = weight_of(shape)
    ours, theirs = SORSA(r=R).update(weight), PiSSA(r=R).update(weight)
    torch.testing.assert_close(ours.d.sqrt()[:, None] * ours.A, theirs.A, rtol=0, atol=20 * EPS32)
    torch.testing.assert_close(ours.B * ours.d.sqrt(), theirs.B, rtol=0, atol=20 * EPS32)


@pytest.mark.parametrize(("alpha", "scale"), SCALINGS)
def test_off_its_start_it_is_the_formula(alpha: float | None, scale: float):
    weight = weight_of((20, 32))
    update = moved(SORSA(r=R, alpha=alpha).update(weight))
    U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    residual = weight - scale * (U[:, :R] * S[:R]) @ Vh[:R]
    expected = residual + scale * update.B.double() @ torch.diag(update.d.double()) @ update.A.double()
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(3))
    actual = factored_linear(x, weight, None, update.factors())
    torch.testing.assert_close(actual, (x.double() @ expected.T).float(), rtol=0, atol=1e-4)


def test_dropout_touches_the_trained_part_alone():
    model = tiny.adapted(SORSA(r=R, dropout=0.5, target_modules=["q_proj"]), layers=1)
    ((layer, update),) = updates_of(model, "default")
    moved(update)
    x = tiny.layer_input(layer)
    learned, fixed = update.split()
    residual = layer.get_base_layer().weight + fixed.dense()
    torch.manual_seed(5)
    kept = F.dropout(x, 0.5)
    torch.manual_seed(5)
    y = layer.train()(x)
    torch.testing.assert_close(y, x @ residual.T + kept @ learned.dense().T, rtol=0, atol=1e-4)


def test_trainable_count():
    assert SORSA(r=128).trainable_count((4096, 11008)) == 128 * (4096 + 11008) + 128
    update = SORSA(r=R).update(weight_of((20, 32)))
    assert sum(p.numel() for p in update.parameters() if p.requires_grad) == R * (20 + 32) + R


def test_it_merges_exports_at_rank_2r_and_comes_back(tmp_path: Path):
    model = tiny.trained(SORSA(r=R, alpha=6.0, target_modules=tiny.TARGETS))
    before = tiny.logits(model)
    ranks = export_lora(model, tmp_path / "lora")
    assert set(ranks.values()) == {2 * R}
    model.merge_adapter()
    torch.testing.assert_close(tiny.logits(model), before, rtol=0, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(tiny.logits(model), before)


def test_the_regulariser_is_zero_at_the_start_up_to_its_smoothing():
    for dtype in (torch.float32, torch.float64):
        update = regularised().update(weight_of((20, 32))).to(dtype)
        if dtype == torch.float64:
            with torch.no_grad():
                update.A.copy_(torch.linalg.qr(update.A.T).Q.T)
                update.B.copy_(torch.linalg.qr(update.B).Q)
        # one half for each of the two matrices, each at most √ε and its round-off
        assert update.penalty().item() <= 1.1 * math.sqrt(torch.finfo(dtype).eps)


def test_the_regularisers_gradient_at_the_start_is_no_blown_up_round_off():
    update = regularised().update(weight_of((768, 768)))
    unsmoothed = torch.linalg.matrix_norm(update.A @ update.A.T - torch.eye(R))
    noise = torch.autograd.grad(unsmoothed, update.A)[0].norm()
    smooth = torch.autograd.grad(update.penalty(), update.A)[0].norm()
    assert noise > 1.0
    assert smooth < 0.01


@pytest.mark.parametrize("c", [0.5, 1.3, 2.0])
def test_the_regulariser_of_a_scaled_factor(c: float):
    update = regularised(reduction="sum").update(weight_of((20, 32)))
    with torch.no_grad():
        update.A *= c
    expected = abs(c * c - 1) * math.sqrt(R)
    assert update.penalty().item() == pytest.approx(expected, rel=1e-5, abs=1.1 * math.sqrt(EPS32))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_models_regulariser_counts_every_factor_matrix_once(reduction: str):
    gamma, lr = 0.02, 0.05
    model = tiny.precise(regularised(gamma, peak_learning_rate=lr, reduction=reduction))
    matrices = 2 * len(list(updates_of(model, "default")))
    expected = gamma / lr * exact_regulariser(model) * (1 if reduction == "mean" else matrices)
    assert folklora.penalty(model).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("lr", [0.5, 0.01])
def test_under_gradient_descent_its_step_size_is_gamma_whatever_the_learning_rate(lr: float):
    gamma = 0.03
    model = tiny.precise(regularised(gamma, peak_learning_rate=lr))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    parts = torch.autograd.grad(exact_regulariser(model), list(trained.values()), allow_unused=True)
    before = {name: value.detach().clone() for name, value in trained.items()}
    torch.optim.SGD(trained.values(), lr=lr).step()
    for (name, value), gradient in zip(trained.items(), parts, strict=True):
        moved_by = value.detach() - before[name]
        expected = torch.zeros_like(value) if gradient is None else -gamma * gradient
        assert (gradient is None) == name.endswith(".d")
        torch.testing.assert_close(moved_by, expected, rtol=0, atol=100 * EPS64)


@pytest.mark.parametrize("limit", [1e-3, 1.0, 1e6])
def test_clipping_does_not_bound_it(limit: float):
    gamma, lr = 0.03, 0.1
    model = tiny.precise(regularised(gamma, peak_learning_rate=lr)).train()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and not n.endswith(".d")}
    parts = torch.autograd.grad(exact_regulariser(model), list(trained.values()))
    tiny.loss(model).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    task = {name: value.grad.clone() for name, value in trained.items()}
    before = {name: value.detach().clone() for name, value in trained.items()}
    torch.optim.SGD(trained.values(), lr=lr).step()
    for (name, value), gradient in zip(trained.items(), parts, strict=True):
        expected = before[name] - lr * task[name] - gamma * gradient
        torch.testing.assert_close(value.detach(), expected, rtol=0, atol=1e3 * EPS64)


def test_trained_with_it_the_factors_stay_nearer_to_orthonormal():
    distances = []
    for gamma in (0.0, 1.0):
        model = tiny.adapted(regularised(gamma))
        for _ in range(3):
            tiny.train(model)
        distances.append(exact_regulariser(model).item())
    assert 0.05 < distances[1] < 0.8 * distances[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"gamma": -1.0}, "gamma"), ({"peak_learning_rate": 0.0}, "peak_learning_rate"), ({"reduction": "max"}, "'mean'")],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        SORSA(**options)
