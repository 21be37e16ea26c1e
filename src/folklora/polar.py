"""The orthogonal part of a matrix, U_k V_kᵀ, with a gradient that is finite where that of a decomposition is not.

S = U diag(σ) Vᵀ [m, n] becomes M = U_k V_kᵀ: its k strongest singular directions, each with the singular value 1.
M is one function of S wherever σ_k > σ_{k+1}, though U and V are not where singular values coincide. So its gradient
has a closed form without the 1/(σ_i - σ_j) between kept directions at which U's and V's own gradients break down.
Imports torch alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def orthogonal_part(matrix: Tensor, rank: int, tolerance: float = 1e-4, iterations: int | None = None) -> Tensor:
    """The `rank` strongest singular directions of a matrix, all with the singular value 1.

    Directions below `tolerance` σ_1 are dropped: in a matrix of lower rank they are noise of the decomposition, and
    with the value 1 they would count as much as the others. The gradient is exact (see `_OrthogonalPart.backward`);
    with `iterations` it takes what lies outside the subspace as 0.

    Args:
        matrix: [..., m, n], float32 or float64.
        rank: How many directions to keep at most, at least 1.
        tolerance: Share of σ_1 below which a direction is dropped, above 0.
        iterations: None decomposes the whole matrix. A number takes the directions from a subspace of 2 `rank`
            dimensions after as many power iterations from a fixed start, which is faster and the same at every call.

    Returns:
        [..., m, n]; 0 for a matrix of zeros.
    """
    return _OrthogonalPart.apply(matrix, rank, tolerance, iterations)


class _OrthogonalPart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor, rank: int, tolerance: float, iterations: int | None) -> Tensor:
        if iterations is None or 2 * rank >= min(matrix.shape[-2:]):
            U, sigma, Vh = torch.linalg.svd(matrix, full_matrices=False)
        else:
            Q = _strong_subspace(matrix, 2 * rank, iterations)
            U, sigma, Vh = torch.linalg.svd(Q.mT @ matrix, full_matrices=False)
            U = Q @ U
        # zeros have no direction; the smallest number keeps them from counting as their own largest
        floor = (tolerance * sigma[..., :1]).clamp_min(torch.finfo(sigma.dtype).tiny)
        place = torch.arange(sigma.shape[-1], device=sigma.device)
        kept = ((sigma >= floor) & (place < rank)).to(sigma.dtype)
        ctx.save_for_backward(U, sigma, Vh, kept, floor)
        return (U * kept.unsqueeze(-2)) @ Vh

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """G -> U (Γ⁺ ∘ sym(Ĝ) + Γ⁻ ∘ anti(Ĝ)) Vᵀ and what lies outside the spans, with Ĝ = Uᵀ G V.

        M = U f(σ) Vᵀ, f = 1 on kept and 0 on dropped directions; Γ⁺ = (f_i - f_j) / (σ_i - σ_j), 0 where f_i = f_j,
        Γ⁻ = (f_i + f_j) / (σ_i + σ_j). Outside the span of U or V, σ_j = f_j = 0 and both are f_i / σ_i.
        """
        U, sigma, Vh, kept, floor = ctx.saved_tensors
        gradient, left = U.mT @ grad, grad @ Vh.mT
        inner = gradient @ Vh.mT
        f, other = kept.unsqueeze(-1), kept.unsqueeze(-2)
        s, s_other, least = sigma.unsqueeze(-1), sigma.unsqueeze(-2), floor.unsqueeze(-1)
        # where the cut goes through equal values M jumps; the smallest gap counted bounds the gradient there
        gap = (s - s_other).abs().clamp_min(least)
        symmetric, anti = (inner + inner.mT) / 2, (inner - inner.mT) / 2
        total = (f - other).abs() / gap * symmetric + (f + other) / (s + s_other).clamp_min(least) * anti
        share = kept / sigma.clamp_min(floor)
        result = U @ total @ Vh
        result = result + (U * share.unsqueeze(-2)) @ (gradient - inner @ Vh)
        result = result + (left - U @ inner) @ (share.unsqueeze(-1) * Vh)
        return result, None, None, None


def _strong_subspace(matrix: Tensor, dimensions: int, iterations: int) -> Tensor:
    """An orthonormal basis [..., m, dimensions] near the span of the strongest left singular vectors."""
    n = matrix.shape[-1]
    position = torch.arange(n, device=matrix.device, dtype=matrix.dtype)
    # a draw would make two calls differ; cosines of these phases are no axis of any basis that a model is trained in
    start = torch.cos(torch.pi * (position.unsqueeze(-1) + 0.5) * (position[:dimensions] + 0.5) / n)
    Q = torch.linalg.qr(matrix @ start).Q
    for _ in range(iterations):
        Q = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ Q).Q).Q
    return Q
