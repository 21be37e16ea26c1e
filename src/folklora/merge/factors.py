"""Merging in factor space: adapters in LoRA's form into one, without ever building a weight's update [out, in].

The update of task t is D_t = B_t diag(s_t) A_t, rank r_t. Sums are concatenations, exactly. What needs singular vectors
works on QR factors of the stacked A_tᵀ and B_t, R = Σ_t r_t columns each, in float64: O((out + in) R² + R³), where the
dense way is O(out · in · min(out, in)) for each task. Each function is the method of the same name in `folklora.merge`
applied to the D_t, to round-off; its result is an adapter's update again, which `truncate` cuts to a rank.

    parts = [layer_of_task_1, layer_of_task_2, ...]   # Factors of one layer
    A, B = tsv_m(parts).to_lora()
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from folklora.factored import Factors, concatenate
from folklora.merge.singular import flattened, nonzero, orthogonalised
from folklora.merge.twin_merging import scale_of
from folklora.merge.wudi import wudi_closed_form as dense_wudi_closed_form
from folklora.spectrum import Triplets


def task_arithmetic(parts: Sequence[Factors], *, weight: Sequence[float] = (1.0,), lambda_: float = 1.0) -> Factors:
    """λ Σ_t w_t D_t, of rank R.

    Args:
        parts: One layer's update in each adapter, all of one shape [out, in].
        weight: w_t, a number an adapter, or one for all.
        lambda_: λ, the scale of the sum.

    Raises:
        ValueError: There are no parts, their shapes differ, or there are not as many weights.
    """
    weights = _checked(parts, weight)
    return concatenate([part.scale(lambda_ * w) for part, w in zip(parts, weights, strict=True)])


def average(parts: Sequence[Factors], *, weight: Sequence[float] = (1.0,)) -> Factors:
    """Σ_t w_t D_t / Σ_t w_t, of rank R: what the average of the models adds to their base.

    Args: those of `task_arithmetic`.

    Raises:
        ValueError: As there, or the weights sum to 0.
    """
    total = sum(_checked(parts, weight))
    if total == 0:
        raise ValueError(f"the weights {list(weight)} sum to 0, so that no mean exists")
    return task_arithmetic(parts, weight=weight, lambda_=1 / total)


def truncated(parts: Sequence[Factors], rank: int, *, weight: Sequence[float] = (1.0,)) -> Factors:
    """The best approximation of Σ_t w_t D_t of a rank.

    Args: those of `task_arithmetic`, and
        rank: The rank, at least 1.
    """
    return task_arithmetic(parts, weight=weight).truncate(rank)


def tsv_m(parts: Sequence[Factors], *, lambda_: float = 1.0) -> Factors:
    """TSV-M: each adapter's leading singular directions, made orthogonal to one another.

    Of each one min(int(min(out, in) / T), r_t) are kept: at LoRA's ranks, all.

    Args: those of `task_arithmetic`.
    """
    _checked(parts)
    count = min(parts[0].B.shape[0], parts[0].A.shape[1]) // len(parts)
    if not count:
        return task_arithmetic(parts, lambda_=lambda_ / len(parts))
    each = [_triplets(part) for part in parts]
    leading = [Triplets(part.U[:, :count], part.S[:count], part.V[:, :count]) for part in each]
    return _factors(orthogonalised(leading), parts, lambda_)


def iso_c(parts: Sequence[Factors], *, weight: Sequence[float] = (1.0,), lambda_: float = 1.0) -> Factors:
    """Iso-C: the sum of the updates with all its singular values, those that are not 0, equal.

    Args: those of `task_arithmetic`.
    """
    return _factors(flattened(_triplets(task_arithmetic(parts, weight=weight))), parts, lambda_)


def wudi_closed_form(parts: Sequence[Factors], *, lambda_: float = 1.0) -> Factors:
    """WUDI's objective solved: what interferes least with each adapter on the inputs that its A reads.

    With the stacked A = C Qᵀ, the D_t and the answer lie in the span of Q [in, R]: it is solved for B_t diag(s_t) C_t
    [out, R], the same problem with R inputs.

    Args: those of `task_arithmetic`.
    """
    _checked(parts)
    Q, R = torch.linalg.qr(torch.cat([part.A for part in parts]).double().T)
    rows = R.T.split([part.rank for part in parts])
    inner = [(part.B * part.s).double() @ C for part, C in zip(parts, rows, strict=True)]
    merged = dense_wudi_closed_form(inner, torch.zeros_like(inner[0]), lambda_=lambda_)
    dtype = _dtype(parts)
    return Factors(Q.T.to(dtype), 1.0, merged.to(dtype))


def twin_merging(
    parts: Sequence[Factors], *, shared: str = "task-arithmetic", lambda_: float | None = None, rank: int = 8
) -> tuple[Factors, list[Factors]]:
    """Twin-Merging: the merged update D*, and of each adapter the best approximation of D_t - D* of a rank.

    D_t - D* lies in the span of all the factors: from rank R on it is exact.

    Args: those of `task_arithmetic`, and
        shared: The name of the function here that merges D*.
        lambda_: Its scale; None takes 0.3 for task arithmetic, and the function's own default otherwise.
        rank: The most that is kept of each adapter, at least 1.

    Raises:
        ValueError: There are no parts, their shapes differ, or there is no such function, scale or rank.
    """
    if shared not in MERGES:
        raise ValueError(f"adapters are merged as factors by {', '.join(MERGES)}, not by '{shared}'")
    merged = MERGES[shared](parts, **scale_of(shared, MERGES[shared], lambda_))
    rank = min(rank, sum(part.rank for part in parts))
    return merged.compact(), [concatenate([part, merged.scale(-1.0)]).truncate(rank).compact() for part in parts]


MERGES: dict[str, Callable[..., Factors]] = {
    merge.__name__.replace("_", "-"): merge for merge in (task_arithmetic, average, tsv_m, iso_c, wudi_closed_form)
}


def _triplets(part: Factors) -> Triplets:
    U, S, Vh = part.svd()
    return nonzero(Triplets(U, S, Vh.mT))


def _factors(part: Triplets, parts: Sequence[Factors], scale: float) -> Factors:
    dtype = _dtype(parts)
    return Factors(part.V.mT.to(dtype), (scale * part.S).to(dtype), part.U.to(dtype))


def _dtype(parts: Sequence[Factors]) -> torch.dtype:
    """float32, or float64 where a factor is."""
    double = any(torch.float64 in (part.A.dtype, part.B.dtype) for part in parts)
    return torch.float64 if double else torch.float32


def _checked(parts: Sequence[Factors], weight: Sequence[float] = (1.0,)) -> list[float]:
    """One weight a part."""
    if not parts:
        raise ValueError("there is no adapter to merge")
    shapes = {(part.B.shape[0], part.A.shape[1]) for part in parts}
    if len(shapes) > 1:
        raise ValueError(f"updates of one shape [out, in] are needed, not {', '.join(map(str, sorted(shapes)))}")
    weights = list(weight) * (len(parts) if len(weight) == 1 else 1)
    if len(weights) != len(parts):
        raise ValueError(
            f"one weight an adapter is needed: there are {len(parts)} adapters, but {len(weights)} weights"
        )
    return weights
