"""SCE: select where the models vary, weight them by how much they changed, erase minority signs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from folklora.merge.consensus import disjoint, elected
from folklora.merge.contract import merging
from folklora.merge.deltas import deltas
from folklora.merge.sparsify import largest


@merging(
    paper="Wan et al. 2024, arXiv 2408.07990",
    trains="nothing: deltas where the models vary, by their energy",
)
def sce(models: Sequence[Tensor], base: Tensor, *, select_topk: float = 1.0) -> Tensor:
    r"""SCE: select salient entries, calculate a weight for each model, erase minority signs.

    τ_t = θ_t - θ_0 (N entries).
        select      keep the int(k · number of entries whose variance over t is above 0) entries of largest variance
        calculate   w_t = mean(τ̂_t²) / Σ_s mean(τ̂_s²)
        erase       drop what has not the sign of Σ_t τ̂_t
        θ = θ_0 + Σ_{t: kept} w_t τ̂_t / Σ_{t: kept} w_t, entry by entry
    Nothing is tuned but k. Equal weights where no model changed.

    mergekit takes equal weights already where Σ_s mean(τ̂_s²) < 10⁻⁶, which typical deltas of a language model are
    below, and floors the divisor at 10⁻⁶; both are left out here.

    Source: Wan, Zhong, Yang et al., "FuseChat: Knowledge Fusion of Chat Models", arXiv 2408.07990.

    When to choose:
        For chat models fine-tuned from one base that changed by different amounts: the weights come from the tensors
        themselves. A model that moved far for a bad reason weighs most.

    Equation:
        w_t = \frac{\operatorname{mean}(\hat\tau_t^2)}{\sum_s \operatorname{mean}(\hat\tau_s^2)}, \quad
        \theta = \theta_0 + \frac{\sum_{t \in A} w_t \hat\tau_t}{\sum_{t \in A} w_t}

    Example:
        import torch
        from folklora.merge import sce

        base = torch.zeros(4)
        models = [torch.tensor([1.0, 1.0, 0.0, 2.0]), torch.tensor([1.0, -3.0, 1.0, 2.0])]
        print(sce(models, base, select_topk=0.5))  # of the two that vary, the one that varies most

    Args:
        select_topk: k, the fraction of varying entries that is kept.
    """
    changes = deltas(models, base)
    if select_topk < 1:
        variance = torch.stack(changes).var(0, unbiased=False)
        count = int(select_topk * int(torch.count_nonzero(variance)))
        chosen = largest(variance, count)
        changes = [change * chosen for change in changes]
    energies = [float(change.square().sum(dtype=torch.float64)) for change in changes]
    total = sum(energies)
    weights = [energy / total if total else 1 / len(models) for energy in energies]
    return base + disjoint(changes, weights, elected(changes, [1.0] * len(changes)), normalize=True)
