"""Model Stock: between the base and the mean of the models, as far as their angle says."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from folklora.merge.blocks import Blocks, Rows
from folklora.merge.contract import merging
from folklora.merge.deltas import cosines, gram, mean


@merging(
    paper="Jang et al. 2024, arXiv 2403.19522",
    trains="nothing: a point between the base and the models' mean",
)
def model_stock(models: Sequence[Tensor], base: Tensor, *, filter_wise: bool = False) -> Rows:
    r"""Model Stock: the point between the base and the mean of the models that their angles call for.

    c = the mean of the cosines between τ_s and τ_t over all pairs s < t of N models, below 0 taken as 0;
    r = N c / (1 + (N-1) c);   θ = θ_0 + r · mean(τ_t).
    Models that changed the same way (c = 1) give their mean, unrelated ones (c = 0) the base. It needs two or more.

    The paper has one angle for all; the mean over pairs is mergekit's reading. Where c is negative, mergekit goes to
    the other side of the base, without bound as c nears -1/(N-1); here it stays at the base.

    Source: Jang, Yun, Han, "Model Stock: All we need is just a few fine-tuned models", ECCV 2024, arXiv 2403.19522.

    When to choose:
        For a few runs of one task that differ in seed: it takes out the noise of each run. For models of different
        tasks, whose changes are nearly orthogonal, it is close to the base and of no use.

    Equation:
        r = \frac{N c}{1 + (N - 1) c}, \quad \theta = r \, \bar\theta + (1 - r) \, \theta_0

    Example:
        import torch
        from folklora.merge import model_stock

        base = torch.zeros(2)
        print(model_stock([torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])], base))

    Args:
        filter_wise: An angle for each row (the last dimension) in place of one for the tensor.
    """
    if len(models) < 2:
        raise ValueError("model_stock reads the angle between models: give it two or more")
    changes = Blocks.of(models, base).changes()
    whole = None if filter_wise else _ratio(changes.total(gram))

    def merge(deltas: Sequence[Tensor], base: Tensor) -> Tensor:
        ratio = _ratio(gram(deltas, -1)) if whole is None else whole
        return base + ratio.to(base.dtype) * mean(deltas)

    return changes.merged(merge)


def _ratio(gram: Tensor) -> Tensor:
    count = len(gram)
    above = torch.triu_indices(count, count, offset=1)
    c = cosines(gram)[above[0], above[1]].mean(0).clamp(min=0)
    return count * c / (1 + (count - 1) * c)
