"""SCE: select where the models vary, weight them by how much they changed, erase minority signs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from folklora.merge.blocks import Blocks, Rows
from folklora.merge.contract import merging
from folklora.merge.deltas import mean
from folklora.merge.election import disjoint, elected
from folklora.merge.sparsify import Largest


@merging(
    paper="Wan et al. 2024, arXiv 2408.07990",
    trains="nothing: deltas where the models vary, by their energy",
)
def sce(models: Sequence[Tensor], base: Tensor, *, select_topk: float = 1.0) -> Rows:
    r"""SCE: select salient entries, calculate a weight for each model, erase minority signs.

    τ_t = θ_t - θ_0 (N entries).
        select      keep the int(k · number of entries whose variance over t is above 0) entries of largest variance
        calculate   w_t = mean(τ̂_t²) / Σ_s mean(τ̂_s²)
        erase       drop what has not the sign of Σ_t τ̂_t
        θ = θ_0 + Σ_{t: kept} w_t τ̂_t / Σ_{t: kept} w_t, entry by entry
    Nothing is tuned but k. Equal weights where no model changed.

    mergekit takes equal weights already where Σ_s mean(τ̂_s²) < 10⁻⁶, which typical deltas of a language model are
    below, and floors the divisor at 10⁻⁶; both are left out here. Of equal variances at the threshold the first are
    kept here and any in mergekit, which changes those entries and, through w_t, a little all others of the tensor.

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
    changes = Blocks.of(models, base).changes()
    if select_topk < 1:
        changes = _select(changes, select_topk)
    energies = changes.total(lambda deltas: torch.stack([delta.square().sum(dtype=torch.float64) for delta in deltas]))
    total = float(energies.sum())
    weights = (energies / total).tolist() if total else [1 / len(models)] * len(models)

    def merge(deltas: Sequence[Tensor], base: Tensor) -> Tensor:
        signs = elected(deltas, [1.0] * len(deltas))
        return base + disjoint(deltas, weights, signs, normalize=True)

    return changes.merged(merge)


def _select(changes: Blocks, share: float) -> Blocks:
    varying = int(changes.total(lambda deltas: torch.count_nonzero(_variance(deltas))))
    largest = Largest(changes.each(lambda deltas: [_variance(deltas)]), [int(share * varying)])

    def begin() -> Callable[[Sequence[Tensor]], list[Tensor]]:
        masks = largest.masks()

        def choose(deltas: Sequence[Tensor]) -> list[Tensor]:
            (chosen,) = masks([_variance(deltas)])
            return [delta * chosen for delta in deltas]

        return choose

    return changes.each_pass(begin)


def _variance(deltas: Sequence[Tensor]) -> Tensor:
    middle = mean(deltas)
    return mean([(delta - middle).square_() for delta in deltas]).contiguous()
