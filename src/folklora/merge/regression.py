"""Least squares with one Gram matrix a task: what RegMean and WUDI solve."""

from __future__ import annotations

import torch
from torch import Tensor

# Squared singular values below this share of the largest are zeros: 10⁻⁶ of the values themselves.
_NULL = 1e-12


def solve(products: Tensor, gram: Tensor) -> Tensor:
    """K H⁺ in float64, the M [m, n] of least norm that minimises the quadratic form whose gradient is 2 (M H - K).

    Args:
        products: K = Σ_t W_t G_t, [m, n].
        gram: H = Σ_t G_t, [n, n], symmetric and positive semidefinite.
    """
    values, vectors = torch.linalg.eigh(gram.double())
    inverse = torch.where(values > _NULL * values[-1:].clamp(min=0), 1 / values, 0.0)
    return (products.double() @ vectors * inverse) @ vectors.mT
