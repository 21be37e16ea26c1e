"""Karcher mean: the barycentre of several models on the sphere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from folklora.merge.blocks import Blocks, Rows
from folklora.merge.contract import merging
from folklora.merge.deltas import gram


@merging(
    paper="Karcher 1977; arXiv 2403.13257",
    trains="nothing: the models' barycentre on the sphere",
)
def karcher(
    models: Sequence[Tensor],
    base: None = None,
    *,
    weight: Sequence[float] = (1.0,),
    max_iter: int = 10,
    tol: float = 1e-5,
) -> Rows:
    r"""Karcher mean: SLERP for any number of models, the point of the sphere with the least squared arcs to them.

    u_t = θ_t / ‖θ_t‖, weights w_t with sum 1; start u = Σ_t w_t u_t / ‖·‖, then until ‖T‖ < tol or `max_iter` times
        T = Σ_t w_t (Ω_t / sin Ω_t) (u_t - cos Ω_t · u),   Ω_t the angle between u and u_t
        u ← cos ‖T‖ · u + sin ‖T‖ · T / ‖T‖
    and θ = (Σ_t w_t ‖θ_t‖) u. Tensors that are zero count in the length only. All of it is done on the coefficients
    of u in the u_t, from their T × T inner products in float64; the models are read twice, however many steps.

    mergekit takes the same steps on the whole tensors in float32, where the sums over millions of entries leave 10⁻⁴ of
    the length; with float64 in mergekit, both agree to 10⁻⁷ of it.

    Source: Karcher, "Riemannian center of mass and mollifier smoothing", 1977; for models: Goddard et al., "Arcee's
    MergeKit: A Toolkit for Merging Large Language Models", EMNLP 2024, arXiv 2403.13257.

    When to choose:
        Where SLERP is, for more than two models: the length of the weights is kept, which an average shrinks.

    Equation:
        u^\star = \operatorname{argmin}_{\|u\| = 1} \sum_t w_t \, \Omega(u, u_t)^2, \quad
        \theta = \left( \sum_t w_t \|\theta_t\| \right) u^\star

    Example:
        import torch
        from folklora.merge import karcher

        print(karcher(list(torch.eye(3))))  # length 1, where the average has 0.58

    Args:
        weight: w_t, a number a model, of which only the shares count.
        max_iter: The most steps.
        tol: The length of T at which it ends.
    """
    total = sum(weight)
    if total <= 0 or min(weight) < 0:
        raise ValueError(f"karcher needs weights of 0 and more, with a sum above 0, not {list(weight)}")
    w = torch.tensor(weight, dtype=torch.float64) / total
    blocks = Blocks.of(models)
    scales = _scales(blocks.total(gram).cpu(), w, max_iter, tol)

    def merge(models: Sequence[Tensor], _: None) -> Tensor:
        result = models[0] * sum(scales)
        for model, scale in zip(models[1:], scales[1:], strict=True):
            result.add_(model - models[0], alpha=scale)
        return result

    return blocks.merged(merge)


def _scales(gram: Tensor, w: Tensor, max_iter: int, tol: float) -> list[float]:
    """The models' coefficients in the merged tensor, from their inner products."""
    lengths = gram.diagonal().sqrt()
    alive = (lengths > 0) & (w > 0)
    if not alive.any():
        return [0.0] * len(w)
    inverse = torch.where(alive, 1 / lengths, 0.0)
    cosines = gram * inverse.unsqueeze(0) * inverse.unsqueeze(1)
    share = w * alive / w[alive].sum()
    return (_barycentre(cosines, share, max_iter, tol) * inverse * (w * lengths).sum()).tolist()


def _barycentre(cosines: Tensor, weight: Tensor, max_iter: int, tol: float) -> Tensor:
    """Coefficients c of the barycentre Σ_t c_t u_t of unit vectors with these inner products."""

    def length(c: Tensor) -> Tensor:
        return (c @ cosines @ c).clamp(min=0).sqrt()

    c = weight / length(weight) if length(weight) > tol else (weight > 0) * (weight > 0).cumsum(0).eq(1).to(weight)
    for _ in range(max_iter):
        cos = (cosines @ c).clamp(-1, 1)
        angle = cos.acos()
        # an angle below tol has no direction to speak of; opposite to u, none at all
        pull = weight * torch.where((angle > tol) & (angle.sin() > tol), angle / angle.sin(), 0.0)
        step = pull - (pull * cos).sum() * c
        size = length(step)
        if size < tol:
            break
        c = size.cos() * c + size.sin() * step / size
        c = c / length(c)
    return c
