"""What merging is compared with: choosing the data for one model that is trained on all aims at once.

Three ways to mix preference or instruction data of several aims (axes: helpful, honest, harmless), from "Mix Data or
Merge Models?" (Yang et al. 2025, arXiv 2502.06876), as functions of a table with a row for each example. Which
functions the authors used is not published in full: these are the plain readings. Each gives the rows to keep, in their
order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def by_quota(axis: Tensor, quota: Sequence[int] | None = None, *, generator: torch.Generator) -> Tensor:
    """Heuristic mixing: so many examples of each axis, drawn without replacement.

    Args:
        axis: [n], the axis that each example is of, 0 ... a - 1.
        quota: How many of each axis; None takes as many of each as the smallest has.
        generator: Of the draw.

    Returns:
        Row numbers, ascending.

    Raises:
        ValueError: An axis has less examples than its quota.
    """
    sizes = torch.bincount(axis).tolist()
    quota = [min(sizes)] * len(sizes) if quota is None else list(quota)
    if len(quota) != len(sizes) or any(want > size for want, size in zip(quota, sizes, strict=True)):
        raise ValueError(f"the axes have {sizes} examples, which does not allow quotas of {quota}")
    kept = []
    for index, want in enumerate(quota):
        rows = (axis == index).nonzero().flatten()
        kept.append(rows[torch.randperm(len(rows), generator=generator)[:want]])
    return torch.cat(kept).sort().values


def by_reward(scores: Tensor, fraction: float, *, weight: Sequence[float], floor: float = -torch.inf) -> Tensor:
    """Selection by a reward model of several objectives (ArmoRM, Wang et al. 2024, arXiv 2406.12845).

    Of the examples whose score is at least `floor` on every axis, those with the largest Σ_a w_a s_a(x).

    Args:
        scores: [n, a], s_a(x).
        fraction: Of all n, how many to keep; less are kept if less pass the floor.
        weight: w_a, a number an axis.
        floor: The least score on each axis.

    Returns:
        Row numbers, ascending; of equal sums the first rows are kept.

    Raises:
        ValueError: The fraction is not within 0 and 1, or the weights are not one an axis.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction is {fraction}, but must lie between 0 and 1")
    if len(weight) != scores.shape[1]:
        raise ValueError(f"there are {scores.shape[1]} axes, but {len(weight)} weights")
    passed = (scores >= floor).all(1).nonzero().flatten()
    total = scores[passed].double() @ torch.tensor(weight, dtype=torch.float64)
    order = total.argsort(descending=True, stable=True)[: int(fraction * len(scores))]
    return passed[order].sort().values


def by_agreement(margins: Tensor, conflicts: int = 0) -> Tensor:
    """Selection of examples on which the axes agree (after Hummer, Jiang et al. 2024, arXiv 2405.11647).

    Args:
        margins: [n, a], how much better the chosen answer is than the rejected one on each axis; negative where the
            axis would choose the other.
        conflicts: The number of axes with a negative margin up to which an example is kept.

    Returns:
        Row numbers, ascending.
    """
    return ((margins < 0).sum(1) <= conflicts).nonzero().flatten()
