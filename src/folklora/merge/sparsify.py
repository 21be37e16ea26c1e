"""Sparsifiers of a task vector: what is kept of it, and how the rest makes up for what is dropped.

Masks are boolean, of the tensor's shape. `density` is the fraction that is kept; 1 or more keeps all.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Rescale = Literal["expected", "l1"]


def largest(values: Tensor, count: int) -> Tensor:
    """The mask of exactly `count` largest values, which are not negative; of equal ones, the first.

    It selects by the bits, in two passes: no sort of the whole tensor, and no limit on its size.

    Args:
        values: float32 or float64, without NaN or negative values.
        count: How many, between 0 and the number of values.
    """
    if count <= 0:
        return torch.zeros_like(values, dtype=torch.bool)
    threshold = _kth_largest(values.flatten(), count)
    mask = values > threshold
    missing = count - int(mask.sum())
    equal = (values == threshold).flatten().nonzero().flatten()[:missing]
    mask.view(-1)[equal] = True
    return mask


def magnitude(delta: Tensor, density: float) -> Tensor:
    """Keep the int(density N) entries of largest magnitude (TIES)."""
    if density >= 1:
        return delta
    return delta * largest(delta.abs(), int(_share(density) * delta.numel()))


def outliers(delta: Tensor, density: float, gamma: float) -> Tensor:
    """Drop the int(gamma N) entries of largest magnitude, and of the rest all but the int(density N) largest.

    If less than int(density N) would be left, fewer of the largest are dropped (Model Breadcrumbs).
    """
    if density >= 1:
        return delta
    size = delta.numel()
    count = int(_share(density) * size)
    top = min(int(_share(gamma, "gamma") * size), size - count)
    magnitudes = delta.abs()
    return delta * (largest(magnitudes, count + top) & ~largest(magnitudes, top))


def random(delta: Tensor, density: float, generator: torch.Generator, rescale: bool, norm: Rescale) -> Tensor:
    """Keep each entry with probability `density` (DARE).

    Args:
        delta: The task vector.
        density: The probability.
        generator: The mask is drawn on the generator's device: the same for a tensor on another device.
        rescale: Make up for what is dropped.
        norm: "expected" divides by the probability, so that the mean over masks is the task vector; "l1" scales to the
            task vector's sum of magnitudes.
    """
    if density >= 1:
        return delta
    return _thinned(delta, delta.new_full((), _share(density)), generator, rescale, norm)


def by_rank(
    delta: Tensor, density: float, epsilon: float, generator: torch.Generator, rescale: bool, norm: Rescale
) -> Tensor:
    """Keep each entry with a probability that grows with its magnitude's rank in its row (DELLA).

    p = density - epsilon + 2 epsilon (r - 1) / (n - 1) for the ranks r = 1 ... n; a tensor of one dimension is one row,
    of more than two as many as its first dimension.

    Args: those of `random`, and
        epsilon: Half of the range of p, which must lie within 0 and 1.

    Raises:
        ValueError: p would leave 0 to 1.
    """
    if density >= 1:
        return delta
    if not 0 < density - epsilon <= density + epsilon < 1:
        raise ValueError(
            f"density {density} and epsilon {epsilon} give probabilities from {density - epsilon:g} to "
            f"{density + epsilon:g}: choose them so that both lie between 0 and 1"
        )
    rows = delta.abs().flatten(1) if delta.dim() > 1 else delta.abs().reshape(1, -1)
    ranks = rows.argsort(dim=1, stable=True).argsort(dim=1).to(delta.dtype)
    share = ranks / (rows.shape[1] - 1) if rows.shape[1] > 1 else torch.full_like(ranks, 0.5)
    return _thinned(delta, (density - epsilon + 2 * epsilon * share).view_as(delta), generator, rescale, norm)


def _thinned(delta: Tensor, keep: Tensor, generator: torch.Generator, rescale: bool, norm: Rescale) -> Tensor:
    draw = torch.rand(delta.shape, generator=generator, device=generator.device, dtype=delta.dtype)
    kept = delta * (draw.to(delta.device) < keep)
    if not rescale:
        return kept
    if norm == "expected":
        return torch.where(kept == 0, 0.0, kept / keep)
    left = kept.abs().sum()
    return kept * torch.where(left > 0, delta.abs().sum() / left, 1.0)


def _kth_largest(values: Tensor, count: int) -> Tensor:
    """The count-th largest of values that are not negative: their bits, read as integers, have the same order."""
    bits = values.view(torch.int64 if values.dtype == torch.float64 else torch.int32)
    upper = bits >> (8 * values.element_size() - 16)
    reached = torch.bincount(upper, minlength=2**15).flip(0).cumsum(0)
    place = int((reached < count).sum())
    before = int(reached[place - 1]) if place else 0
    candidates = values[upper == 2**15 - 1 - place]
    return candidates.sort(descending=True).values[count - before - 1]


def _share(value: float, name: str = "density") -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}, but is a fraction between 0 and 1")
    return value
