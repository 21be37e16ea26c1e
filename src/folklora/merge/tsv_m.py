"""TSV-M: the leading singular directions of each task, made orthogonal to one another."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from folklora.merge.contract import merging
from folklora.merge.deltas import deltas, mean
from folklora.merge.singular import leading, orthogonalised


@merging(
    paper="Gargiulo et al. 2025, arXiv 2412.00081",
    trains="nothing: orthogonalised singular directions",
)
def tsv_m(models: Sequence[Tensor], base: Tensor, *, lambda_: float = 1.0) -> Tensor:
    r"""Task singular vectors, merged: keep each task's leading singular directions and make those of all orthogonal.

    Of each task matrix D_t = θ_t - θ_0 [m, n], q = min(m, n), the k = int(q / T) leading singular triplets
    U_t [m, k], S_t, V_t [n, k] are kept. Side by side, U = [U_1 | ... | U_T] and V; each is replaced by the nearest
    matrix with orthonormal columns, its polar factor U_⊥ = P Qᵀ of U = P Σ Qᵀ, and
        θ = θ_0 + λ U_⊥ diag(S_1, ..., S_T) V_⊥ᵀ
    whose singular values are those that were kept. Tensors that are no matrices, and matrices with q < T, get the mean
    of the deltas. λ = 1 needs no search. Decompositions are in float64.

    The reference code also keeps directions whose singular value is 0, where the result is arbitrary: here a task of
    low rank has no more directions than its rank, and what several tasks share exactly is one direction, so that T
    copies of one model give its leading part. Embeddings and heads are better averaged: name them in the recipe.

    Source: Gargiulo, Crisostomi, Bucarelli et al., "Task Singular Vectors: Reducing Task Interference in Model
    Merging", CVPR 2025, arXiv 2412.00081.

    When to choose:
        For four tasks and more, when only weights are there: the best of the static methods on published figures,
        with nothing to tune. It costs a decomposition of each task's every matrix; LoRA adapters merge without
        (`folklora.merge.factors`). The models should have moved about equally far: one that was tuned at a higher
        rate rules the sum, and bringing the deltas to one norm first then helps more than the choice of a method.

    Equation:
        \theta = \theta_0 + \lambda U_\perp \operatorname{diag}(S_1, \ldots, S_T) V_\perp^\top, \quad
        U_\perp = \operatorname{argmin}_{X^\top X = I} \| X - [U_1 | \cdots | U_T] \|_F

    Example:
        import torch
        from folklora.merge import tsv_m

        base = torch.zeros(8, 6)
        models = [torch.randn(8, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
        print(torch.linalg.svdvals(tsv_m(models, base)))  # the two largest of each model's

    Args:
        lambda_: λ, the scale of the merged delta.
    """
    changes = deltas(models, base)
    count = min(base.shape) // len(models) if base.dim() == 2 else 0
    if not count:
        return base + lambda_ * mean(changes)
    merged = orthogonalised([leading(change, count) for change in changes])
    return base + lambda_ * merged.dense().to(base.dtype)
