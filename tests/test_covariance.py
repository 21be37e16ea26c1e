"""Covariance-oriented decompositions against dense float64 ones with an explicit inverse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from folklora import covariance, spectrum

EPS32 = torch.finfo(torch.float32).eps
SHAPES = [(30, 18), (18, 30), (24, 24)]
ENDS = ["top", "bottom"]


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(m: int, n: int, tokens: int = 400) -> tuple[Tensor, Tensor]:
    """A weight, and the second moments of inputs whose directions differ in strength by a hundred."""
    x = gaussian(tokens, n, seed=1) * torch.logspace(0, -2, n, dtype=torch.float64) @ gaussian(n, n, seed=2)
    return gaussian(m, n, seed=3), x.T @ x / tokens


def damped(C: Tensor, damping: float = 0.01) -> Tensor:
    return C + damping * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)


def chosen(end: str, count: int) -> slice:
    return slice(0, count) if end == "top" else slice(-count, None)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("end", ENDS)
def test_it_equals_the_decomposition_with_an_explicit_inverse(end: Any, shape: tuple[int, int]) -> None:
    W, C = problem(*shape)
    M = damped(C)
    U, S, Vh = torch.linalg.svd(W @ M, full_matrices=False)
    places = chosen(end, 5)
    found = covariance.covariance_triplets(W, C, 5, end=end, dtype=torch.float64)
    torch.testing.assert_close(found.S, S[places], rtol=1e-8, atol=0)
    expected = (U[:, places] * S[places]) @ (Vh[places] @ torch.linalg.inv(M))
    torch.testing.assert_close(found.dense(), expected, rtol=0, atol=1e-8)
    # the same without an inverse: a projection of W onto left vectors
    torch.testing.assert_close(found.dense(), U[:, places] @ U[:, places].T @ W, rtol=0, atol=1e-8)
    torch.testing.assert_close(found.V.T, (found.U / found.S).T @ W, rtol=0, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("end", ENDS)
def test_u_is_orthonormal_and_v_is_so_only_through_the_covariance(end: Any, shape: tuple[int, int]) -> None:
    W, C = problem(*shape)
    found = covariance.covariance_triplets(W, C, 5, end=end, dtype=torch.float64)
    identity = torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(found.U.T @ found.U, identity, rtol=0, atol=1e-12)
    MV = damped(C) @ found.V
    torch.testing.assert_close(MV.T @ MV, identity, rtol=0, atol=1e-7)
    assert (found.V.T @ found.V - identity).abs().max() > 0.1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("end", ENDS)
def test_all_of_them_rebuild_the_weight(end: Any, shape: tuple[int, int]) -> None:
    W, C = problem(*shape)
    found = covariance.covariance_triplets(W.float(), C.float(), min(shape), end=end)
    assert found.U.dtype == found.S.dtype == found.V.dtype == torch.float32
    assert (found.dense() - W).norm() <= 1e-4 * W.norm()


def test_a_covariance_of_the_identity_gives_the_plain_triplets() -> None:
    W, _ = problem(18, 30)
    found = covariance.covariance_triplets(W, 3 * torch.eye(30), 4, damping=0.0, dtype=torch.float64)
    plain = spectrum.top(W, 4, dtype=torch.float64)
    torch.testing.assert_close(found.S, 3 * plain.S)
    torch.testing.assert_close(found.dense(), plain.dense())


@pytest.mark.parametrize("end", ENDS)
def test_the_factors_are_balanced_and_their_product_is_blind_to_the_covariances_scale(end: Any) -> None:
    W, C = problem(30, 18)
    B, A = covariance.covariance_factors(W, C, 4, 2.5, end=end, dtype=torch.float64)
    found = covariance.covariance_triplets(W, C, 4, end=end, dtype=torch.float64)
    torch.testing.assert_close(2.5 * B @ A, found.dense(), rtol=0, atol=1e-10)
    torch.testing.assert_close(B.T @ B, torch.diag(found.S / 2.5), rtol=0, atol=1e-10)
    larger = covariance.covariance_factors(W, 16 * C, 4, 2.5, end=end, dtype=torch.float64)
    torch.testing.assert_close(larger[0], 4 * B, rtol=0, atol=1e-8)
    torch.testing.assert_close(larger[1], A / 4, rtol=0, atol=1e-8)


def test_the_square_root_loses_the_least_of_the_output() -> None:
    """At power 1/2, S² are output energies: Σ over the dropped ones is E |W x - W' x|², the least at that rank."""
    W, C = problem(24, 24)
    # the identity cannot be damped away exactly; a full-rank C needs no damping
    lost = {}
    for power in (0.5, 1.0):
        kept = covariance.covariance_triplets(W, C, 8, damping=0.0, power=power, dtype=torch.float64).dense()
        lost[power] = ((W - kept) @ C @ (W - kept).T).trace().item()
    S = torch.linalg.svdvals(W @ torch.linalg.cholesky(C))
    assert lost[0.5] == pytest.approx(S[8:].square().sum().item(), rel=1e-8)
    assert lost[1.0] > lost[0.5] * 1.001


@pytest.mark.parametrize("end", ENDS)
def test_singular_covariances_and_weights_give_finite_factors(end: Any) -> None:
    x = gaussian(3, 20, seed=5)
    W = gaussian(16, 6, seed=6) @ gaussian(6, 20, seed=7)
    for weight, C in ((gaussian(16, 20, seed=8), x.T @ x), (W, x.T @ x), (torch.zeros(16, 20), x.T @ x)):
        B, A = covariance.covariance_factors(weight, C, 8, end=end)
        assert B.isfinite().all()
        assert A.isfinite().all()
        U = covariance.covariance_triplets(weight, C, 8, end=end).U
        # each column is rounded to float32
        torch.testing.assert_close(U.T @ U, torch.eye(8), rtol=0, atol=8 * EPS32)
        projected = (U @ U.T).double() @ weight.double()
        torch.testing.assert_close((B @ A).double(), projected, rtol=0, atol=1e-5 * max(1.0, float(weight.abs().max())))


def test_what_does_not_fit_is_refused() -> None:
    W, C = problem(18, 30)
    with pytest.raises(ValueError, match=r"covariance has shape \[18, 18\]"):
        covariance.covariance_triplets(W, C[:18, :18], 4)
    with pytest.raises(ValueError, match="of one weight"):
        covariance.covariance_triplets(W.expand(2, 18, 30), C, 4)
    for broken in (torch.zeros_like(C), C.index_fill(0, torch.tensor([2]), torch.nan)):
        with pytest.raises(ValueError, match="must be finite, with a positive mean"):
            covariance.covariance_triplets(W, broken, 4)
    with pytest.raises(ValueError, match="count is 19"):
        covariance.covariance_triplets(W, C, 19)
    with pytest.raises(ValueError, match="scale is -1"):
        covariance.covariance_factors(W, C, 4, -1)
