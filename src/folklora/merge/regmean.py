"""RegMean: the weight whose outputs are nearest to each model's on that model's inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from folklora.merge.contract import merging
from folklora.merge.deltas import mean
from folklora.merge.regression import solve


@merging(
    paper="Jin et al. 2023, arXiv 2212.09849",
    trains="nothing: a regression on the models' inputs",
)
def regmean(
    models: Sequence[Tensor],
    base: None = None,
    *,
    gram: Sequence[Tensor] | None = None,
    off_diagonal: float = 0.9,
) -> Tensor:
    r"""Regression mean: of all weights, the one whose outputs are nearest to each model's on that model's inputs.

    X_t are the inputs that model t's layer saw on some data of its task, G_t = X_tᵀ X_t [in, in] with its entries off
    the diagonal times α. θ minimises Σ_t ‖X_t θᵀ - X_t θ_tᵀ‖_F² (for α = 1), for weights [out, in]
        θ = θ̄ + Σ_t (θ_t - θ̄) G_t · (Σ_t G_t)⁺,   θ̄ the mean of the θ_t
    in float64, so that inputs which no task used get the mean. The scale of G_t is a model's weight: divide it by the
    number of inputs for equal ones. Tensors without a Gram matrix, and those that are no matrices, get the mean.

    Source: Jin, Ren, Preotiuc-Pietro, Cheng, "Dataless Knowledge Fusion by Merging Weights of Language Models", ICLR
    2023, arXiv 2212.09849. α is 0.9, or 0.1 for some models.

    When to choose:
        When some unlabelled inputs of each task may be passed through its model: on published figures far better than
        averaging. A Gram matrix [in, in] for each linear layer must be stored and decomposed.

    Equation:
        \theta = \left( \sum_t \theta_t G_t \right) \left( \sum_t G_t \right)^{-1}, \quad G_t = X_t^\top X_t

    Example:
        import torch
        from folklora.merge import regmean

        inputs = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
        models = [torch.tensor([[1.0, 5.0]]), torch.tensor([[5.0, 2.0]])]
        print(regmean(models, gram=[x.T @ x for x in inputs]))  # 1 and 2: each model's on its own input

    Args:
        gram: G_t [in, in], one a model, without the factor α.
        off_diagonal: α, by which entries off the diagonal are multiplied: lower is nearer to a mean by variance.
    """
    middle = mean(models)
    if gram is None or middle.dim() != 2:
        return middle
    total, products = 0.0, 0.0
    for model, own in zip(models, gram, strict=True):
        if own.shape != (model.shape[1], model.shape[1]):
            raise ValueError(
                f"a weight of shape {list(model.shape)} needs Gram matrices of shape {[model.shape[1]] * 2}, "
                f"not {list(own.shape)}"
            )
        weighted = torch.lerp(torch.diag(own.diagonal()).double(), own.double(), off_diagonal)
        total, products = total + weighted, products + (model - middle).double() @ weighted
    return middle + solve(products, total).to(middle.dtype)
