"""Sparsifiers of task vectors: what is kept of each, and how the rest makes up for what is dropped.

They take and give `Blocks` of task vectors. `density` is the fraction that is kept of each; 1 or more keeps all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from folklora.merge.blocks import Blocks

Rescale = Literal["expected", "l1"]
Thin = Callable[[Tensor, torch.Generator], Tensor]

_DIGIT = 16  # bits of a value that are counted in one pass


class Largest:
    """Which entries of each tensor are its largest; of equal ones, the first.

    They are found by their bits, 16 in a pass: the bits of values that are not negative have the values' order. So
    there is no sort, no copy of a whole tensor, and no limit on its size.

    Args:
        values: float32 or float64, without NaN or negative values.
        counts: How many of each tensor, between 0 and the number of its values.
    """

    def __init__(self, values: Blocks, counts: Sequence[int]) -> None:
        # of each: the upper bits of its threshold as far as they are known; how many have these bits and are kept
        known, self._equal = [0] * len(counts), [max(count, 1) for count in counts]
        first, _ = next(iter(values))
        size = first[0].element_size() * 8
        for shift in range(size - _DIGIT, -1, -_DIGIT):
            histograms = values.total(lambda tensors, at=shift, upper=tuple(known): _histograms(tensors, upper, at))
            for index, histogram in enumerate(histograms):
                reached = histogram.flip(0).cumsum(0)
                place = int((reached < self._equal[index]).sum())
                self._equal[index] -= int(reached[place - 1]) if place else 0
                known[index] = known[index] << _DIGIT | (len(histogram) - 1 - place)
        bits = torch.tensor(known, dtype=_bits_of(first[0]))
        found = torch.where(torch.tensor(counts) > 0, bits.view(first[0].dtype), torch.inf)
        self._thresholds = found.to(first[0].device)

    def masks(self) -> Callable[[Sequence[Tensor]], list[Tensor]]:
        """Begin a pass: the function takes each block's values, in order, and gives their masks."""
        left = list(self._equal)

        def mask(index: int, values: Tensor) -> Tensor:
            chosen = values > self._thresholds[index]
            if left[index] > 0:
                equal = (values == self._thresholds[index]).flatten().nonzero().flatten()[: left[index]]
                chosen.view(-1)[equal] = True
                left[index] -= len(equal)
            return chosen

        return lambda tensors: [mask(index, values) for index, values in enumerate(tensors)]


def magnitude(changes: Blocks, density: Sequence[float]) -> Blocks:
    """Keep the int(density N) entries of largest magnitude of each (TIES)."""
    if min(density) >= 1:
        return changes
    size = changes.shape.numel()
    largest = Largest(changes.each(_magnitudes), [int(_share(rho) * size) for rho in density])

    def begin() -> Callable[[Sequence[Tensor]], list[Tensor]]:
        masks = largest.masks()
        return lambda deltas: [delta * mask for delta, mask in zip(deltas, masks(_magnitudes(deltas)), strict=True)]

    return changes.each_pass(begin)


def outliers(changes: Blocks, density: Sequence[float], gamma: Sequence[float]) -> Blocks:
    """Drop the int(gamma N) entries of largest magnitude of each, and of the rest all but the int(density N) largest.

    If less than int(density N) would be left, fewer of the largest are dropped (Model Breadcrumbs).
    """
    if min(density) >= 1:
        return changes
    size = changes.shape.numel()
    counts = [int(_share(rho) * size) for rho in density]
    tops = [min(int(_share(g, "gamma") * size), size - count) for g, count in zip(gamma, counts, strict=True)]
    twice = [count + top for count, top in zip(counts, tops, strict=True)] + tops
    largest = Largest(changes.each(lambda deltas: _magnitudes(deltas) * 2), twice)

    def begin() -> Callable[[Sequence[Tensor]], list[Tensor]]:
        masks = largest.masks()

        def drop(deltas: Sequence[Tensor]) -> list[Tensor]:
            chosen = masks(_magnitudes(deltas) * 2)
            pairs = zip(chosen[: len(deltas)], chosen[len(deltas) :], strict=True)
            return [delta * (kept & ~top) for delta, (kept, top) in zip(deltas, pairs, strict=True)]

        return drop

    return changes.each_pass(begin)


def random(
    changes: Blocks, density: Sequence[float], generator: Sequence[torch.Generator], rescale: bool, norm: Rescale
) -> Blocks:
    """Keep each entry with probability `density` (DARE).

    Args:
        changes: The task vectors.
        density: The probability, for each.
        generator: The mask is drawn on the generator's device: the same for a tensor on another device.
        rescale: Make up for what is dropped.
        norm: "expected" divides by the probability, so that the mean over masks is the task vector; "l1" scales to the
            task vector's sum of magnitudes.
    """
    expected = rescale and norm == "expected"

    def thin(rho: float) -> Thin:
        return lambda delta, source: _drawn(delta, rho, source, expected and rho > 0)

    thins = [None if rho >= 1 else thin(_share(rho)) for rho in density]
    return _thinned(changes, thins, generator, rescale and norm == "l1")


