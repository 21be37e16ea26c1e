"""RAM: the mean where several models changed an entry, the whole change where one did."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from folklora.merge.contract import merging
from folklora.merge.deltas import deltas


@merging(
    paper="Yuan et al. 2026, arXiv 2601.13572",
    trains="nothing: each entry's mean over the models that changed it",
    by_entry=True,
)
def ram(models: Sequence[Tensor], base: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    r"""Reinforced agent merging: each entry's mean over the models that changed it.

    A model is active in an entry where |τ_t| > ε. θ = θ_0 + Σ_{t active} τ_t / number of active models: what a single
    model changed is kept whole, what several share is averaged. Reinforcement learning changes few entries, so an
    average over all models would shrink most of it.

    Source: Yuan, Shi, Zhang et al., "Behavior Knowledge Merge in Reinforced Agentic Models", 2026, arXiv 2601.13572;
    the definition as in mergekit. RAM+, which also scales up what is unique, is not here.

    When to choose:
        For agents trained with reinforcement learning, whose deltas are sparse and overlap little.

    Equation:
        \theta = \theta_0 + \frac{\sum_{t : |\tau_t| > \epsilon} \tau_t}{|\{t : |\tau_t| > \epsilon\}|}

    Example:
        import torch
        from folklora.merge import ram

        base = torch.zeros(3)
        print(ram([torch.tensor([1.0, 2.0, 0.0]), torch.tensor([3.0, 0.0, 0.0])], base))  # 2, 2, 0

    Args:
        epsilon: ε, the change up to which an entry counts as unchanged.
    """
    total, count = torch.zeros_like(base), torch.zeros_like(base)
    for change in deltas(models, base):
        active = change.abs() > epsilon
        total += change * active
        count += active
    return base + total / count.clamp(min=1)
