"""What the merging methods have in common: task vectors, their weighted sums and means, the angles between them."""

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


def mixed(tensors: Sequence[Tensor], weights: Sequence[float], normalize: bool) -> Tensor:
    """Σ_t w_t x_t; with `normalize` the mean, Σ_t w_t x_t / Σ_t w_t."""
    return mean(tensors, weights) if normalize else weighted_sum(tensors, weights)


def mean(tensors: Sequence[Tensor], weights: Sequence[float] = ()) -> Tensor:
    """The weighted mean, by default with equal weights.

    Computed as x_1 + Σ_t w_t (x_t - x_1) / Σ_t w_t: equal tensors have themselves as their mean, bit for bit.

    Raises:
        ValueError: The weights sum to 0.
    """
    first, weights = tensors[0], list(weights) or [1.0] * len(tensors)
    total = sum(weights)
    if total == 0:
        raise ValueError(
            f"the weights {weights} sum to 0: there is no mean with these; a method's normalize must be off"
        )
    result = first.clone()
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        result.add_(tensor - first, alpha=weight / total)
    return result


def dot(a: Tensor, b: Tensor, dim: int | None = None) -> Tensor:
    """The inner product along one dimension (kept), or of all entries, in float64."""
    # a long float32 sum loses the digits that a small angle is made of
    return (a * b).sum(dtype=torch.float64) if dim is None else (a * b).sum(dim, keepdim=True, dtype=torch.float64)


def cosine(a: Tensor, b: Tensor, dim: int | None = None) -> Tensor:
    """The cosine of the angle between vectors along a dimension, or between tensors; 0 where one of them is zero."""
    lengths = (dot(a, a, dim) * dot(b, b, dim)).sqrt()
    return torch.where(lengths > 0, dot(a, b, dim) / lengths, 0.0).clamp(-1, 1)


def arc(a: Tensor, b: Tensor, t: float, dim: int | None = None, colinear: float = 1 - 1e-12) -> Tensor:
    """The point at t on the arc from a to b: sin((1-t) Ω) / sin Ω · a + sin(t Ω) / sin Ω · b.

    Args:
        a: Where it starts, at t = 0.
        b: Where it ends, at t = 1.
        t: How far.
        dim: The dimension along which vectors lie; None takes the tensors as one vector each.
        colinear: Above this |cos Ω|, and where a vector is zero, the line a + t (b - a).
    """
    cos = cosine(a, b, dim)
    angle = cos.acos()
    line = (cos.abs() > colinear) | (dot(a, a, dim) == 0) | (dot(b, b, dim) == 0)
    sine = torch.where(line, 1.0, angle.sin())
    start, end = (((1 - t) * angle).sin() / sine).to(a.dtype), ((t * angle).sin() / sine).to(a.dtype)
    return torch.where(line, a + t * (b - a), start * a + end * b)


def check_count(method: str, tensors: Sequence[Tensor], expected: int, hint: str) -> None:
    """Refuse another number of tensors than a method is made for."""
    if len(tensors) != expected:
        raise ValueError(f"{method} was given {len(tensors)} tensors (base and models together): {hint}")
