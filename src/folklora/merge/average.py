"""Weight averaging: the mean of the models."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from folklora.merge.contract import merging
from folklora.merge.deltas import mixed


@merging(
    paper="Wortsman et al. 2022, arXiv 2203.05482",
    trains="nothing: the weighted mean of the models",
    by_entry=True,
)
def average(
    models: Sequence[Tensor], base: None = None, *, weight: Sequence[float] = (1.0,), normalize: bool = True
) -> Tensor:
    r"""Weight averaging (linear merging, model soup): the weighted mean of the models.

    θ = Σ_t w_t θ_t / Σ_t w_t, computed as θ_1 + Σ_t w_t (θ_t - θ_1) / Σ_t w_t, which rounds less and leaves models
    that are all the same as they are, bit for bit. Without `normalize`, θ = Σ_t w_t θ_t. With weights on the simplex
    that say how much each of several rewards counts it is a rewarded soup (Ramé et al. 2023, arXiv 2306.04488).

    Source: Wortsman, Ilharco, Gadre et al., "Model soups: averaging weights of multiple fine-tuned models improves
    accuracy without increasing inference time", ICML 2022, arXiv 2203.05482.

    When to choose:
        For runs of one task that differ in seed or settings. It takes no base and has nothing to tune. Of models for
        different tasks it keeps only 1/T of what each learnt: choose task arithmetic or TSV-M there.

    Equation:
        \theta = \frac{\sum_t w_t \theta_t}{\sum_t w_t}

    Example:
        import torch
        from folklora.merge import average

        models = [torch.full((2, 2), 1.0), torch.full((2, 2), 4.0)]
        print(average(models, weight=[2.0, 1.0]))  # all 2

    Args:
        weight: w_t, a number a model.
        normalize: Divide by the sum of the weights.
    """
    return mixed(models, weight, normalize)
