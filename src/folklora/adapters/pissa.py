"""PiSSA: the adapter starts as the strongest singular components of the weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from folklora.adapters.base import AdapterConfig, Update, zeros
from folklora.factored import Factors
from folklora.spectrum import top_factors


@dataclass
class PiSSA(AdapterConfig):
    r"""Principal singular values and vectors adaptation: train the r strongest components of W from where they are.

    W = U S Vᵀ;  B₀ = U_r √(S_r / s) [out, r],  A₀ = √(S_r / s) V_rᵀ [r, in];  W_res = W - s B₀ A₀ is frozen and
    y = W_res x + b + s B (A x). Here W stays as it is and the update is s (B A - B₀ A₀) with a frozen copy of the
    start, the same function, and the first step sees the base; it exports as a LoRA of rank 2r. Exact decomposition.
    r (in + out) trained parameters a weight.

    Source: Meng, Wang, Zhang, "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language
    Models", NeurIPS 2024, arXiv 2404.02948. The authors train with α = r, no dropout and no weight decay: dropout
    would drop principal components, so it is refused; weight decay would shrink them: leave it at 0.

    When to choose:
        Where one task is to be learnt fast at LoRA's size: the strongest directions move from the first step on, and
        for the same reason more of what the model knew is at risk than with LoRA or SoMA. It needs one exact
        decomposition of each adapted weight at the start.

    Equation:
        W = U S V^\top, \quad B_0 = U_r \sqrt{S_r / s}, \quad A_0 = \sqrt{S_r / s}\, V_r^\top
        y = W x + b + s \left( B A - B_0 A_0 \right) x

    Example:
        from peft import get_peft_model
        from folklora import PiSSA, tiny

        model = get_peft_model(tiny.llama(), PiSSA(r=4, target_modules=["q_proj", "v_proj"]))
        model.print_trainable_parameters()
        model(**tiny.batch(), labels=tiny.batch()["input_ids"]).loss.backward()

    Args:
        r: Rank.
        alpha: α of the scaling s = α/r; None takes α = r, the paper's s = 1.
        rslora: Scale by α/√r in place of α/r.
    """

    method: str = "pissa"
    r: int = 16
    alpha: float | None = None
    rslora: bool = False

    paper: ClassVar[str] = "Meng et al. 2024, arXiv 2404.02948"
    trains: ClassVar[str] = "A, B from the top singular triplets"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_rank(self.r)
        if self.dropout:
            raise ValueError(f"{type(self).__name__} takes no dropout: it would drop components of the weight")

    def update(self, weight: Tensor) -> PiSSAUpdate:
        """Decompose the weight; the trained pair starts at the frozen one."""
        B, A = top_factors(weight, self.r, scale=self._scale)
        return PiSSAUpdate(A, B, self._scale)

    def empty(self, shape: tuple[int, int]) -> PiSSAUpdate:
        """The same shapes, zeros."""
        return PiSSAUpdate(zeros(self.r, shape[1]).data, zeros(shape[0], self.r).data, self._scale)

    def trainable_count(self, shape: tuple[int, int]) -> int:
        """r (in + out)."""
        return self.r * sum(shape)

    @property
    def _scale(self) -> float:
        return self.scaling(self.r if self.alpha is None else self.alpha, self.r, self.rslora)


class PiSSAUpdate(Update):
    """ΔW = s (B A - B₀ A₀); A, B trained, A₀, B₀ their frozen start."""

    frozen: ClassVar[frozenset[str]] = frozenset({"A0", "B0"})

    def __init__(self, A: Tensor, B: Tensor, scale: float) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(A.clone()), nn.Parameter(B.clone())
        self.A0, self.B0 = nn.Parameter(A, requires_grad=False), nn.Parameter(B, requires_grad=False)
        self.scale = scale

    def factors(self, x: Tensor | None = None, mask: Tensor | None = None) -> Factors:
        """([A; A₀], s, [B | -B₀])."""
        return Factors(torch.cat([self.A, self.A0]), self.scale, torch.cat([self.B, -self.B0], dim=1))