def by_rank(
    changes: Blocks,
    density: Sequence[float],
    epsilon: Sequence[float],
    generator: Sequence[torch.Generator],
    rescale: bool,
    norm: Rescale,
) -> Blocks:
    """Keep each entry with a probability that grows with its magnitude's rank in its row (DELLA).

    p = density - epsilon + 2 epsilon (r - 1) / (n - 1) for the ranks r = 1 ... n; a tensor of one dimension is one row,
    of more than two as many as its first dimension.

    Args: those of `random`, and
        epsilon: Half of the range of p, which must lie within 0 and 1.

    Raises:
        ValueError: p would leave 0 to 1.
    """
    expected = rescale and norm == "expected"

    def thin(rho: float, eps: float) -> Thin:
        if not 0 < rho - eps <= rho + eps < 1:
            raise ValueError(
                f"density {rho} and epsilon {eps} give probabilities from {rho - eps:g} to {rho + eps:g}: "
                "choose them so that both lie between 0 and 1"
            )
        return lambda delta, source: _drawn(delta, rho - eps + 2 * eps * _ranks(delta), source, expected)

    thins = [None if rho >= 1 else thin(rho, eps) for rho, eps in zip(density, epsilon, strict=True)]
    return _thinned(changes, thins, generator, rescale and norm == "l1")


def _thinned(
    changes: Blocks, thins: Sequence[Thin | None], generator: Sequence[torch.Generator], keep_sum: bool
) -> Blocks:
    """What is kept of each task vector, scaled to its sum of magnitudes if wanted; all of it where `thins` is None."""

    def thinned(deltas: Sequence[Tensor], sources: Sequence[torch.Generator]) -> list[Tensor]:
        each = zip(deltas, thins, sources, strict=True)
        return [delta if thin is None else thin(delta, source) for delta, thin, source in each]

    if not keep_sum:
        return changes.each(lambda deltas: thinned(deltas, generator))
    ahead = [torch.Generator(source.device).set_state(source.get_state()) for source in generator]
    before, after = changes.total(lambda deltas: torch.stack([_sums(deltas), _sums(thinned(deltas, ahead))]))
    factors = torch.where(after > 0, before / after, 1.0).tolist()
    return changes.each(
        lambda deltas: [kept * factor for kept, factor in zip(thinned(deltas, generator), factors, strict=True)]
    )


def _drawn(delta: Tensor, keep: Tensor | float, generator: torch.Generator, divide: bool) -> Tensor:
    draw = torch.rand(delta.shape, generator=generator, device=generator.device, dtype=delta.dtype)
    kept = delta * (draw.to(delta.device) < keep)
    return kept.div_(keep) if divide else kept


def _ranks(delta: Tensor) -> Tensor:
    """Ranks by magnitude in each row, from 0 to 1."""
    rows = delta.abs().flatten(1) if delta.dim() > 1 else delta.abs().reshape(1, -1)
    ranks = rows.argsort(dim=1, stable=True).argsort(dim=1).to(delta.dtype)
    share = ranks / (rows.shape[1] - 1) if rows.shape[1] > 1 else torch.full_like(ranks, 0.5)
    return share.view(delta.shape)


def _magnitudes(deltas: Sequence[Tensor]) -> list[Tensor]:
    return [delta.abs().contiguous() for delta in deltas]


def _sums(deltas: Sequence[Tensor]) -> Tensor:
    return torch.stack([delta.abs().sum(dtype=torch.float64) for delta in deltas])


def _bits_of(values: Tensor) -> torch.dtype:
    return torch.int64 if values.dtype == torch.float64 else torch.int32


def _histograms(tensors: Sequence[Tensor], upper: Sequence[int], shift: int) -> Tensor:
    """How often each digit occurs at `shift`, for each tensor among the values whose bits above it are `upper`."""
    found = []
    for values, known in zip(tensors, upper, strict=True):
        bits = values.flatten().view(_bits_of(values))
        top = shift + _DIGIT == values.element_size() * 8
        digits = bits >> shift if top else (bits[bits >> (shift + _DIGIT) == known] >> shift) & (2**_DIGIT - 1)
        found.append(torch.bincount(digits, minlength=2**_DIGIT))
    return torch.stack(found)


def _share(value: float, name: str = "density") -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}, but is a fraction between 0 and 1")
    return value
