"""Singular vectors of task matrices: the leading ones of each, and all of them made orthogonal to one another.

Everything is in float64. Directions whose singular value is below 10⁻⁶ of the largest are none: the vectors that a
decomposition gives for them are arbitrary, and what is made of them would be, too. So a task matrix of low rank, such
as a LoRA's product, has as many directions as its rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from folklora.polar import orthogonal_part
from folklora.spectrum import Triplets, top

_NULL = 1e-6

# Directions that differ by less, as a share of the most shared one, are one direction.
_SAME = 1e-5


def leading(delta: Tensor, count: int) -> Triplets:
    """The `count` leading singular triplets of a task matrix, less if its rank is lower."""
    return nonzero(top(delta, count, dtype=torch.float64))


def nonzero(part: Triplets) -> Triplets:
    """The triplets whose singular value is not 0, up to round-off."""
    rank = int((part.S > _NULL * part.S[:1]).sum())
    return Triplets(part.U[:, :rank], part.S[:rank], part.V[:, :rank])


def orthogonalised(parts: Sequence[Triplets]) -> Triplets:
    """The tasks' triplets side by side, with U and V replaced by the nearest matrices with orthonormal columns.

    U = [U_1 | ... | U_T] = P Σ Qᵀ becomes P Qᵀ, V likewise. Directions that several tasks share to 10⁻⁵ are one: each
    of the tasks gets its part of it, so that T copies of one task merge into that task.
    """
    U, V = torch.cat([part.U for part in parts], 1), torch.cat([part.V for part in parts], 1)
    return Triplets(_polar(U), torch.cat([part.S for part in parts]), _polar(V))


def flattened(part: Triplets) -> Triplets:
    """The triplets with all singular values replaced by their mean."""
    return Triplets(part.U, part.S.mean().expand_as(part.S) if len(part.S) else part.S, part.V)


def interference(parts: Sequence[Triplets]) -> float:
    """Singular task interference, ‖(UᵀU - I) S (VᵀV - I)‖₁ summed over entries: 0 if the tasks share no direction."""
    U, V = torch.cat([part.U for part in parts], 1), torch.cat([part.V for part in parts], 1)
    identity = torch.eye(U.shape[1], dtype=U.dtype, device=U.device)
    left, right = U.mT @ U - identity, V.mT @ V - identity
    return float(((left * torch.cat([part.S for part in parts])) @ right).abs().sum())


def _polar(columns: Tensor) -> Tensor:
    return orthogonal_part(columns, columns.shape[1], tolerance=_SAME) if columns.shape[1] else columns
