"""LoRA-XS: only an r x r matrix is trained, between two frozen factors of the weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from folklora.adapters.base import AdapterConfig, Update, zeros
from folklora.factored import Factors
from folklora.spectrum import top


@dataclass
class LoRAXS(AdapterConfig):
    r"""Low-rank adaptation with an extremely small number of parameters: train R [r, r] between two frozen factors.

    W = P S Qᵀ;  B = P_r [out, r] and A = S_r Q_rᵀ [r, in] are frozen (all singular values on the input side), and
    y = W x + b + s B (R (A x)),  s = α/r, with R ~ N(0, σ²) trained, σ = 1e-5. W is not reduced by its principal part,
    so the first step is the base model up to σ, and exactly at σ = 0 (R's gradient s Bᵀ G Aᵀ is not zero there).
    r² trained parameters a weight, whatever its size. The decomposition is exact, the authors' is randomised, and the
    factors are float32. A rank above min(out, in) is an error; the authors cut it down.

    Source: Bałazy, Banaei, Aberer, Tabor, "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters",
    2024, arXiv 2405.17604. Learning rates are some ten times LoRA's (4e-3 for mathematics, 1e-3 on GLUE).

    When to choose:
        Where very many adapters must be stored or sent, a few kilobytes each. It learns less than a LoRA of the same
        rank; where accuracy matters more, LoRA-SB starts from the task's own gradient at the same size.

    Equation:
        W = P S Q^\top, \quad B = P_r, \quad A = S_r Q_r^\top
        y = W x + b + s\,B R A x, \quad R \sim \mathcal N(0, \sigma^2)

    Example:
        from peft import get_peft_model
        from folklora import LoRAXS, tiny

        model = get_peft_model(tiny.llama(), LoRAXS(r=8, target_modules=["q_proj", "v_proj"]))
        model.print_trainable_parameters()

    Args:
        r: Rank; the paper uses 4 to 25 on GLUE, 32 and 64 for language models.
        alpha: α of the scaling s = α/r; None takes α = r, so s = 1. The paper's 16 on GLUE makes s follow r.
        sigma: Standard deviation σ of R's start.
    """

    method: str = "lora-xs"
    r: int = 64
    alpha: float | None = None
    sigma: float = 1e-5

    paper: ClassVar[str] = "Bałazy et al. 2024, arXiv 2405.17604"
    trains: ClassVar[str] = "R, r × r, between frozen singular factors"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_rank(self.r)
        if self.sigma < 0:
            raise ValueError(f"sigma must be at least 0, not {self.sigma}")

    def update(self, weight: Tensor) -> LoRAXSUpdate:
        """Decompose the weight; draw R."""
        strongest = top(weight, self.r)
        R = self.sigma * torch.randn(self.r, self.r, device=weight.device)
        A = strongest.S.unsqueeze(-1) * strongest.V.mT
        return LoRAXSUpdate(A, R, strongest.U, self._scale, starts_at_base=not self.sigma)

    def empty(self, shape: tuple[int, int]) -> LoRAXSUpdate:
        """The same shapes, zeros."""
        return LoRAXSUpdate.zeros(self.r, shape, self._scale, starts_at_base=not self.sigma)

    def trainable_count(self, shape: tuple[int, int]) -> int:
        """r²."""
        return self.r**2

    @property
    def _scale(self) -> float:
        return self.scaling(self.r if self.alpha is None else self.alpha, self.r)


class LoRAXSUpdate(Update):
    """ΔW = s B R A; R [r, r] trained, A [r, in] and B [out, r] frozen."""

    frozen: ClassVar[frozenset[str]] = frozenset({"A", "B"})

    def __init__(self, A: Tensor, R: Tensor, B: Tensor, scale: float, *, starts_at_base: bool) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(A, requires_grad=False), nn.Parameter(B, requires_grad=False)
        self.R = nn.Parameter(R)
        self.scale, self.starts_at_base = scale, starts_at_base

    @classmethod
    def zeros(cls, r: int, shape: tuple[int, int], scale: float, *, starts_at_base: bool) -> LoRAXSUpdate:
        """An update of rank r of a weight of `shape` (out, in) without values."""
        A, R, B = zeros(r, shape[1]).data, zeros(r, r).data, zeros(shape[0], r).data
        return cls(A, R, B, scale, starts_at_base=starts_at_base)

    def factors(self, x: Tensor | None = None, mask: Tensor | None = None) -> Factors:
        """(R A, s, B), or (A, s, B R) where the output is the narrower side."""
        if self.A.shape[1] <= self.B.shape[0]:
            return Factors(self.R @ self.A, self.scale, self.B)
        return Factors(self.A, self.scale, self.B @ self.R)
