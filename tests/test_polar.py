"""The orthogonal part of a matrix: what is kept, and its gradient against autograd and finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from folklora.polar import orthogonal_part

SHAPES = [(6, 6), (4, 7), (7, 4)]
EPS32 = torch.finfo(torch.float32).eps


def matrix(*shape: int, sigma: list[float], dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    k = min(shape)
    U = torch.linalg.qr(torch.randn(shape[0], k, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(shape[1], k, generator=generator, dtype=torch.float64)).Q
    values = torch.tensor(sigma + [0.0] * (k - len(sigma)), dtype=torch.float64)
    return ((U * values) @ V.T).to(dtype)


def by_autograd(S: Tensor, rank: int) -> Tensor:
    U, _, Vh = torch.linalg.svd(S, full_matrices=False)
    return U[:, :rank] @ Vh[:rank]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_it_is_the_projector_of_the_strongest_directions(shape: tuple[int, int], rank: int):
    S = matrix(*shape, sigma=[5.0, 3.0, 2.0, 1.0])
    M = orthogonal_part(S, rank)
    # a few products of entries at most 1
    torch.testing.assert_close(M, by_autograd(S, rank), rtol=0, atol=1e-13)
    torch.testing.assert_close(M.T @ M @ M.T, M.T, rtol=0, atol=1e-13)
    assert round(float((M * M).sum()), 10) == rank


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [2, 4])
def test_the_gradient_is_that_of_the_decomposition_where_that_exists(shape: tuple[int, int], rank: int):
    S = matrix(*shape, sigma=[5.0, 3.0, 2.0, 1.0]).requires_grad_()
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (expected,) = torch.autograd.grad((by_autograd(S + 0, rank) * weights).sum(), S)
    (found,) = torch.autograd.grad((orthogonal_part(S, rank) * weights).sum(), S)
    if shape == (6, 6):
        # zero singular values: autograd through them is not defined; finite differences are the judge
        assert torch.autograd.gradcheck(lambda s: orthogonal_part(s, rank), (S,), atol=1e-6)
    else:
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_equal_singular_values_do_not_break_the_gradient(shape: tuple[int, int]):
    S = matrix(*shape, sigma=[2.0, 2.0, 2.0, 0.5]).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: orthogonal_part(s, 3), (S,), atol=1e-6)


def test_directions_of_noise_are_dropped():
    S = matrix(16, 16, sigma=[3.0, 2.0, 1.0], dtype=torch.float32)
    M = orthogonal_part(S, rank=8)
    assert round(float((M * M).sum()), 4) == 3
    # without the tolerance the others count as much as the real ones
    assert round(float((orthogonal_part(S, rank=8, tolerance=1e-30) ** 2).sum()), 4) > 3.5


def test_zeros_stay_zeros_with_a_finite_gradient():
    S = torch.zeros(2, 5, 5, requires_grad=True)
    M = orthogonal_part(S, 3)
    M.sum().backward()
    assert torch.equal(M, torch.zeros(2, 5, 5))
    assert torch.equal(S.grad, torch.zeros(2, 5, 5))


def test_the_scale_of_the_matrix_does_not_matter():
    S = matrix(6, 6, sigma=[5.0, 3.0, 2.0, 1.0])
    torch.testing.assert_close(orthogonal_part(1e4 * S, 3), orthogonal_part(S, 3), rtol=0, atol=1e-12)


def test_the_subspace_iteration_finds_the_same_and_the_same_again():
    S = matrix(40, 30, sigma=[4.0, 3.0, 2.0, 1.0] + [0.01] * 20)
    exact = orthogonal_part(S, 4)
    fast = orthogonal_part(S, 4, iterations=3)
    assert torch.equal(fast, orthogonal_part(S, 4, iterations=3))
    # each iteration squares the ratio 0.01 of what is cut off to the weakest that is kept
    torch.testing.assert_close(fast, exact, rtol=0, atol=1e-6)


def test_the_gradient_of_the_subspace_iteration_is_exact_where_nothing_is_cut_off():
    S = matrix(40, 30, sigma=[4.0, 3.0, 2.0, 1.0]).requires_grad_()
    weights = torch.randn(40, 30, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (exact,) = torch.autograd.grad((orthogonal_part(S, 4) * weights).sum(), S)
    (fast,) = torch.autograd.grad((orthogonal_part(S, 4, iterations=1) * weights).sum(), S)
    torch.testing.assert_close(fast, exact, rtol=0, atol=1e-9)
