"""Decompositions of a weight by how much of its layer's input they see, through the input's second moments C = E[x xᵀ].

Pure functions of tensors, as in `folklora.spectrum`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from folklora.spectrum import Triplets, balanced, check_weight, column_signs, top


@torch.no_grad()
def covariance_triplets(
    weight: Tensor,
    covariance: Tensor,
    count: int,
    *,
    end: Literal["top", "bottom"] = "top",
    damping: float = 0.01,
    power: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Triplets:
    """A weight's components by how much of the layer's input they see: singular triplets of W M, brought back to W.

        M = (C + damping * mean(diag C) I)^power        W M = U diag(S) V^T        Vhat = M^-1 V = W^T U diag(1/S)

    U diag(S) Vhat^T is W projected onto chosen left singular vectors of W M; for all k of them it is W. U is
    orthonormal, Vhat is not: (M Vhat)^T M Vhat = I. Vhat is taken from W^T U, with no inverse. The bottom end comes
    from a full decomposition in float64, since W M is often too ill-conditioned to be squared. Where S is 0 to
    float64 precision, so is W^T U, and Vhat is set to 0.

    Args:
        weight: [m, n], any floating dtype.
        covariance: C [n, n], symmetric and positive semidefinite.
        count: how many, 1 <= count <= k = min(m, n).
        end: the strongest of W M, or the weakest, in descending order either way.
        damping: above 0 unless C has full rank.
        power: 1 is CorDA's (arXiv 2406.05223); at 1/2, S^2 are the energies that the components have in the output,
            and dropping the bottom ones loses the least of it.
        dtype: of the result; the computation is in float64.

    Returns:
        U [m, count], S [count] descending, and Vhat [n, count] as `V`.

    Raises:
        ValueError: see `top`; the covariance is not [n, n] and finite, or has no positive entry on its diagonal.
    """
    check_weight(weight, count)
    n = weight.shape[-1]
    if weight.ndim != 2 or covariance.shape != (n, n):
        raise ValueError(f"covariance has shape {list(covariance.shape)}, but must be [n, n] of one weight [m, n]")
    C, W = covariance.double(), weight.double()
    mean = C.diagonal().mean()
    if not C.isfinite().all() or not mean > 0:
        raise ValueError("the covariance must be finite, with a positive mean on its diagonal")
    M = C + damping * mean * torch.eye(n, dtype=C.dtype, device=C.device)
    if power != 1:
        values, vectors = torch.linalg.eigh(M)
        M = (vectors * values.clamp(min=0) ** power) @ vectors.mT
    if end == "top":
        strongest = top(W @ M, count, dtype=torch.float64)
        U, S = strongest.U, strongest.S
    else:
        U, S, _ = torch.linalg.svd(W @ M, full_matrices=False)
        U, S = U[:, -count:], S[-count:]
    floor = torch.finfo(S.dtype).eps * torch.linalg.matrix_norm(W) * torch.linalg.matrix_norm(M)
    V = torch.where(floor < S, W.mT @ U / S, 0)
    sign = column_signs(V)
    return Triplets((U * sign).to(dtype), S.to(dtype), (V * sign).to(dtype))


def covariance_factors(
    weight: Tensor,
    covariance: Tensor,
    count: int,
    scale: float = 1.0,
    *,
    end: Literal["top", "bottom"] = "top",
    damping: float = 0.01,
    power: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """The part of a weight in `covariance_triplets` as a balanced LoRA pair: scale * B0 @ A0 = U diag(S) Vhat^T.

    B0 = U diag(sqrt(S / scale)) and A0 = diag(sqrt(S / scale)) Vhat^T, the start of CorDA. A covariance c times as
    large gives the same product, from a B0 sqrt(c) times as large (at power 1) and an A0 as much smaller.

    Args and errors: those of `covariance_triplets` and `top_factors`.

    Returns:
        B0 [m, count] and A0 [count, n].
    """
    return balanced(
        covariance_triplets(weight, covariance, count, end=end, damping=damping, power=power, dtype=dtype), scale
    )
