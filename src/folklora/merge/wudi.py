"""WUDI: the merged delta that disturbs each task least on the inputs that its own delta points at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from folklora.merge.contract import merging
from folklora.merge.deltas import deltas, mean, weighted_sum
from folklora.merge.regression import solve


@merging(
    paper="Cheng et al. 2025, arXiv 2503.08099",
    trains="nothing: the delta with the least interference, by Adam",
)
def wudi(
    models: Sequence[Tensor], base: Tensor, *, steps: int = 300, learning_rate: float = 1e-5, lambda_: float = 1.0
) -> Tensor:
    r"""WUDI: from the sum of the task matrices, Adam steps that lower the interference with each task.

    τ_t = θ_t - θ_0 [out, in]. The rows of τ_t stand for the inputs that task t was trained on, so M disturbs it by
        L(M) = Σ_t ‖(M - τ_t) τ_tᵀ‖_F² / ‖τ_t‖_F²
    M starts at Σ_t τ_t; `steps` steps of Adam; θ = θ_0 + λ M. L is a quadratic form: with G_t = τ_tᵀ τ_t / ‖τ_t‖_F² its
    gradient is 2 (M Σ_t G_t - Σ_t τ_t G_t), whose sums are made once, so that a step costs one product whatever T.
    Tensors that are no matrices get the mean of the deltas. No data and, in the paper, no λ.

    With few steps of this size M stays near the sum; it depends on the scale of the deltas how near. `wudi-closed-form`
    is where it ends.

    Source: Cheng, Xiong, Wei, Zhu, Yuan, "Whoever Started the Interference Should End It: Guiding Data-Free Model
    Merging via Task Vectors", ICML 2025, arXiv 2503.08099. 300 steps, learning rate 10⁻⁵.

    When to choose:
        For four tasks and more with only weights there. The number of steps is a regulariser: on other models than
        the paper's, search λ and the learning rate, or take TSV-M.

    Equation:
        M = \operatorname{argmin}_M \sum_t \frac{\|(M - \tau_t) \tau_t^\top\|_F^2}{\|\tau_t\|_F^2}, \quad
        \theta = \theta_0 + \lambda M

    Example:
        import torch
        from folklora.merge import wudi

        base = torch.zeros(8, 6)
        models = [torch.randn(8, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
        print(wudi(models, base, learning_rate=1e-2) - sum(models))

    Args:
        steps: Steps of Adam.
        learning_rate: Of Adam.
        lambda_: λ, the scale of the merged delta.
    """
    changes = deltas(models, base)
    if base.dim() != 2:
        return base + lambda_ * mean(changes)
    products, gram = _normal_equations(changes)
    merged = nn.Parameter(weighted_sum(changes, [1.0] * len(changes)))
    optimizer = torch.optim.Adam([merged], lr=learning_rate)
    for _ in range(steps):
        merged.grad = 2 * (merged @ gram - products)
        optimizer.step()
    return base + lambda_ * merged.detach()


@merging(
    paper="Cheng et al. 2025, arXiv 2503.08099",
    trains="nothing: the delta with the least interference, solved",
)
def wudi_closed_form(models: Sequence[Tensor], base: Tensor, *, lambda_: float = 1.0) -> Tensor:
    r"""WUDI's objective solved exactly: the merged matrix that interferes least with the tasks.

    τ_t = θ_t - θ_0 [out, in], G_t = τ_tᵀ τ_t / ‖τ_t‖_F² [in, in]. The M that minimises
    L(M) = Σ_t ‖(M - τ_t) τ_tᵀ‖_F² / ‖τ_t‖_F² is RegMean's, with each task's own rows as its inputs:
        M = (Σ_t τ_t G_t) (Σ_t G_t)⁺,   θ = θ_0 + λ M
    in float64; singular values below 10⁻⁶ of the largest count as 0. One task gives itself. Tensors that are no
    matrices get the mean of the deltas. The decomposition is of [in, in], which for `in` of 10,000 and more takes long.

    Source: the objective from Cheng, Xiong, Wei, Zhu, Yuan, "Whoever Started the Interference Should End It: Guiding
    Data-Free Model Merging via Task Vectors", ICML 2025, arXiv 2503.08099, who take 300 steps of Adam towards it
    (`wudi`); the closed form is ours.

    When to choose:
        Where WUDI's answer is wanted that depends on no learning rate, and for small matrices or LoRA adapters
        (`folklora.merge.factors`). It goes all the way: the authors' few steps stay near the sum of the deltas.

    Equation:
        M = \left( \sum_t \tau_t G_t \right) \left( \sum_t G_t \right)^{+}, \quad
        G_t = \frac{\tau_t^\top \tau_t}{\|\tau_t\|_F^2}

    Example:
        import torch
        from folklora.merge import wudi_closed_form

        base = torch.zeros(8, 6)
        models = [torch.randn(8, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
        print(wudi_closed_form(models, base))

    Args:
        lambda_: λ, the scale of the merged delta.
    """
    changes = deltas(models, base)
    if base.dim() != 2:
        return base + lambda_ * mean(changes)
    merged = solve(*_normal_equations([change.double() for change in changes]))
    return base + lambda_ * merged.to(base.dtype)


def _normal_equations(changes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Σ_t τ_t G_t [out, in] and Σ_t G_t [in, in]; a task that changed nothing has no inputs."""
    size = changes[0].shape[1]
    products, gram = torch.zeros_like(changes[0]), changes[0].new_zeros(size, size)
    for change in changes:
        energy = float(change.square().sum(dtype=torch.float64))
        if energy:
            own = change.mT @ change / energy
            products += change @ own
            gram += own
    return products, gram
