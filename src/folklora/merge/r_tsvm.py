"""R-TSVM: TSV-M with weights that heed outliers and a rank that heeds sparsity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from folklora.merge.contract import merging
from folklora.merge.deltas import deltas, mean
from folklora.merge.singular import leading, orthogonalised


@merging(
    paper="Yang et al. 2025, arXiv 2502.06876",
    trains="nothing: weighted, orthogonalised singular directions",
)
def r_tsvm(
    models: Sequence[Tensor],
    base: Tensor,
    *,
    outlier_mode: Literal["reweight", "clip", "zero", "off"] = "reweight",
    outlier_sigma: float = 3.0,
    outlier_scope: Literal["matrix", "row"] = "matrix",
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
                   held within 1/limit and limit
        clip, zero the outliers are cut to the threshold, or dropped, and no task is weighted
        sparsity   Ω = the mean over t of the fraction of |D_t| ≤ ε · max |D_t|
        rank       power: k = max(1, int((1 - Ω)^γ q / T));  linear: k = q / T · (1 + γ (1 - 2Ω)), within 1 and q / T
    Then as TSV-M on the D̃_t with k directions a task. γ = 0 and no outliers handled is TSV-M bit for bit.

    Deltas of bfloat16 checkpoints are often exactly 0 by rounding, which counts as sparsity here.

    Source: Yang, Jin, Tang et al., "Mix Data or Merge Models? Balancing the Helpfulness, Honesty, and Harmlessness of
    Large Language Model via Model Merging", 2025, arXiv 2502.06876.

    When to choose:
        For language models aligned to different aims, whose deltas have heavy tails and layers of different sparsity.
        Since the formulas are a reconstruction, compare with `tsv-m`, which has nothing to tune.

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
        outlier_mode: What outliers are for: to weight the tasks, to be cut, to be dropped, or nothing.
        outlier_sigma: c, how many standard deviations above the mean an outlier is.
        outlier_scope: Whether mean and deviation are of the matrix or of each row.
        weight_limit: The largest factor by which a task is weighted; the least is one over it.
        rank_rule: Which of the two formulas gives the rank.
        rank_gamma: γ, how strongly the rank follows the sparsity; 0 keeps int(q / T).
        sparsity_eps: ε, up to which an entry counts as unchanged.
        sparsity_scale: Whether ε is relative to the largest entry or absolute.
        lambda_: λ, the scale of the merged delta.
    """
    changes = deltas(models, base)
    most = min(base.shape) // len(models) if base.dim() == 2 else 0
    if not most:
        return base + lambda_ * mean(changes)
    share = sparsity(changes, sparsity_eps, sparsity_scale)
    count = layer_rank(most, min(base.shape) / len(models), share, rank_gamma, rank_rule)
    if outlier_mode == "reweight":
        weights = task_weights(changes, outlier_sigma, outlier_scope)
        factors = [max(1 / weight_limit, min(weight_limit, len(changes) * weight)) for weight in weights]
        changes = [change * factor for change, factor in zip(changes, factors, strict=True)]
    elif outlier_mode != "off":
        changes = [_mitigated(change, outlier_sigma, outlier_scope, outlier_mode) for change in changes]
    merged = orthogonalised([leading(change, count) for change in changes])
    return base + lambda_ * merged.dense().to(base.dtype)


def task_weights(changes: Sequence[Tensor], sigma: float, scope: str) -> list[float]:
    """ω_t, each task's share of the sum of all outliers' magnitudes; equal ones where there are none."""
    sums = []
    for change in changes:
        magnitude = change.abs()
        sums.append(float((magnitude * (magnitude > _threshold(magnitude, sigma, scope))).sum(dtype=torch.float64)))
    total = sum(sums)
    return [value / total if total else 1 / len(sums) for value in sums]


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


def _threshold(magnitude: Tensor, sigma: float, scope: str) -> Tensor:
    dim = -1 if scope == "row" else (0, 1)
    spread, centre = torch.std_mean(magnitude, dim=dim, correction=0, keepdim=True)
    return centre + sigma * spread


def _mitigated(change: Tensor, sigma: float, scope: str, mode: str) -> Tensor:
    limit = _threshold(change.abs(), sigma, scope)
    return change.clamp(-limit, limit) if mode == "clip" else change * (change.abs() <= limit)
