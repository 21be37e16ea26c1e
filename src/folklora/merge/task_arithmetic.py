"""Task arithmetic: add what the models learnt to the base."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from folklora.merge.contract import merging
from folklora.merge.deltas import deltas, mixed


@merging(
    paper="Ilharco et al. 2023, arXiv 2212.04089",
    trains="nothing: the sum of the models' deltas",
    by_entry=True,
)
def task_arithmetic(
    models: Sequence[Tensor],
    base: Tensor,
    *,
    weight: Sequence[float] = (1.0,),
    lambda_: float = 1.0,
    normalize: bool = False,
) -> Tensor:
    r"""Task arithmetic: the weighted sum of the task vectors, added to the base.

    τ_t = θ_t - θ_0, θ = θ_0 + λ Σ_t w_t τ_t. A negative weight takes a model's task away. The authors search λ on
    validation data, with w_t = 1; 0.3 is their usual find for eight tasks.

    Source: Ilharco, Ribeiro, Wortsman et al., "Editing Models with Task Arithmetic", ICLR 2023, arXiv 2212.04089.

    When to choose:
        For two or three skills, or to take one away. With more tasks their vectors disturb one another and λ must be
        small: TIES or TSV-M then.

    Equation:
        \theta = \theta_0 + \lambda \sum_t w_t (\theta_t - \theta_0)

    Example:
        import torch
        from folklora.merge import task_arithmetic

        base = torch.zeros(2, 2)
        print(task_arithmetic([base + 1, base + 2], base, weight=[1.0, -0.5]))  # back at the base

    Args:
        weight: w_t, a number a model.
        lambda_: λ, the scale of the sum.
        normalize: Divide by the sum of the weights.
    """
    return base + lambda_ * mixed(deltas(models, base), weight, normalize)
