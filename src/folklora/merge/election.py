"""Sign election: where task vectors disagree, those of the weaker side are left out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from folklora.merge.deltas import weighted_sum


def elected(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The sign of Σ_t w_t τ_t, entry by entry, as +1 or -1; of an exact 0, +1."""
    # not `where`: it takes ten times as long where signs are mixed
    return (weighted_sum(deltas, weights) >= 0).to(deltas[0].dtype).mul_(2).sub_(1)


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
        total.addcmul_(delta, agrees, value=w)
        if normalize:
            weight.add_(agrees, alpha=abs(w))
    # where nothing agrees both are 0
    return total.div_(weight.clamp_(min=torch.finfo(weight.dtype).tiny)) if normalize else total


def united(deltas: Sequence[Tensor], weights: Sequence[float], normalize: bool) -> Tensor:
    """Election and disjoint sum in one: what TIES does with trimmed task vectors."""
    return disjoint(deltas, weights, elected(deltas, weights), normalize)
