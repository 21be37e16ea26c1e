"""TSV-C: each task's delta, compressed to its leading singular directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from folklora.factored import Factors
from folklora.merge.contract import PerTask, merging
from folklora.merge.deltas import deltas
from folklora.spectrum import top


@dataclass(frozen=True, eq=False)
class LowRank(PerTask):
    """Each task's delta in k singular triplets; where the tensor is no matrix, as it is.

    Args:
        U: [T, m, k], or [T, ...] the deltas themselves.
        S: [T, k], or None.
        V: [T, n, k], or None.
    """

    U: Tensor
    S: Tensor | None = None
    V: Tensor | None = None

    def delta(self, task: int) -> Tensor:
        """U_t diag(S_t) V_tᵀ."""
        return self.U[task] if self.S is None else self.factors(task).dense()

    def factors(self, task: int) -> Factors:
        """One task's delta of a matrix as factors, for an adapter."""
        if self.S is None:
            raise ValueError(f"a tensor of shape {list(self.base.shape)} is kept as it is and has no factors")
        return Factors(self.V[task].mT, self.S[task], self.U[task])

    def state(self) -> dict[str, Tensor]:
        """U, S and V, or the deltas."""
        return {"delta": self.U} if self.S is None else {"U": self.U, "S": self.S, "V": self.V}

    @classmethod
    def of_state(cls, base: Tensor, state: dict[str, Tensor]) -> LowRank:
        """The same again from the base and what `state` gave."""
        return cls(base, state["delta"]) if "delta" in state else cls(base, state["U"], state["S"], state["V"])


@merging(
    paper="Gargiulo et al. 2025, arXiv 2412.00081",
    trains="nothing: each task's leading singular directions",
)
def tsv_c(models: Sequence[Tensor], base: Tensor, *, rank: int | None = None) -> LowRank:
    r"""Task singular vectors, compressed: store each task's leading singular directions, and serve one task at a time.

    Of each task matrix D_t = θ_t - θ_0 [m, n] the k = max(1, int(min(m, n) / T)) leading singular triplets are kept, in
    all about as much as one matrix. Task t is served θ_0 + U_t diag(S_t) V_tᵀ; `factors(t)` gives the same as an
    adapter's factors. Tensors that are no matrices are kept as they are, a delta a task.

    Source: Gargiulo, Crisostomi, Bucarelli et al., "Task Singular Vectors: Reducing Task Interference in Model
    Merging", CVPR 2025, arXiv 2412.00081. The reference code has k = int(min(m, n) / T), which is 0 for small matrices.

    When to choose:
        When the task is known at inference and full models for all of them are too much to store: it keeps nearly all
        of each one's accuracy on published figures. Not a merge: no task profits from another.

    Equation:
        \theta_t = \theta_0 + U_t \operatorname{diag}(S_t) V_t^\top, \quad U_t \in R^{m \times k}, \;
        k = \lfloor \min(m, n) / T \rfloor

    Example:
        import torch
        from folklora.merge import tsv_c

        base = torch.zeros(8, 6)
        models = [torch.randn(8, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
        print(tsv_c(models, base).for_task(1) - models[1])

    Args:
        rank: k, held within 1 and min(m, n); None takes int(min(m, n) / T).
    """
    changes = deltas(models, base)
    if base.dim() != 2 or not base.numel():
        return LowRank(base, torch.stack(changes))
    most = min(base.shape)
    count = max(1, min(most, most // len(models) if rank is None else rank))
    parts = [top(change, count, dtype=base.dtype) for change in changes]
    return LowRank(base, *(torch.stack([getattr(part, name) for part in parts]) for name in "USV"))
