"""TALL masks: where in the sum of the deltas each task lives; and the consensus of the masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from folklora.merge.bits import pack, unpack
from folklora.merge.contract import PerTask, merging
from folklora.merge.deltas import deltas, weighted_sum


@dataclass(frozen=True, eq=False)
class Masked(PerTask):
    """A delta common to all tasks, with a mask for each.

    Args:
        common: The merged delta, in the base's shape.
        masks: [T, bytes], M_t in bits.
    """

    common: Tensor
    masks: Tensor

    def delta(self, task: int) -> Tensor:
        """M_t ⊙ τ."""
        return self.common * unpack(self.masks[task], self.base.shape)

    def state(self) -> dict[str, Tensor]:
        """The merged delta and the masks."""
        return {"common": self.common, "masks": self.masks}

    @classmethod
    def of_state(cls, base: Tensor, state: dict[str, Tensor]) -> Masked:
        """The same again from the base and what `state` gave."""
        return cls(base, **state)


@merging(
    paper="Wang et al. 2024, arXiv 2405.07813",
    trains="nothing: the deltas' sum, and a mask a task",
)
def tall(models: Sequence[Tensor], base: Tensor, *, mu: Sequence[float] = (0.4,), lambda_: float = 1.0) -> Masked:
    r"""TALL masks: keep the sum of the deltas and, for each task, the mask of the entries where it is that task's.

    τ_t = θ_t - θ_0, τ = λ Σ_t τ_t; M_t = [|τ_t| > μ_t |τ - τ_t|]. Task t is served θ_0 + M_t ⊙ τ. Stored are τ and a
    bit an entry and task. The larger μ_t, the fewer entries; the authors choose it for each task on validation data
    from 0.2, 0.3, 0.4, 0.5, 0.6.

    Source: Wang, Dimitriadis, Ortiz-Jimenez, Fleuret, Frossard, "Localizing Task Information for Improved Model Merging
    and Compression", ICML 2024, arXiv 2405.07813.

    When to choose:
        When the task is known at inference and each has validation data to choose μ_t on. EMR costs the same to store
        and has nothing to choose.

    Equation:
        \theta_t = \theta_0 + M_t \odot \tau, \quad \tau = \lambda \sum_t \tau_t, \quad
        M_t = [\, |\tau_t| > \mu_t |\tau - \tau_t| \,]

    Example:
        import torch
        from folklora.merge import tall

        base = torch.zeros(3)
        merged = tall([torch.tensor([1.0, 0.1, 0.0]), torch.tensor([0.0, 1.0, 1.0])], base)
        print(merged.for_task(0), merged.for_task(1))

    Args:
        mu: μ_t, how much a task's own change must outweigh the rest's.
        lambda_: λ, the scale of the sum.
    """
    changes = deltas(models, base)
    common = lambda_ * weighted_sum(changes, [1.0] * len(changes))
    return Masked(base, common, torch.stack([pack(mask) for mask in _masks(changes, common, mu)]))


@merging(
    paper="Wang et al. 2024, arXiv 2405.07813",
    trains="nothing: the deltas' sum where several tasks need it",
    by_entry=True,
)
def consensus(
    models: Sequence[Tensor],
    base: Tensor,
    *,
    mu: Sequence[float] = (0.4,),
    agreement: int = 2,
    lambda_: float = 1.0,
) -> Tensor:
    r"""Consensus merging: task arithmetic on the entries that several tasks need.

    τ_t = θ_t - θ_0, τ = Σ_t τ_t, M_t = [|τ_t| > μ_t |τ - τ_t|] as in `tall`;
    θ = θ_0 + λ [Σ_t M_t ≥ k] ⊙ τ. What no task needs and what only one needs ("selfish" entries) is left out for k = 2;
    k = 0 is task arithmetic. λ is searched on validation data.

    Source: Wang, Dimitriadis, Ortiz-Jimenez, Fleuret, Frossard, "Localizing Task Information for Improved Model Merging
    and Compression", ICML 2024, arXiv 2405.07813.

    When to choose:
        For many tasks, in place of task arithmetic, whose search for λ it shares. TSV-M needs none.

    Equation:
        \theta = \theta_0 + \lambda \left[ \sum_t M_t \ge k \right] \odot \sum_t \tau_t

    Example:
        import torch
        from folklora.merge import consensus

        base = torch.zeros(3)
        print(consensus([torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 1.0])], base))  # 2, 0, 0

    Args:
        mu: μ_t, how much a task's own change must outweigh the rest's.
        agreement: k, the number of tasks that must need an entry.
        lambda_: λ, the scale of the sum.
    """
    changes = deltas(models, base)
    common = weighted_sum(changes, [1.0] * len(changes))
    needed = torch.zeros(base.shape, dtype=torch.int32, device=base.device)
    for mask in _masks(changes, common, mu):
        needed += mask
    return base + lambda_ * common * (needed >= agreement)


def _masks(changes: Sequence[Tensor], common: Tensor, mu: Sequence[float]) -> list[Tensor]:
    return [change.abs() > m * (common - change).abs() for change, m in zip(changes, mu, strict=True)]
