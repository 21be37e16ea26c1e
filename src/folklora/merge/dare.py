"""DARE: drop most of each task vector at random and rescale the rest; then add, or elect signs as TIES does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from folklora.merge.blocks import Blocks, Rows
from folklora.merge.contract import merging
from folklora.merge.deltas import mixed
from folklora.merge.election import united
from folklora.merge.sparsify import Rescale, random


@merging(
    paper="Yu et al. 2024, arXiv 2311.03099",
    trains="nothing: the sum of randomly thinned deltas",
)
def dare_linear(
    models: Sequence[Tensor],
    base: Tensor,
    *,
    generator: Sequence[torch.Generator],
    weight: Sequence[float] = (1.0,),
    density: Sequence[float] = (1.0,),
    lambda_: float = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    rescale_norm: Rescale = "expected",
) -> Rows:
    r"""DARE: drop entries of each task vector at random, rescale the others, and add.

    m_t ~ Bernoulli(ρ_t), independent for each entry; τ̂_t = m_t ⊙ τ_t / ρ_t, whose mean over masks is τ_t;
    θ = θ_0 + λ Σ_t w_t τ̂_t. A mask depends on its generator alone, not on the other models.

    The authors and PEFT divide by ρ_t. mergekit scales so that the sum of magnitudes is τ_t's, which has the same mean
    only about; `rescale_norm` "l1" does that.

    Source: Yu, Yu, Yu, Huang, Li, "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a
    Free Lunch", ICML 2024, arXiv 2311.03099. The authors keep 0.1 and less for fine-tuned language models.

    When to choose:
        For fine-tuned language models whose deltas are small and redundant: a tenth of the entries often does. It
        adds noise where they are not. With signs in dispute, `dare-ties`.

    Equation:
        \hat\tau_t = \frac{m_t \odot \tau_t}{\rho_t}, \quad m_t \sim \operatorname{Bernoulli}(\rho_t)
        \theta = \theta_0 + \lambda \sum_t w_t \hat\tau_t

    Example:
        import torch
        from folklora.merge import dare_linear

        base = torch.zeros(4, 4)
        generator = [torch.Generator().manual_seed(seed) for seed in range(2)]
        print(dare_linear([base + 1, base + 2], base, generator=generator, density=[0.5]))

    Args:
        generator: Where each model's mask is drawn from.
        weight: w_t, a number a model.
        density: ρ_t, the probability that an entry is kept.
        lambda_: λ, the scale of the sum.
        normalize: Divide by the sum of the weights.
        rescale: Make up for what is dropped.
        rescale_norm: "expected" divides by ρ_t; "l1" keeps the sum of magnitudes.
    """
    thinned = random(Blocks.of(models, base).changes(), density, generator, rescale, rescale_norm)
    return thinned.merged(lambda deltas, base: base + lambda_ * mixed(deltas, weight, normalize))


@merging(
    paper="Yu et al. 2024, arXiv 2311.03099",
    trains="nothing: the randomly thinned deltas that agree in sign",
)
def dare_ties(
    models: Sequence[Tensor],
    base: Tensor,
    *,
    generator: Sequence[torch.Generator],
    weight: Sequence[float] = (1.0,),
    density: Sequence[float] = (1.0,),
    lambda_: float = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    rescale_norm: Rescale = "expected",
) -> Rows:
    r"""DARE with TIES' election: drop at random, rescale, elect a sign for each entry, add those that have it.

    m_t ~ Bernoulli(ρ_t), τ̂_t = m_t ⊙ τ_t / ρ_t as in `dare-linear`; γ = sign(Σ_t w_t τ̂_t);
    θ = θ_0 + λ Σ_{t: sign(w_t τ̂_t) = γ} w_t τ̂_t. With `normalize`, divided by the sum of the |w_t| that agree, entry
    by entry: PEFT does so, mergekit does not.

    Source: Yu, Yu, Yu, Huang, Li, "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a
    Free Lunch", ICML 2024, arXiv 2311.03099; the election is that of TIES, arXiv 2306.01708.

    When to choose:
        As `dare-linear`, where the models' changes disagree in sign. At a low density few entries meet, so that the
        election decides little.

    Equation:
        \hat\tau_t = \frac{m_t \odot \tau_t}{\rho_t}, \quad m_t \sim \operatorname{Bernoulli}(\rho_t)
        \theta = \theta_0 + \lambda \sum_{t : \operatorname{sign}(w_t \hat\tau_t) = \gamma} w_t \hat\tau_t

    Example:
        import torch
        from folklora.merge import dare_ties

        base = torch.zeros(4, 4)
        generator = [torch.Generator().manual_seed(seed) for seed in range(2)]
        print(dare_ties([base + 1, base - 2], base, generator=generator, density=[0.5]))

    Args:
        generator: Where each model's mask is drawn from.
        weight: w_t, a number a model.
        density: ρ_t, the probability that an entry is kept.
        lambda_: λ, the scale of the sum.
        normalize: Divide by the sum of the weights that agree.
        rescale: Make up for what is dropped.
        rescale_norm: "expected" divides by ρ_t; "l1" keeps the sum of magnitudes.
    """
    thinned = random(Blocks.of(models, base).changes(), density, generator, rescale, rescale_norm)
    return thinned.merged(lambda deltas, base: base + lambda_ * united(deltas, weight, normalize))
