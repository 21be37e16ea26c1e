"""NuSLERP: SLERP with weights, of what two models changed or of the models, by rows if wanted."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from folklora.merge.blocks import Blocks, Rows
from folklora.merge.contract import merging
from folklora.merge.deltas import arc, check_count, gram


@merging(
    paper="Goddard et al. 2024, arXiv 2403.13257",
    trains="nothing: a point on the arc between two deltas",
)
def nuslerp(
    models: Sequence[Tensor],
    base: Tensor | None = None,
    *,
    weight: Sequence[float] = (1.0,),
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
) -> Rows:
    r"""NuSLERP: spherical interpolation of two models' task vectors, or of the models, with weights.

    t = w_2 / (w_1 + w_2), or 1/2 where the weights sum to 0. With a base, θ = θ_0 + arc(τ_1, τ_2, t); without,
    θ = arc(θ_1, θ_2, t), where
        arc(a, b, t) = sin((1-t) Ω) / sin Ω · a + sin(t Ω) / sin Ω · b,   Ω the angle between a and b
    and the straight line where a and b are colinear or one of them is zero. Vectors are the whole tensors, or with
    `nuslerp_flatten` false those along the last dimension, or with `nuslerp_row_wise` too those along the first
    (mergekit's meaning of the word).

    Source: Goddard et al., "Arcee's MergeKit: A Toolkit for Merging Large Language Models", EMNLP 2024, arXiv
    2403.13257; defined by its code.

    When to choose:
        For two fine-tuned models of one base: on their task vectors an average of nearly orthogonal changes would be
        a third too short.

    Equation:
        \theta = \theta_0 + \frac{\sin((1-t)\Omega)}{\sin\Omega} \tau_1 + \frac{\sin(t\Omega)}{\sin\Omega} \tau_2, \quad
        t = \frac{w_2}{w_1 + w_2}

    Example:
        import torch
        from folklora.merge import nuslerp

        base = torch.ones(2)
        models = [torch.tensor([2.0, 1.0]), torch.tensor([1.0, 2.0])]
        print(nuslerp(models, base))  # the base and a change of length 1

    Args:
        weight: w_1 and w_2.
        nuslerp_flatten: One angle for the tensor.
        nuslerp_row_wise: Without flattening, vectors along the first dimension in place of the last.
    """
    check_count("nuslerp", models, 2, "give two models, and a base besides them if wanted")
    total = sum(weight)
    t = weight[1] / total if total else 0.5
    blocks = Blocks.of(models, base)
    ends = blocks if base is None else blocks.changes()
    dim = None if nuslerp_flatten else 0 if nuslerp_row_wise else -1
    # vectors along the last dimension lie in one block each
    whole = None if dim == -1 and len(blocks.shape) > 1 else arc(ends.total(lambda ends: gram(ends, dim)), t)

    def merge(ends: Sequence[Tensor], base: Tensor | None) -> Tensor:
        point = (whole or arc(gram(ends, dim), t))(*ends)
        return point if base is None else base + point

    return ends.merged(merge)
