"""R-TSVM: TSV-M with weights that heed outliers and a rank that heeds sparsity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from folklora.merge.contract import merging
from folklora.merge.deltas import deltas, mean
from folklora.merge.singular import leading, orthogonalised

_TINY = torch.finfo(torch.float64).tiny


@merging(
    paper="Yang et al. 2025, arXiv 2502.06876",
    trains="nothing: weighted, orthogonalised singular directions",
)
def r_tsvm(
    models: Sequence[Tensor],
    base: Tensor,
    *,
    outlier_mode: Literal["reweight", "inverse", "clip", "zero", "off"] = "reweight",
    outlier_sigma: float = 3.0,
    outlier_scope: Literal["matrix", "row"] = "matrix",
    weight_measure: Literal["sum", "share"] = "sum",
    weight_scope: Literal["matrix", "row"] = "matrix",
    weight_limit: float = 2.0,
    rank_rule: Literal["power", "linear"] = "power",
    rank_gamma: float = 1.0,
    sparsity_eps: float = 1e-2,
    sparsity_scale: Literal["relative", "absolute"] = "relative",
    lambda_: float = 1.0,
) -> Tensor:
    r"""R-TSVM (RESM): TSV-M in which tasks are weighted by their outliers and the rank follows each layer's sparsity.

    A reconstruction: the paper's abstract names the two parts and no code is published, so each formula below is
    ours and every choice an option. D_t = θ_t - θ_0 [m, n], q = min(m, n).
        outliers   O_t = {|D_t| > mean |D_t| + c · std |D_t|}, of the matrix or of each row
        reweight   a_t = Σ_{O_t} |D_t|,  ω_t = a_t / Σ_s a_s (1/T where all are 0);  D̃_t = T ω_t D_t, the factor T ω_t
                   held within 1/limit and limit; by measure, a_t is that sum or its share of Σ |D_t|, which does not
                   depend on how far a task moved; by scope, it is of the matrix or of each row
        inverse    the same with ω_t = (1 / a_t) / Σ_s (1 / a_s): outliers are noise, and tasks that have most of them
                   count least
        clip, zero the outliers are cut to the threshold, or dropped, and no task is weighted
        sparsity   Ω = the mean over t of the fraction of |D_t| ≤ ε · max |D_t|
        rank       power: k = max(1, int((1 - Ω)^γ q / T));  linear: k = q / T · (1 + γ (1 - 2Ω)), within 1 and q / T
    Then as TSV-M on the D̃_t with k directions a task. γ = 0 and no outliers handled is TSV-M bit for bit.

    Deltas of bfloat16 checkpoints are often exactly 0 by rounding, which counts as sparsity here.

    Source: Yang, Jin, Tang et al., "Mix Data or Merge Models? Balancing the Helpfulness, Honesty, and Harmlessness of
    Large Language Model via Model Merging", 2025, arXiv 2502.06876.

    When to choose:
        For language models aligned to different aims, whose deltas have heavy tails and layers of different sparsity.
        Since the formulas are a reconstruction, compare with `tsv-m`, which has nothing to tune. On models that were
        tuned at different learning rates the default weights cost ten points in our benchmark, since the one that
        moved furthest has most outliers; `outlier_mode="inverse"` was level with TSV-M there.

    Equation:
        \theta = \theta_0 + \lambda U_\perp \operatorname{diag}(S_1, \ldots, S_T) V_\perp^\top, \quad
        \tilde D_t = T \omega_t D_t = U_t \operatorname{diag}(S_t) V_t^\top + \cdots
        \omega_t = \frac{\sum_{O_t} |D_t|}{\sum_s \sum_{O_s} |D_s|}, \quad
        k = \max(1, \lfloor (1 - \Omega)^\gamma q / T \rfloor)

    Example:
        import torch
        from folklora.merge import r_tsvm

        base = torch.zeros(12, 8)
        models = [torch.randn(12, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
        print(torch.linalg.svdvals(r_tsvm(models, base, outlier_mode="clip")))

    Args:
        outlier_mode: What outliers are for: to weight the tasks by them or against them, to be cut, to be dropped, or
            nothing.
        outlier_sigma: c, how many standard deviations above the mean an outlier is.
        outlier_scope: Whether mean and deviation are of the matrix or of each row.
        weight_measure: Whether a_t is the sum of the outliers' magnitudes or its share of all magnitudes.
        weight_scope: Whether a task has one weight for the matrix or one for each row.
        weight_limit: The largest factor by which a task is weighted; the least is one over it.
        rank_rule: Which of the two formulas gives the rank.
        rank_gamma: γ, how strongly the rank follows the sparsity; 0 keeps int(q / T).
        sparsity_eps: ε, up to which an entry counts as unchanged.
        sparsity_scale: Whether ε is relative to the largest entry or absolute.
        lambda_: λ, the scale of the merged delta.
    """
    if weight_limit < 1:
        raise ValueError(f"weight_limit is {weight_limit}, but the largest factor of a task must be at least 1")
    if rank_gamma < 0:
        raise ValueError(f"rank_gamma is {rank_gamma}, but it must be at least 0, which leaves the rank as it is")
    changes = deltas(models, base)
    most = min(base.shape) // len(models) if base.dim() == 2 else 0
    if not most:
        return base + lambda_ * mean(changes)
    share = sparsity(changes, sparsity_eps, sparsity_scale)
    count = layer_rank(most, min(base.shape) / len(models), share, rank_gamma, rank_rule)
    if outlier_mode in ("reweight", "inverse"):
        weights = task_weights(changes, outlier_sigma, outlier_scope, measure=weight_measure, of=weight_scope)
        if outlier_mode == "inverse":
            weights = _inverse(weights)
        factors = (len(changes) * weights).clamp(1 / weight_limit, weight_limit).to(base.dtype)
        changes = [change * factor for change, factor in zip(changes, factors, strict=True)]
    elif outlier_mode != "off":
        changes = [_mitigated(change, outlier_sigma, outlier_scope, outlier_mode) for change in changes]
    merged = orthogonalised([leading(change, count) for change in changes])
    return base + lambda_ * merged.dense().to(base.dtype)


def task_weights(
    changes: Sequence[Tensor], sigma: float, scope: str, *, measure: str = "sum", of: str = "matrix"
) -> Tensor:
    """ω_t, each task's share of all tasks' outliers; equal ones where there are none.

    Args:
        changes: D_t [m, n].
        sigma: c.
        scope: Of the thresholds, "matrix" or "row".
        measure: "sum", or "share": the sum of the outliers' magnitudes divided by that of all.
        of: "matrix" or "row".

    Returns:
        [T, 1, 1], or [T, m, 1] of rows, in float64.
    """
    dim = -1 if of == "row" else (0, 1)
    found = []
    for change in changes:
        magnitude = change.abs()
        outlying = magnitude * (magnitude > _threshold(magnitude, sigma, scope))
        amount = outlying.sum(dim, keepdim=True, dtype=torch.float64)
        if measure == "share":
            amount = amount / magnitude.sum(dim, keepdim=True, dtype=torch.float64).clamp_min(_TINY)
        found.append(amount)
    return _shares(torch.stack(found))


def sparsity(changes: Sequence[Tensor], eps: float, scale: str) -> float:
    """Ω, the mean over tasks of the fraction of entries that count as unchanged."""
    limits = [eps * change.abs().max() if scale == "relative" else eps for change in changes]
    shares = [float((change.abs() <= limit).double().mean()) for change, limit in zip(changes, limits, strict=True)]
    return sum(shares) / len(shares)


def layer_rank(most: int, quotient: float, share: float, gamma: float, rule: str) -> int:
    """k, how many directions a task keeps in a layer with the share Ω of unchanged entries.

    Args:
        most: int(q / T), the most that leaves room for orthonormal columns.
        quotient: q / T.
        share: Ω.
        gamma: γ.
        rule: "power" or "linear".
    """
    if rule == "power":
        return max(1, min(most, int((1 - share) ** gamma * quotient)))
    return max(1, min(most, round(quotient * (1 + gamma * (1 - 2 * share)))))


def _shares(amounts: Tensor) -> Tensor:
    total = amounts.sum(0)
    return torch.where(total > 0, amounts / total.clamp_min(_TINY), 1 / len(amounts))


def _inverse(weights: Tensor) -> Tensor:
    # a task without outliers is weighted as one that has a billionth of them
    return _shares(1 / weights.clamp_min(1e-9))


def _threshold(magnitude: Tensor, sigma: float, scope: str) -> Tensor:
    dim = -1 if scope == "row" else (0, 1)
    spread, centre = torch.std_mean(magnitude, dim=dim, correction=0, keepdim=True)
    return centre + sigma * spread


def _mitigated(change: Tensor, sigma: float, scope: str, mode: str) -> Tensor:
    limit = _threshold(change.abs(), sigma, scope)
    return change.clamp(-limit, limit) if mode == "clip" else change * (change.abs() <= limit)
