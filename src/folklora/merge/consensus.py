"""Sign election: where task vectors disagree, those of the weaker side are left out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from folklora.merge.deltas import weighted_sum


def elected(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The sign of Σ_t w_t τ_t, entry by entry, as +1 or -1; of an exact 0, +1."""
    return torch.where(weighted_sum(deltas, weights) >= 0, 1.0, -1.0).to(deltas[0].dtype)


def disjoint(deltas: Sequence[Tensor], weights: Sequence[float], signs: Tensor, normalize: bool) -> Tensor:
    """The sum of the w_t τ_t that have the elected sign; with `normalize`, divided by the sum of their |w_t|.

    Args:
        deltas: The task vectors.
        weights: w_t, a number a task vector.
        signs: What was elected, +1 or -1 an entry.
        normalize: Divide. By |w_t|, not w_t: so a negative weight takes a task away here, too.
    """
    total, weight = torch.zeros_like(signs), torch.zeros_like(signs)
    for delta, w in zip(deltas, weights, strict=True):
        agrees = (delta * w * signs > 0).to(delta.dtype)
        total.add_(delta * agrees, alpha=w)
        if normalize:
            weight.add_(agrees, alpha=abs(w))
    return total / torch.where(weight == 0, 1.0, weight) if normalize else total


def united(deltas: Sequence[Tensor], weights: Sequence[float], normalize: bool) -> Tensor:
    """Election and disjoint sum in one: what TIES does with trimmed task vectors."""
    return disjoint(deltas, weights, elected(deltas, weights), normalize)
