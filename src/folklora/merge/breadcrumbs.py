"""Model Breadcrumbs: drop the largest and the smallest entries of each task vector; add, or elect signs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from folklora.merge.blocks import Blocks, Rows
from folklora.merge.contract import merging
from folklora.merge.deltas import mixed
from folklora.merge.election import united
from folklora.merge.sparsify import outliers


@merging(
    paper="Davari, Belilovsky 2024, arXiv 2312.06795",
    trains="nothing: the sum of deltas without both tails",
)
def breadcrumbs(
    models: Sequence[Tensor],
    base: Tensor,
    *,
    weight: Sequence[float] = (1.0,),
    density: Sequence[float] = (1.0,),
    gamma: Sequence[float] = (0.01,),
    lambda_: float = 1.0,
    normalize: bool = False,
) -> Rows:
    r"""Model Breadcrumbs: drop each task vector's outliers and its smallest entries, and add.

    Of τ_t = θ_t - θ_0 (N entries): first the int(γ_t N) of largest magnitude are dropped, then the smallest until
    int(ρ_t N) are left, exactly; θ = θ_0 + λ Σ_t w_t τ̂_t. Where ρ_t + γ_t > 1, fewer outliers are dropped; a density
    of 1 drops nothing. A tensor of less than 1/γ_t entries has no outliers. Of equal magnitudes at either threshold the
    first count as larger; mergekit, whose sort is unstable, may keep others of these entries.

    Source: Davari, Belilovsky, "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks", ECCV 2024,
    arXiv 2312.06795.

    When to choose:
        For many tasks, where a few very large entries of single tasks disturb the others. The authors tune both
        fractions on a few tasks and find that they carry over to more.

    Equation:
        \theta = \theta_0 + \lambda \sum_t w_t \, m_t \odot \tau_t, \quad
        m_t = [\, q_{1 - \gamma - \rho} < |\tau_t| \le q_{1 - \gamma} \,]

    Example:
        import torch
        from folklora.merge import breadcrumbs

        base = torch.zeros(10)
        print(breadcrumbs([torch.arange(10.0)], base, density=[0.5], gamma=[0.1]))  # 4 to 8

    Args:
        weight: w_t, a number a model.
        density: ρ_t, the fraction kept.
        gamma: γ_t, the fraction of largest entries dropped.
        lambda_: λ, the scale of the sum.
        normalize: Divide by the sum of the weights.
    """
    trimmed = outliers(Blocks.of(models, base).changes(), density, gamma)
    return trimmed.merged(lambda deltas, base: base + lambda_ * mixed(deltas, weight, normalize))


@merging(
    paper="Davari, Belilovsky 2024, arXiv 2312.06795",
    trains="nothing: deltas without both tails that agree in sign",
)
def breadcrumbs_ties(
    models: Sequence[Tensor],
    base: Tensor,
    *,
    weight: Sequence[float] = (1.0,),
    density: Sequence[float] = (1.0,),
    gamma: Sequence[float] = (0.01,),
    lambda_: float = 1.0,
    normalize: bool = False,
) -> Rows:
    r"""Model Breadcrumbs with TIES' election: drop both tails, elect a sign for each entry, add those that have it.

    τ̂_t as in `breadcrumbs`; γ = sign(Σ_t w_t τ̂_t); θ = θ_0 + λ Σ_{t: sign(w_t τ̂_t) = γ} w_t τ̂_t. With `normalize`,
    divided by the sum of the |w_t| that agree, entry by entry.

    Source: Davari, Belilovsky, "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks", ECCV 2024,
    arXiv 2312.06795; the election is that of TIES, arXiv 2306.01708. The combination is mergekit's.

    When to choose:
        As `breadcrumbs`, where the models' changes disagree in sign.

    Equation:
        \theta = \theta_0 + \lambda \sum_{t : \operatorname{sign}(w_t \hat\tau_t) = \gamma} w_t \hat\tau_t, \quad
        \gamma = \operatorname{sign}\left( \sum_t w_t \hat\tau_t \right)

    Example:
        import torch
        from folklora.merge import breadcrumbs_ties

        base = torch.zeros(10)
        print(breadcrumbs_ties([torch.arange(10.0), -torch.ones(10)], base, density=[0.5], gamma=[0.1]))

    Args:
        weight: w_t, a number a model.
        density: ρ_t, the fraction kept.
        gamma: γ_t, the fraction of largest entries dropped.
        lambda_: λ, the scale of the sum.
        normalize: Divide by the sum of the weights that agree.
    """
    trimmed = outliers(Blocks.of(models, base).changes(), density, gamma)
    return trimmed.merged(lambda deltas, base: base + lambda_ * united(deltas, weight, normalize))
