"""EMR: one unified delta, and a mask and a number for each task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from folklora.merge.bits import pack, unpack
from folklora.merge.contract import PerTask, merging
from folklora.merge.deltas import deltas, weighted_sum


@dataclass(frozen=True, eq=False)
class Unified(PerTask):
    """A delta common to all tasks, with a mask and a scale for each.

    Args:
        unified: τ_uni, in the base's shape.
        masks: [T, bytes], M_t in bits.
        own: [T], Σ |τ_t|, float64.
        kept: [T], Σ |M_t ⊙ τ_uni|, float64.
    """

    summed: ClassVar[tuple[str, ...]] = ("own", "kept")

    unified: Tensor
    masks: Tensor
    own: Tensor
    kept: Tensor

    def delta(self, task: int) -> Tensor:
        """r_t M_t ⊙ τ_uni, with r_t = own / kept."""
        scale = float(self.own[task] / self.kept[task]) if self.kept[task] else 0.0
        return self.unified * unpack(self.masks[task], self.base.shape) * scale

    def state(self) -> dict[str, Tensor]:
        """The unified delta, the masks and the two sums."""
        return {"unified": self.unified, "masks": self.masks, "own": self.own, "kept": self.kept}

    @classmethod
    def of_state(cls, base: Tensor, state: dict[str, Tensor]) -> Unified:
        """The same again from the base and what `state` gave."""
        return cls(base, **state)


@merging(
    paper="Huang et al. 2024, arXiv 2405.17461",
    trains="nothing: a unified delta, and a mask and a scale a task",
)
def emr(models: Sequence[Tensor], base: Tensor) -> Unified:
    r"""Elect, mask and rescale: one delta for all tasks, which a mask and a number turn into each one's own.

    τ_t = θ_t - θ_0.
        elect     γ = sign(Σ_t τ_t), -1 where the sum is 0;   τ_uni = γ ⊙ max over t of |τ_t| where sign(τ_t) = γ
        mask      M_t = [τ_t ⊙ τ_uni > 0]
        rescale   r_t = Σ |τ_t| / Σ |M_t ⊙ τ_uni|
    Task t is served θ_0 + r_t M_t ⊙ τ_uni. Stored are τ_uni, a bit an entry and task, and two sums a task.

    The authors sum over all the tensors of a model. A single tensor has its own r_t here; `common_scale` makes
    it the model's when all are there, and so does a merge on disk.

    Source: Huang, Ye, Chen et al., "EMR-Merging: Tuning-Free High-Performance Model Merging", NeurIPS 2024, arXiv
    2405.17461.

    When to choose:
        When the task is known at inference and there are many: each one costs a bit an entry. Nothing is tuned. For a
        single model that serves all tasks take TSV-M.

    Equation:
        \theta_t = \theta_0 + r_t M_t \odot \tau_{\text{uni}}, \quad M_t = [\tau_t \odot \tau_{\text{uni}} > 0], \quad
        r_t = \frac{\sum |\tau_t|}{\sum |M_t \odot \tau_{\text{uni}}|}

    Example:
        import torch
        from folklora.merge import emr

        base = torch.zeros(3)
        merged = emr([torch.tensor([1.0, 2.0, 0.0]), torch.tensor([2.0, -1.0, 3.0])], base)
        print(merged.for_task(0), merged.for_task(1))

    Args:
    """
    changes = deltas(models, base)
    signs = torch.where(weighted_sum(changes, [1.0] * len(changes)) > 0, 1.0, -1.0).to(base.dtype)
    magnitude = torch.zeros_like(base)
    for change in changes:
        magnitude = torch.maximum(magnitude, change * signs)
    masks = [change * signs > 0 for change in changes]
    own = torch.stack([change.abs().sum(dtype=torch.float64) for change in changes])
    kept = torch.stack([(magnitude * mask).sum(dtype=torch.float64) for mask in masks])
    return Unified(base, magnitude * signs, torch.stack([pack(mask) for mask in masks]), own, kept)


def common_scale(parts: Sequence[Unified]) -> list[Unified]:
    """The tensors of one model with the scale of each task taken over all of them, as the authors do.

    Args:
        parts: What `emr` gave for each tensor.
    """
    sums = {name: sum(getattr(part, name) for part in parts) for name in Unified.summed}
    return [replace(part, **sums) for part in parts]
