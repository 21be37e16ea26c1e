"""What the merging methods have in common: task vectors, their weighted sums and means, the angles between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Lazy(Sequence[Tensor]):
    """Tensors that are computed as they are read: going through them holds one at a time.

    Args:
        compute: Gives the tensor of an index.
        count: How many there are.
    """

    def __init__(self, compute: Callable[[int], Tensor], count: int) -> None:
        self._compute, self._indices = compute, range(count)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        chosen = self._indices[index]
        if isinstance(chosen, int):
            return self._compute(chosen)
        return Lazy(lambda i: self._compute(chosen[i]), len(chosen))


def deltas(models: Sequence[Tensor], base: Tensor) -> Sequence[Tensor]:
    """The task vectors τ_t = θ_t - θ_0, computed as they are read."""
    return Lazy(lambda index: models[index] - base, len(models))


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
        raise ValueError(f"the weights {weights} sum to 0, so that no mean exists; a method's normalize must be off")
    result = first.clone()
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        result.add_(tensor - first, alpha=weight / total)
    return result


def dot(a: Tensor, b: Tensor, dim: int | None = None) -> Tensor:
    """The inner product along one dimension (kept), or of all entries, in float64.

    A long float32 sum loses the digits that a small angle is made of. Of all entries, only the rows' sums are added up
    in float64, which takes a third of the time: torch adds up a row of n entries as a tree, with an error of about
    √(log2 n) of float32's for each, and the rows' errors are independent.
    """
    if dim is None:
        return (a * b).sum(-1).sum(dtype=torch.float64)
    return (a * b).sum(dim, keepdim=True, dtype=torch.float64)


def gram(tensors: Sequence[Tensor], dim: int | None = None) -> Tensor:
    """The inner products of all pairs, [T, T, ...] in float64, along one dimension or of all entries."""
    pairs = {(i, j): dot(tensors[i], tensors[j], dim) for i in range(len(tensors)) for j in range(i + 1)}
    return torch.stack(
        [torch.stack([pairs[max(i, j), min(i, j)] for j in range(len(tensors))]) for i in range(len(tensors))]
    )


def cosines(gram: Tensor) -> Tensor:
    """The cosines of the angles, from inner products; 0 where a vector is zero."""
    squares = gram.diagonal().movedim(-1, 0)
    lengths = (squares.unsqueeze(0) * squares.unsqueeze(1)).sqrt()
    return torch.where(lengths > 0, gram / lengths, 0.0).clamp(-1, 1)


def arc(gram: Tensor, t: float, colinear: float = 1 - 1e-12) -> Callable[[Tensor, Tensor], Tensor]:
    """The point at t on the arc from a to b: sin((1-t) Ω) / sin Ω · a + sin(t Ω) / sin Ω · b, as a function of both.

    Args:
        gram: The inner products of a and b, [2, 2, ...]; the function takes the same vectors, or corresponding parts.
        t: How far: 0 is a and 1 is b.
        colinear: Above this |cos Ω|, and where a vector is zero, the line a + t (b - a).
    """
    cos = cosines(gram)[0, 1]
    angle = cos.acos()
    line = (cos.abs() > colinear) | (gram[0, 0] == 0) | (gram[1, 1] == 0)
    sine = torch.where(line, 1.0, angle.sin())
    start, end = ((1 - t) * angle).sin() / sine, (t * angle).sin() / sine

    def point(a: Tensor, b: Tensor) -> Tensor:
        if line.all():
            return (b - a).mul_(t).add_(a)
        result = (start.to(a.dtype) * a).addcmul_(end.to(b.dtype), b)
        return torch.where(line, a + t * (b - a), result) if line.any() else result

    return point


def check_count(method: str, tensors: Sequence[Tensor], expected: int, hint: str) -> None:
    """Refuse another number of tensors than a method is made for."""
    if len(tensors) != expected:
        raise ValueError(f"{method} was given {len(tensors)} tensors (base and models together): {hint}")
