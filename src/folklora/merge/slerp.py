"""SLERP: from one model to another along the arc between them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from folklora.merge.blocks import Blocks, Rows
from folklora.merge.contract import merging
from folklora.merge.deltas import arc, check_count, gram

_COLINEAR = 0.9995


@merging(
    paper="Shoemake 1985, SIGGRAPH; arXiv 2403.13257",
    trains="nothing: a point on the arc between two models",
)
def slerp(models: Sequence[Tensor], base: Tensor | None = None, *, t: float) -> Rows:
    r"""Spherical linear interpolation of two models: from one to the other at constant angular speed.

    a and b are the flattened tensors of the two models (with a base: the base and the one model), Ω the angle between
    them:

        θ = sin((1-t) Ω) / sin Ω · a + sin(t Ω) / sin Ω · b

    on the tensors as they are, not on unit vectors, so that the length goes from |a| to |b| too. Where |cos Ω| is
    above 0.9995, or one of them is zero, the straight line a + t (b - a).

    Source: Shoemake, "Animating Rotation with Quaternion Curves", SIGGRAPH 1985; for models: Goddard et al., "Arcee's
    MergeKit: A Toolkit for Merging Large Language Models", EMNLP 2024, arXiv 2403.13257.

    When to choose:
        To go smoothly from one model to another: unlike an average it does not shrink the weights where the two point
        in different directions. It takes exactly two; `karcher` is its like for more.

    Equation:
        \theta = \frac{\sin((1-t)\Omega)}{\sin\Omega} a + \frac{\sin(t\Omega)}{\sin\Omega} b, \quad
        \cos\Omega = \frac{\langle a, b\rangle}{\|a\| \|b\|}

    Example:
        import torch
        from folklora.merge import slerp

        a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        print(slerp([a, b], t=0.5))  # length 1, where the average has 0.71

    Args:
        t: Where between a (0) and b (1).
    """
    ends = [*([base] if base is not None else []), *models]
    check_count("slerp", ends, 2, "give two models, or a base and one model")
    blocks = Blocks.of(ends)
    point = arc(blocks.total(gram), t, colinear=_COLINEAR)
    return blocks.merged(lambda ends, _: point(*ends))
