"""TIES: trim, elect a sign, merge what agrees."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from folklora.merge.blocks import Blocks, Rows
from folklora.merge.contract import merging
from folklora.merge.election import united
from folklora.merge.sparsify import magnitude


@merging(
    paper="Yadav et al. 2023, arXiv 2306.01708",
    trains="nothing: the trimmed deltas that agree in sign",
)
def ties(
    models: Sequence[Tensor],
    base: Tensor,
    *,
    weight: Sequence[float] = (1.0,),
    density: Sequence[float] = (1.0,),
    lambda_: float = 1.0,
    normalize: bool = True,
) -> Rows:
    r"""TIES: trim each task vector, elect a sign for each entry, take the mean of those that have it.

    τ_t = θ_t - θ_0.
        trim     τ̂_t = the int(ρ_t N) entries of τ_t of largest magnitude, 0 elsewhere
        elect    γ = sign(Σ_t w_t τ̂_t), +1 where the sum is 0
        merge    τ = Σ_{t: sign(w_t τ̂_t) = γ} w_t τ̂_t / Σ_{the same t} |w_t|
        θ = θ_0 + λ τ
    Without `normalize` the sum is not divided. Exactly int(ρ_t N) entries are kept; of equal ones, the first.

    The authors trim over all the tensors of a model at once, with ρ = 0.2; here, as in mergekit and PEFT, each tensor
    is trimmed on its own. mergekit divides by Σ w_t, which turns a negative weight back into a positive one; here it
    stays negative. PEFT elects without the weights and divides by the count, which is the same where w_t = 1.

    Of the entries whose magnitude is the threshold, mergekit and PEFT keep those that an unstable sort puts first. Task
    vectors of bfloat16 checkpoints have few distinct magnitudes (1 to 4 % of the entries are at the threshold), and
    results differ in these entries alone. Likewise the sign of a sum that is 0 but for rounding is not the same.

    Source: Yadav, Tam, Choshen, Raffel, Bansal, "TIES-Merging: Resolving Interference When Merging Models", NeurIPS
    2023, arXiv 2306.01708. The authors' ρ is 0.2 and their λ without validation data 1.

    When to choose:
        For several tasks whose updates are sparse or disagree in sign, when only the weights are there. Its scale
        λ matters; where the tensors are matrices and tasks are four or more, TSV-M does better on published figures.

    Equation:
        \tau = \frac{\sum_{t \in A} w_t \hat\tau_t}{\sum_{t \in A} |w_t|}, \quad
        A = \{t : \operatorname{sign}(w_t \hat\tau_t) = \operatorname{sign}(\sum_s w_s \hat\tau_s)\}
        \theta = \theta_0 + \lambda \tau

    Example:
        import torch
        from folklora.merge import ties

        base = torch.zeros(4)
        models = [torch.tensor([1.0, 0.1, 2.0, -1.0]), torch.tensor([3.0, 0.2, -1.0, -3.0])]
        print(ties(models, base, density=[0.75]))  # 2, 0, 2, -2: the second is trimmed, the third disputed

    Args:
        weight: w_t, a number a model.
        density: ρ_t, the fraction kept of each task vector.
        lambda_: λ, the scale of the merged task vector.
        normalize: Divide by the sum of the weights that agree.
    """
    trimmed = magnitude(Blocks.of(models, base).changes(), density)
    return trimmed.merged(lambda deltas, base: base + lambda_ * united(deltas, weight, normalize))
