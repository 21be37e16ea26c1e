"""Iso-C: the sum of the task matrices with an even spectrum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from folklora.merge.contract import merging
from folklora.merge.deltas import deltas, mean, weighted_sum
from folklora.merge.singular import flattened, nonzero
from folklora.spectrum import triplets


@merging(
    paper="Marczak et al. 2025, arXiv 2502.04959",
    trains="nothing: the deltas' sum with an even spectrum",
)
def iso_c(models: Sequence[Tensor], base: Tensor, *, weight: Sequence[float] = (1.0,), lambda_: float = 1.0) -> Tensor:
    r"""Isotropic merging in the common subspace: sum the task matrices and make all singular values equal.

    Σ_t w_t (θ_t - θ_0) = U diag(σ) Vᵀ, θ = θ_0 + λ σ̄ U Vᵀ with σ̄ = mean(σ). So the directions that few tasks need
    weigh as much as those that all share. Tensors that are no matrices get the mean of the deltas. Decompositions are
    in float64.

    Directions whose singular value is 0 stay 0 and do not count in the mean. In the authors' code they get σ̄ too, with
    the arbitrary vectors of a decomposition; that differs for sums of low rank only, such as those of LoRA.

    Source: Marczak, Magistri, Cygert et al., "No Task Left Behind: Isotropic Model Merging with Common and
    Task-Specific Subspaces", ICML 2025, arXiv 2502.04959. The best λ is between 1 and 1.5.

    When to choose:
        For four tasks and more with fully fine-tuned matrices. It has one scale to search; TSV-M has none. Noise in the
        deltas, as of bfloat16 checkpoints, is raised with everything else.

    Equation:
        \sum_t w_t (\theta_t - \theta_0) = U \operatorname{diag}(\sigma) V^\top, \quad
        \theta = \theta_0 + \lambda \, \bar\sigma \, U V^\top

    Example:
        import torch
        from folklora.merge import iso_c

        base = torch.zeros(3, 3)
        models = [torch.diag(torch.tensor([5.0, 1.0, 0.0])), torch.diag(torch.tensor([0.0, 0.0, 3.0]))]
        print(iso_c(models, base))  # 3 on the diagonal

    Args:
        weight: w_t, a number a model.
        lambda_: λ, the scale of the merged delta.
    """
    changes = deltas(models, base)
    if base.dim() != 2 or not base.numel():
        return base + lambda_ * mean(changes, weight)
    merged = flattened(nonzero(triplets(weighted_sum(changes, weight), dtype=torch.float64)))
    return base + lambda_ * merged.dense().to(base.dtype)
