"""Passthrough: one model's tensor, as it is or scaled."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from folklora.merge.contract import merging
from folklora.merge.deltas import check_count


@merging(
    paper="Goddard et al. 2024, arXiv 2403.13257",
    trains="nothing: a copy",
    by_entry=True,
)
def passthrough(models: Sequence[Tensor], base: None = None, *, scale: Sequence[float] = (1.0,)) -> Tensor:
    r"""Passthrough: copy one model's tensor, scaled if asked.

    θ = s θ_1. With layers taken from several models it makes stacked models ("frankenmerges"); with s = 0 on the
    output projections of a repeated block, that block starts as the identity.

    Source: Goddard et al., "Arcee's MergeKit: A Toolkit for Merging Large Language Models", EMNLP 2024, arXiv
    2403.13257.

    When to choose:
        For layers that are to come from one model while others are merged, and for stacking.

    Equation:
        \theta = s \, \theta_1

    Example:
        import torch
        from folklora.merge import passthrough

        print(passthrough([torch.ones(2)], scale=[0.5]))

    Args:
        scale: s.
    """
    check_count("passthrough", models, 1, "give one model")
    return models[0] * scale[0]
