"""NearSwap: take the other model's values where they are near."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from folklora.merge.contract import merging
from folklora.merge.deltas import check_count


@merging(
    paper="alchemonaut 2024, in arXiv 2403.13257's toolkit",
    trains="nothing: the delta, cut to ± t",
    by_entry=True,
)
def nearswap(models: Sequence[Tensor], base: Tensor, *, t: float) -> Tensor:
    r"""NearSwap: go from the base to one other model, but no further than t in any entry.

    With the weight min(1, t / |θ_1 - θ_0|) of the other model, as it is defined, θ = θ_0 + clip(θ_1 - θ_0, -t, t):
    entries that differ by t or less are swapped, the others move by t.

    Source: alchemonaut, QuartetAnemoi-70B-t0.0001, 2024 (a model card); in the toolkit of Goddard et al., arXiv
    2403.13257.

    When to choose:
        To let a model take on small changes of another and keep what is far from it. There is no paper on it.

    Equation:
        \theta = \theta_0 + \operatorname{clip}(\theta_1 - \theta_0, -t, t)

    Example:
        import torch
        from folklora.merge import nearswap

        base = torch.zeros(3)
        print(nearswap([torch.tensor([0.1, 1.0, -1.0])], base, t=0.5))  # 0.1, 0.5, -0.5

    Args:
        t: How far an entry may move, in the weights' unit.
    """
    check_count("nearswap", [base, *models], 2, "give a base and one model")
    return base + (models[0] - base).clamp(-t, t)
