"""SALT: the core in each of its forms, its gradients and its penalty, against dense float64 computations."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

import folklora
from folklora import SALT, SVFit, export_lora, factored_linear, tiny
from folklora.adapters.host.layer import updates_of

EPS32, EPS64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps
SHAPES = [(20, 32), (36, 20), (24, 24)]
RELUS = ["all", "diag", "none"]
R, T = 4, 5


def weight_of(shape: tuple[int, ...], seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def made(weight: Tensor, **options: Any) -> nn.Module:
    torch.manual_seed(3)
    return SALT(**{"r": R, "top": T} | options).update(weight)


def moved(update: nn.Module, size: float = 1.0) -> nn.Module:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for part in (update.scale, update.shift, update.X, update.Y):
            part += size * torch.randn(part.shape, generator=generator).to(part)
    return update


def core(update: nn.Module, relu: str) -> Tensor:
    """M⁺ as the paper writes it, [k, k], differentiable."""
    a, c, S = 1 + update.scale, update.shift, update.S
    M = torch.block_diag(torch.diag(a * S[:T] + c), torch.diag(S[T:]) + update.X @ update.Y)
    if relu == "all":
        return F.relu(M)
    return M - torch.diag(M.diagonal()) + torch.diag(F.relu(M.diagonal())) if relu == "diag" else M


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("relu", RELUS)
def test_the_start_is_the_base_exactly(shape: tuple[int, int], relu: str):
    update = made(weight_of(shape), relu=relu)
    assert (update.factors().dense() == 0).all()
    assert update.X.abs().max() <= math.sqrt(6 / R)
    assert update.X.std().item() == pytest.approx(math.sqrt(2 / R), rel=0.2)
    assert (update.Y == 0).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("relu", RELUS)
def test_off_its_start_it_is_the_formula_in_value_and_gradient(shape: tuple[int, int], relu: str):
    weight = weight_of(shape).double()
    update = moved(made(weight, relu=relu).double())
    expected = weight + update.U @ (core(update, relu) - torch.diag(update.S)) @ update.V.T
    x = weight_of((7, shape[1]), 4).double()
    actual = factored_linear(x, weight, None, update.factors())
    torch.testing.assert_close(actual, x @ expected.T, rtol=0, atol=1e-11)
    trained = [p for p in update.parameters() if p.requires_grad]
    ours = torch.autograd.grad(actual.square().sum(), trained)
    theirs = torch.autograd.grad((x @ expected.T).square().sum(), trained)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
        assert one.abs().max() > 0


@pytest.mark.parametrize("relu", RELUS)
def test_at_the_start_gradients_pass_where_the_reference_lets_them(relu: str):
    weight = weight_of((24, 24)).double()
    update = made(weight, relu=relu).double()
    target = weight_of((24, 24), 5).double()
    (update.factors().dense() * target).sum().backward()
    ours = {name: p.grad.clone() for name, p in update.named_parameters() if p.requires_grad}
    update.zero_grad()
    # ReLU'(0) = 0 off the diagonal, where the start is exactly 0
    (update.U @ core(update, relu) @ update.V.T * target).sum().backward()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, update.get_parameter(name).grad, rtol=0, atol=1e-12)
    G = (update.U.T @ target @ update.V)[T:, T:]
    passed = torch.diag(G.diagonal()) if relu == "all" else G
    torch.testing.assert_close(ours["Y"], update.X.detach().T @ passed, rtol=0, atol=1e-12)
    assert (ours["X"] == 0).all()


def test_a_small_core_beside_a_large_singular_value_is_not_lost():
    update = made(1e4 * weight_of((24, 24)))
    with torch.no_grad():
        update.Y.copy_(1e-6 * weight_of(tuple(update.Y.shape), 6))
    product = (update.X @ update.Y).detach().double()
    expected = torch.where(torch.eye(24 - T, dtype=torch.bool), product, product.relu())
    U, V = update.U[:, T:].double(), update.V[:, T:].double()
    actual = update.factors().dense().detach().double()
    torch.testing.assert_close(U.T @ actual @ V, expected, rtol=0, atol=100 * EPS32 * float(expected.abs().max()))


def test_trainable_count():
    config = SALT(r=256)
    assert config.top_count(768) == 76
    assert config.trainable_count((768, 768)) == 2 * 76 + 2 * 256 * 692 == 354456
    update = made(weight_of((20, 32)))
    assert sum(p.numel() for p in update.parameters() if p.requires_grad) == 2 * T + 2 * R * (20 - T)
    assert SALT(r=1).top_count(7) == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_the_frame_is_orthonormal(shape: tuple[int, int]):
    update = made(weight_of(shape))
    eye = torch.eye(min(shape))
    for vectors in (update.U, update.V):
        torch.testing.assert_close(vectors.T @ vectors, eye, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_without_relu_the_rank_is_low_and_the_form_additive(shape: tuple[int, int]):
    weight = weight_of(shape).double()
    update = moved(made(weight, relu="none").double())
    factors = update.factors()
    assert factors.rank == T + R
    U, S, V = update.U, update.S, update.V
    top = U[:, :T] @ torch.diag(update.scale * S[:T] + update.shift) @ V[:, :T].T
    dense = factors.dense().detach()
    torch.testing.assert_close(dense, (top + U[:, T:] @ update.X @ update.Y @ V[:, T:].T).detach(), rtol=0, atol=1e-12)
    assert torch.linalg.matrix_rank(dense, rtol=1e-10) == T + R


def test_with_relu_no_entry_of_the_core_is_negative():
    weight = weight_of((24, 24)).double()
    update = moved(made(weight).double())
    merged = weight + update.factors().dense().detach()
    entries = update.U.T @ merged @ update.V
    # the frame is rounded to float32
    assert entries.min() >= -1e-5
    assert (entries > 1e-3).sum() > 24
    assert torch.linalg.matrix_rank(update.factors().dense().detach(), rtol=1e-6) > T + R


@pytest.mark.parametrize("relu", ["all", "diag"])
def test_scale_and_shift_alone_give_the_singular_values_in_closed_form(relu: str):
    weight = weight_of((20, 32)).double()
    update = made(weight, relu=relu).double()
    with torch.no_grad():
        update.scale.copy_(torch.tensor([0.5, -0.3, 1.0, -2.0, 0.0]))
        update.shift.copy_(torch.tensor([0.1, -0.2, 0.0, 0.0, -0.5]))
    S = torch.linalg.svdvals(weight)
    top = F.relu((1 + update.scale) * S[:T] + update.shift).detach()
    assert top[3] == 0
    expected = torch.cat([top, S[T:]]).sort(descending=True).values
    merged = weight + update.factors().dense().detach()
    torch.testing.assert_close(torch.linalg.svdvals(merged), expected, rtol=0, atol=1e-5)


def test_with_the_top_values_alone_it_is_svfit():
    weight = weight_of((24, 20))
    salt, svfit = made(weight, r=1, top=19), SVFit(r=19).update(weight)
    with torch.no_grad():
        salt.scale += torch.linspace(-0.5, 1.0, 19)
        svfit.delta += salt.scale * salt.S[:19]
    torch.testing.assert_close(salt.factors().dense(), svfit.factors().dense(), rtol=0, atol=1e-5)
    assert svfit.delta.abs().max() > 1


def test_the_penalty_is_zero_at_the_start_with_a_finite_gradient():
    update = made(weight_of((20, 32)), penalty_weight=1.0)
    assert update.penalty().item() == 0
    update.penalty().backward()
    assert all((p.grad == 0).all() for p in update.parameters() if p.requires_grad)


def test_the_penalty_is_the_sum_of_the_norms():
    update = moved(made(weight_of((20, 32)), penalty_weight=0.7).double())
    S = update.S[:T]
    norms = ((1 + update.scale) * S + update.shift - S).norm() + torch.linalg.matrix_norm(update.X @ update.Y)
    # smoothing takes √ε at most from each norm
    assert update.penalty().item() == pytest.approx(0.7 * norms.item(), abs=2 * math.sqrt(EPS64))


def test_the_models_penalty_reads_each_layers_own_singular_values():
    model = tiny.precise(SALT(r=R, top=T, penalty_weight=0.7, target_modules=tiny.TARGETS))
    separate = [update.penalty().item() for _, update in updates_of(model, "default")]
    assert len({round(value, 3) for value in separate}) == len(separate)
    assert folklora.penalty(model).item() == pytest.approx(sum(separate), rel=1e-12)
    expected = tiny.penalty_gradients(model)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    for name, gradient in expected.items():
        moved_by = before[name] - model.get_parameter(name).detach()
        torch.testing.assert_close(moved_by, gradient, rtol=1e-9, atol=1e-12)
    assert SALT(r=R, top=T).update(weight_of((20, 32))).penalty() is None


def test_a_convolution_of_kernel_one_equals_the_linear_layer():
    linear = nn.Sequential(nn.Linear(32, 20))
    convolution = nn.Sequential(nn.Conv2d(32, 20, 1))
    convolution[0].weight.data = linear[0].weight.data[:, :, None, None].clone()
    convolution[0].bias.data = linear[0].bias.data.clone()
    models = [get_peft_model(base, SALT(r=R, top=T, target_modules=["0"])) for base in (linear, convolution)]
    for model in models:
        ((_, update),) = updates_of(model, "default")
        with torch.no_grad():
            update.X.copy_(weight_of(tuple(update.X.shape), 8))
        moved(update, 0.3)
    x = weight_of((2, 32, 3, 4), 9)
    expected = models[0](x.movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(models[1](x), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("relu", RELUS)
def test_it_merges_and_exports_and_its_rank_is_printed(tmp_path: Path, relu: str):
    model = tiny.trained(SALT(r=R, top=T, relu=relu, target_modules=tiny.TARGETS))
    before = tiny.logits(model)
    for name, rank in export_lora(model, tmp_path / "lora").items():
        k = 16 if name.endswith("v_proj") else 32
        assert rank == (T + R if relu == "none" else k)
    stock = PeftModel.from_pretrained(tiny.llama(), tmp_path / "lora")
    torch.testing.assert_close(tiny.logits(stock), before, rtol=0, atol=1e-4)
    model.merge_adapter()
    torch.testing.assert_close(tiny.logits(model), before, rtol=0, atol=1e-4)


@pytest.mark.parametrize("save_vectors", [False, True])
def test_what_is_saved_and_that_it_loads(tmp_path: Path, save_vectors: bool):
    model = tiny.trained(SALT(r=R, save_vectors=save_vectors, target_modules=tiny.TARGETS))
    model.save_pretrained(tmp_path)
    kept = {key.rpartition(".")[2] for key in load_file(tmp_path / "adapter_model.safetensors")}
    assert kept == {"scale", "shift", "X", "Y", "S", "base_sample"} | ({"U", "V"} if save_vectors else set())
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))


def test_a_model_in_another_precision_and_a_state_dict_keep_the_output():
    config = SALT(r=R, target_modules=tiny.TARGETS)
    model = tiny.trained(config)
    before = tiny.logits(model)
    twin = tiny.adapted(config)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(tiny.logits(twin), before)
    torch.testing.assert_close(tiny.logits(twin.double()), before.double(), rtol=0, atol=1e-3)


def test_under_autocast_the_core_keeps_its_precision():
    update = moved(made(weight_of((24, 24))), 0.1)
    expected = update.factors().dense()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        factors = update.factors()
    assert {factors.A.dtype, factors.s.dtype, factors.B.dtype} == {torch.float32}
    assert torch.equal(factors.dense(), expected)


def test_drawing_leaves_the_seed_to_the_caller():
    torch.manual_seed(3)
    first, second = (SALT(r=R).update(weight_of((20, 32))).X for _ in range(2))
    assert not torch.equal(first, second)


def test_too_many_values_are_refused_with_the_layers_name():
    with pytest.raises(ValueError, match=r"3 top singular values and rank 30.*32 singular values of layer '.*q_proj'"):
        tiny.adapted(SALT(r=30, target_modules=["q_proj"]))
    tiny.adapted(SALT(r=29, target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"relu": "some"}, "relu"), ({"top": 0}, "top"), ({"top_ratio": 1.0}, "top_ratio"), ({"r": 0}, "rank")],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        SALT(**options)
