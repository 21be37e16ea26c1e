"""Two products of one gradient in one pass over it, against the plain products in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from folklora import fused
from folklora.factored import Factors, factored_linear

EPS32 = torch.finfo(torch.float32).eps


def rand(*shape: int, seed: int, dtype: torch.dtype, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)


def assert_products(found: tuple[Tensor, Tensor], g: Tensor, B: Tensor, z: Tensor, unit: float) -> None:
    for one, expected in zip(found, (g.double() @ B.double(), g.double().T @ z.double()), strict=True):
        # relative to the size of the whole: single sums may cancel
        error = (one.double() - expected).norm() / expected.norm()
        assert error <= unit


def test_where_one_pass_is_not_to_be_had_the_plain_products_are_taken():
    g, B, z = (rand(*s, seed=i, dtype=torch.float32, device="cpu") for i, s in enumerate(((50, 20), (20, 3), (50, 3))))
    assert_products(fused.products(g, B, z), g, B, z, 50 * EPS32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_a_compiler_is_told_of_the_products_is_true(dtype: torch.dtype):
    g, B, z = (rand(*s, seed=i, dtype=dtype, device="cpu") for i, s in enumerate(((6, 20), (20, 3), (6, 3))))
    torch.library.opcheck(fused._opaque_products, (g, B, z))
    assert_products(fused._opaque_products(g, B, z), g, B, z, 50 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("biased", [False, True])
def test_what_a_compiler_is_told_of_the_sum_is_true(biased: bool):
    shapes = ((6, 3), (3, 20), (6, 8), (8, 20), (20,))
    *operands, bias = (rand(*s, seed=i, dtype=torch.float64, device="cpu") for i, s in enumerate(shapes))
    operands.append(bias if biased else None)
    torch.library.opcheck(fused._opaque_sum_of_products, tuple(operands))
    z, b, x, w, _ = operands
    expected = z @ b + x @ w + (bias if biased else 0)
    torch.testing.assert_close(fused._opaque_sum_of_products(*operands), expected, rtol=0, atol=1e-13)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: the kernel is written for it")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "out", "rank"), [(4096, 1024, 16), (5003, 1032, 16), (16384, 8192, 8), (4500, 2048, 1)]
)
def test_one_pass_equals_two(rows: int, out: int, rank: int, dtype: torch.dtype):
    shapes = ((rows, out), (out, rank), (rows, rank))
    g, B, z = (rand(*s, seed=i, dtype=dtype, device="cuda") for i, s in enumerate(shapes))
    assert fused._fits(g, B, z)
    found = fused.products(g, B, z)
    # the first is rounded once to its dtype, the second stays in float32
    assert_products(found, g, B, z, torch.finfo(dtype).eps)
    assert found[1].dtype == torch.float32
    again = fused.products(g, B, z)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: the kernel is written for it")
@pytest.mark.parametrize("bias", [False, True])
def test_a_layers_gradients_are_those_of_the_plain_products(bias: bool, monkeypatch: pytest.MonkeyPatch):
    shapes = ((2, 2500, 1024), (1536, 1024), (12, 1024), (1536, 12), (1536,))
    x, weight, A, B, b = (
        rand(*s, seed=i, dtype=torch.float32 if i in (2, 3) else torch.bfloat16, device="cuda")
        for i, s in enumerate(shapes)
    )
    leaves = [t.requires_grad_() for t in (x, A, B)]

    def gradients() -> tuple[Tensor, ...]:
        y = factored_linear(x, weight, b if bias else None, Factors(A, 0.5, B))
        return torch.autograd.grad(y.square().mean(), leaves)

    found = gradients()
    monkeypatch.setattr(fused, "_fits", lambda *_: False)
    for one, other in zip(found, gradients(), strict=True):
        assert one.dtype == other.dtype
        # the plain ones round twice to bfloat16 where one pass rounds once
        assert (one.double() - other.double()).norm() <= 2 * torch.finfo(torch.bfloat16).eps * other.double().norm()
