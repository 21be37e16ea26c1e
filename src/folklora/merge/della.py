"""DELLA: drop at random, the small entries of a row more often; then elect signs as TIES does, or add."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from folklora.merge.blocks import Blocks, Rows
from folklora.merge.contract import merging
from folklora.merge.deltas import mixed
from folklora.merge.election import united
from folklora.merge.sparsify import Rescale, by_rank


@merging(
    paper="Deep et al. 2024, arXiv 2406.11617",
    trains="nothing: deltas thinned by rank that agree in sign",
)
def della(
    models: Sequence[Tensor],
    base: Tensor,
    *,
    generator: Sequence[torch.Generator],
    weight: Sequence[float] = (1.0,),
    density: Sequence[float] = (1.0,),
    epsilon: Sequence[float] = (0.15,),
    lambda_: float = 1.0,
    normalize: bool = True,
    rescale: bool = True,
    rescale_norm: Rescale = "expected",
) -> Rows:
    r"""DELLA: drop entries with a probability that falls with their magnitude's rank, elect signs, take the mean.

    In each row of τ_t = θ_t - θ_0 (n entries, ranks r = 1 ... n by magnitude, n the largest):
        p = ρ_t - ε_t + 2 ε_t (r - 1) / (n - 1), on average ρ_t;   m ~ Bernoulli(p);   τ̂_t = m ⊙ τ_t / p
    then TIES' election and disjoint mean, γ = sign(Σ_t w_t τ̂_t):
        θ = θ_0 + λ Σ_{t: sign(w_t τ̂_t) = γ} w_t τ̂_t / Σ_{the same t} |w_t|

    mergekit rescales by one factor a tensor, which keeps the sum of magnitudes: `rescale_norm` "l1".

    Source: Deep, Bhardwaj, Poria, "DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based
    Sampling", arXiv 2406.11617.

    When to choose:
        Where DARE is, but magnitudes tell what matters. One option more to tune; with ε near 0 it is DARE.

    Equation:
        p_r = \rho - \epsilon + 2 \epsilon \frac{r - 1}{n - 1}, \quad
        \hat\tau_t = \frac{m_t \odot \tau_t}{p}, \quad m_t \sim \operatorname{Bernoulli}(p)
        \theta = \theta_0 + \lambda \frac{\sum_{t \in A} w_t \hat\tau_t}{\sum_{t \in A} |w_t|}

    Example:
        import torch
        from folklora.merge import della

        base = torch.zeros(4, 4)
        generator = [torch.Generator().manual_seed(seed) for seed in range(2)]
        models = [base + torch.arange(4.0), base - torch.arange(4.0)]
        print(della(models, base, generator=generator, density=[0.5]))

    Args:
        generator: Where each model's mask is drawn from.
        weight: w_t, a number a model.
        density: ρ_t, the mean probability that an entry is kept.
        epsilon: ε_t, how far the probability goes below and above ρ_t; both ends must lie between 0 and 1.
        lambda_: λ, the scale of the merged task vector.
        normalize: Divide by the sum of the weights that agree.
        rescale: Make up for what is dropped.
        rescale_norm: "expected" divides by p; "l1" keeps the sum of magnitudes.
    """
    thinned = by_rank(Blocks.of(models, base).changes(), density, epsilon, generator, rescale, rescale_norm)
    return thinned.merged(lambda deltas, base: base + lambda_ * united(deltas, weight, normalize))


@merging(
    paper="Deep et al. 2024, arXiv 2406.11617",
    trains="nothing: the sum of deltas thinned by rank",
)
def della_linear(
    models: Sequence[Tensor],
    base: Tensor,
    *,
    generator: Sequence[torch.Generator],
    weight: Sequence[float] = (1.0,),
    density: Sequence[float] = (1.0,),
    epsilon: Sequence[float] = (0.15,),
    lambda_: float = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    rescale_norm: Rescale = "expected",
) -> Rows:
    r"""DELLA without election: drop entries with a probability that falls with their magnitude's rank, and add.

    In each row of τ_t = θ_t - θ_0 (n entries, ranks r = 1 ... n by magnitude, n the largest):
        p = ρ_t - ε_t + 2 ε_t (r - 1) / (n - 1);   m ~ Bernoulli(p);   τ̂_t = m ⊙ τ_t / p
        θ = θ_0 + λ Σ_t w_t τ̂_t

    mergekit rescales by one factor a tensor, which keeps the sum of magnitudes: `rescale_norm` "l1".

    Source: Deep, Bhardwaj, Poria, "DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based
    Sampling", arXiv 2406.11617.

    When to choose:
        As `dare-linear`, where magnitudes tell what matters.

    Equation:
        p_r = \rho - \epsilon + 2 \epsilon \frac{r - 1}{n - 1}, \quad
        \hat\tau_t = \frac{m_t \odot \tau_t}{p}, \quad m_t \sim \operatorname{Bernoulli}(p)
        \theta = \theta_0 + \lambda \sum_t w_t \hat\tau_t

    Example:
        import torch
        from folklora.merge import della_linear

        base = torch.zeros(4, 4)
        generator = [torch.Generator().manual_seed(seed) for seed in range(2)]
        models = [base + torch.arange(4.0), base - torch.arange(4.0)]
        print(della_linear(models, base, generator=generator, density=[0.5]))

    Args:
        generator: Where each model's mask is drawn from.
        weight: w_t, a number a model.
        density: ρ_t, the mean probability that an entry is kept.
        epsilon: ε_t, how far the probability goes below and above ρ_t; both ends must lie between 0 and 1.
        lambda_: λ, the scale of the sum.
        normalize: Divide by the sum of the weights.
        rescale: Make up for what is dropped.
        rescale_norm: "expected" divides by p; "l1" keeps the sum of magnitudes.
    """
    thinned = by_rank(Blocks.of(models, base).changes(), density, epsilon, generator, rescale, rescale_norm)
    return thinned.merged(lambda deltas, base: base + lambda_ * mixed(deltas, weight, normalize))
