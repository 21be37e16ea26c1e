"""SORSA: the strongest singular components with their values apart, and the vectors held orthonormal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from folklora.adapters.base import AdapterConfig, Update
from folklora.factored import Factors, concatenate
from folklora.spectrum import Triplets, orthonormality_error, top


@dataclass
class SORSA(AdapterConfig):
    r"""Singular values and orthonormal regularised singular vectors adaptation: PiSSA with the scale kept apart.

    W = U S Vᵀ;  B = U_r [out, r],  d = S_r [r],  A = V_rᵀ [r, in] are trained from there, and y = W_res x + b +
    s B (d ⊙ (A drop(x))) with W_res = W - s B₀ diag(d₀) A₀ frozen. Here W stays as it is and the frozen start is a part
    of the update, ΔW = s (B diag(d) A - B₀ diag(d₀) A₀), the same function; it exports as a LoRA of rank 2r. s = 1
    unless `alpha` is given, and the first step sees the base for any s. r (in + out) + r trained parameters a weight.

    Loss:  L_task + (γ / lr) L_reg, where L_reg is the mean of ‖A Aᵀ - I_r‖_F and ‖Bᵀ B - I_r‖_F over all 2M factor
    matrices, and lr the peak learning rate, a constant: under plain gradient descent at that rate the regulariser has
    a step size γ of its own. As in the authors' trainer its gradient is added once a step, after clipping; unlike
    there it is not divided by the number of accumulated batches. The norms are smoothed, √(‖·‖² + ε) with ε the
    machine's: without that, the gradient of orthonormal factors is round-off blown up to norm 2, which Adam takes for
    a direction. So L_reg starts at √ε, 3e-4, and not at 0. A mean over more matrices pulls each one less: γ of one
    model does not fit one of another size, except with `reduction="sum"`. Weight decay works against
    orthonormality: train with 0.

    Source: Cao, Song, "SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation of Large Language
    Models", 2024, arXiv 2409.00055.

    When to choose:
        At PiSSA's cost (and r numbers more), where training must be fast and well conditioned: the scale lives in d
        alone. At high learning rates it is as unstable as PiSSA. For keeping what the model knew, the minor components
        of SoMA or a plain LoRA are safer.

    Equation:
        y = W x + b + s \left( B\, \mathrm{diag}(d)\, A - B_0\, \mathrm{diag}(d_0)\, A_0 \right) x
        L_{reg} = \frac{1}{2M} \sum_i \left( \| A_i A_i^\top - I \|_F + \| B_i^\top B_i - I \|_F \right)
        L = L_{task} + \frac{\gamma}{lr} L_{reg}

    Example:
        from peft import get_peft_model
        from folklora import SORSA, penalty, tiny

        config = SORSA(r=4, peak_learning_rate=1e-3, target_modules=["q_proj", "v_proj"])
        model = get_peft_model(tiny.llama(), config)
        loss = model(**tiny.batch(), labels=tiny.batch()["input_ids"]).loss
        print(float(loss), float(penalty(model)))

    Args:
        r: Rank. The authors train with 128.
        alpha: α of the scaling s = α/r; None takes s = 1, as the authors do.
        gamma: γ, the step size of the regulariser; 0 leaves it out. The authors' runs have 4e-4.
        peak_learning_rate: The run's highest learning rate, by which γ is divided; set it to your optimizer's. The
            authors' is 3e-5.
        reduction: Over the factor matrices, "mean" as in the paper, or "sum".
    """

    method: str = "sorsa"
    r: int = 16
    alpha: float | None = None
    gamma: float = 4e-4
    peak_learning_rate: float = 3e-5
    reduction: Literal["mean", "sum"] = "mean"

    paper: ClassVar[str] = "Cao, Song 2024, arXiv 2409.00055"
    trains: ClassVar[str] = "A, B, d from the top singular triplets"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_rank(self.r)
        if self.gamma < 0:
            raise ValueError(f"gamma must be at least 0, not {self.gamma}")
        if not self.peak_learning_rate > 0:
            raise ValueError(f"peak_learning_rate must be above 0, not {self.peak_learning_rate}")
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', not {self.reduction!r}")

    @property
    def penalty_reduction(self) -> str:
        """How the host combines the weights' penalties."""
        return self.reduction

    def update(self, weight: Tensor) -> SORSAUpdate:
        """Decompose the weight; the trained triplets start at the frozen ones."""
        return SORSAUpdate(top(weight, self.r), self)

    def empty(self, shape: tuple[int, int]) -> SORSAUpdate:
        """The same shapes, zeros."""
        out, columns = shape
        return SORSAUpdate(Triplets(torch.zeros(out, self.r), torch.zeros(self.r), torch.zeros(columns, self.r)), self)

    def trainable_count(self, shape: tuple[int, int]) -> int:
        """r (in + out) + r."""
        return self.r * sum(shape) + self.r


class SORSAUpdate(Update):
    """ΔW = s (B diag(d) A - B₀ diag(d₀) A₀); A, B, d trained, A₀, B₀, d₀ their frozen start."""

    frozen: ClassVar[frozenset[str]] = frozenset({"A0", "B0", "d0"})
    batched_penalty: ClassVar[bool] = True

    def __init__(self, start: Triplets, config: SORSA) -> None:
        super().__init__()
        A, B, d = start.V.T.contiguous(), start.U, start.S
        self.A, self.B, self.d = (nn.Parameter(part.clone()) for part in (A, B, d))
        self.A0, self.B0, self.d0 = (nn.Parameter(part, requires_grad=False) for part in (A, B, d))
        self.scale = 1.0 if config.alpha is None else config.scaling(config.alpha, config.r)
        # the host's mean is over weights, of which each has two factor matrices
        self.weight = config.gamma / config.peak_learning_rate / (2 if config.reduction == "mean" else 1)

    def factors(self, x: Tensor | None = None, mask: Tensor | None = None) -> Factors:
        """([A; A₀], [s d; -s d₀], [B | B₀])."""
        return concatenate(list(self.split()))

    def split(self, x: Tensor | None = None, mask: Tensor | None = None) -> tuple[Factors, Factors | None]:
        """(A, s d, B) reads the dropped-out input, (A₀, -s d₀, B₀) the whole: it belongs to W_res."""
        return Factors(self.A, self.scale * self.d, self.B), Factors(self.A0, -self.scale * self.d0, self.B0)

    def penalty(self) -> Tensor | None:
        """γ / lr times how far A's rows and B's columns are from orthonormal; None where γ is 0."""
        if not self.weight:
            return None
        return self.weight * (orthonormality_error(self.A) + orthonormality_error(self.B.T))
