"""Fisher merging: the mean of the models, entry by entry weighted by how much each task needs it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from folklora.merge.contract import merging


@merging(
    paper="Matena, Raffel 2022, arXiv 2111.09832",
    trains="nothing: the mean by Fisher information",
)
def fisher(
    models: Sequence[Tensor],
    base: None = None,
    *,
    fisher: Sequence[Tensor],
    weight: Sequence[float] = (1.0,),
    floor: float = 1e-6,
) -> Tensor:
    r"""Fisher merging: each entry's mean over the models, weighted by its Fisher information for each one's task.

    F_t = E[(∂ log p(y | x; θ_t) / ∂θ)²], the diagonal of the Fisher information in θ_t's shape, at least `floor`;
    θ = Σ_t w_t F_t θ_t / Σ_t w_t F_t, computed as θ_1 + Σ_t w_t F_t (θ_t - θ_1) / Σ_t w_t F_t. It is the mode of the
    product of the models' Laplace approximations. With equal F_t it is the weighted average.

    Source: Matena, Raffel, "Merging Models with Fisher-Weighted Averaging", NeurIPS 2022, arXiv 2111.09832. The floor
    is 10⁻⁶.

    When to choose:
        When data of each task may be passed through its model once, with gradients. RegMean needs no gradients and does
        better on published figures.

    Equation:
        \theta = \frac{\sum_t w_t F_t \odot \theta_t}{\sum_t w_t F_t}

    Example:
        import torch
        from folklora.merge import fisher

        models = [torch.tensor([1.0, 1.0]), torch.tensor([3.0, 3.0])]
        print(fisher(models, fisher=[torch.tensor([1.0, 9.0]), torch.tensor([1.0, 1.0])]))  # 2 and 1.2

    Args:
        fisher: F_t, one a model, in the tensor's shape.
        weight: w_t, a number a model, 0 or more.
        floor: The least information an entry has.
    """
    if min(weight) < 0 or sum(weight) <= 0:
        raise ValueError(f"fisher needs weights of 0 and more, with a sum above 0, not {list(weight)}")
    first = models[0]
    total, shift = torch.zeros_like(first), torch.zeros_like(first)
    for model, information, w in zip(models, fisher, weight, strict=True):
        if information.shape != model.shape:
            raise ValueError(f"the Fisher information has shape {list(information.shape)}, not {list(model.shape)}")
        share = information.clamp(min=floor) * w
        total += share
        shift += share * (model - first)
    return first + shift / total
