"""What the merging methods have in common: task vectors, their weighted sums, lengths and angles."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def deltas(models: Sequence[Tensor], base: Tensor) -> list[Tensor]:
    """The task vectors τ_t = θ_t - θ_0."""
    return [model - base for model in models]


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ_t w_t x_t, one tensor at a time."""
    total = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total.add_(tensor, alpha=weight)
    return total


def share(weights: Sequence[float]) -> list[float]:
    """Each weight's share of their sum.

    Raises:
        ValueError: They sum to 0.
    """
    total = sum(weights)
    if total == 0:
        raise ValueError(f"the weights {list(weights)} sum to 0, so that no mean exists: set normalize to false")
    return [weight / total for weight in weights]


def dot(a: Tensor, b: Tensor) -> float:
    """The inner product of two tensors as vectors."""
    # a long float32 sum loses digits that an angle near 0 needs
    return float((a * b).sum(dtype=torch.float64))


def cosine(a: Tensor, b: Tensor) -> float | None:
    """The cosine of the angle between two tensors as vectors; None if one of them is zero."""
    lengths = (dot(a, a) * dot(b, b)) ** 0.5
    return max(-1.0, min(1.0, dot(a, b) / lengths)) if lengths > 0 else None
