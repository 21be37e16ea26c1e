"""CorDA: the adapter starts from the components of the weight that a task's activations use most, or least."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from folklora.adapters.base import AdapterConfig, zeros
from folklora.adapters.pissa import PiSSAUpdate
from folklora.covariance import covariance_factors


@dataclass
class CorDA(AdapterConfig):
    r"""Context-oriented decomposition adaptation: choose what to train of W [out, in] by what the layer's input uses.

    C = E[x xᵀ] [in, in] of the layer's input on examples;  C' = C + δ mean(diag C) I;  W C' = U S Vᵀ;  V̂ = C'⁻¹ V, so
    that U S V̂ᵀ = W.  With J the first r places (`mode="ipm"`) or the last r (`mode="kpm"`):
    B₀ = U_J √(S_J / s) [out, r],  A₀ = √(S_J / s) V̂_Jᵀ [r, in];  W_res = W - s B₀ A₀ is frozen and
    y = W_res x + b + s B (A x), with A, B trained, s = α/r. The first step is the base model. Here W stays as it is and
    the update is s (B A - B₀ A₀) with a frozen copy of the start, the same function; it exports as a LoRA of rank 2r.
    r (in + out) trained parameters a weight.

    s B₀ A₀ = U_J U_Jᵀ W, whatever C's scale; the scale sets how B₀ and A₀ share it (B₀ grows as √c, A₀ shrinks), and
    with that the effective step sizes. Where inputs hardly vary, V̂ has large rows, and "kpm" picks just those: give
    as many tokens as the layer's width many times over, or raise the damping. V̂ is taken as Wᵀ U S⁻¹ in float64,
    with no inverse, so that the authors' doubling of δ until the inverse is accurate (to 0.05) never sets in. They
    divide each example's x by the magnitude of its largest entry before they square it (the weight of the examples):
    `calibrate(..., normalise=True)` does; the stream does not.

    Source: Yang, Li, Zhou, Song, Wu, Nie, Ghanem, "CorDA: Context-Oriented Decomposition Adaptation of Large Language
    Models for Task-Aware Parameter-Efficient Fine-tuning", NeurIPS 2024, arXiv 2406.05223. The authors train with
    α = r; weight decay would shrink the components and dropout drop them, so dropout is refused.

    When to choose:
        Where some 256 representative examples are at hand. "ipm", calibrated on the task to learn, starts faster and
        ends better than LoRA and PiSSA in the paper; "kpm", calibrated on questions whose answers must survive,
        forgets less than they do. The decomposition is exact and takes minutes a large layer on a CPU for "kpm".

    Equation:
        C' = C + \delta\,\overline{\mathrm{diag}\,C}\,I
        W C' = U \Sigma V^\top, \quad \hat V^\top = V^\top C'^{-1}
        B_0 = U_J \sqrt{\Sigma_J / s}, \quad A_0 = \sqrt{\Sigma_J / s}\,\hat V_J^\top
        y = (W - s B_0 A_0)\,x + b + s\,B A x

    Example:
        import torch
        from peft import get_peft_model
        from folklora import CorDA, calibrate, tiny

        model = tiny.llama()
        config = CorDA(r=4, mode="kpm", target_modules=["q_proj", "v_proj"])
        statistics = calibrate(model, [tiny.batch()], config.needs, target_modules=config)
        adapted = get_peft_model(model, config.calibrated(statistics))
        print(adapted(**tiny.batch()).logits.shape)

    Args:
        r: Rank.
        alpha: α of the scaling s = α/r; None takes α = r, the authors' s = 1.
        mode: "ipm" trains the components that the examples use most (instruction-previewed), "kpm" those that they
            use least, so that what the examples need stays frozen (knowledge-preserved).
        damping: δ, as a share of C's mean diagonal entry.
        power: Exponent of C'. 1 is the paper's; 0.5 orders the components by their share of the output's energy.
    """

    method: str = "corda"
    r: int = 128
    alpha: float | None = None
    mode: Literal["ipm", "kpm"] = "ipm"
    damping: float = 0.01
    power: float = 1.0

    paper: ClassVar[str] = "Yang et al. 2024, arXiv 2406.05223"
    trains: ClassVar[str] = "A, B from the components that given examples use most, or least"
    needs: ClassVar[frozenset[str]] = frozenset({"covariance"})
    layer_kinds: ClassVar[frozenset[str]] = frozenset({"linear"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_rank(self.r)
        if self.mode not in ("ipm", "kpm"):
            raise ValueError(f"mode must be 'ipm' or 'kpm', not {self.mode!r}")
        if self.damping <= 0:
            raise ValueError(f"damping must be above 0, not {self.damping}")
        if not 0 < self.power <= 1:
            raise ValueError(f"power must be above 0 and at most 1, not {self.power}")
        if self.dropout:
            raise ValueError("CorDA takes no dropout: it would drop components of the weight")

    def update(self, weight: Tensor, stats: Mapping[str, Tensor]) -> PiSSAUpdate:
        """Decompose the weight by its input's covariance; the trained pair starts at the frozen one."""
        end = "top" if self.mode == "ipm" else "bottom"
        B, A = covariance_factors(
            weight, stats["covariance"], self.r, self._scale, end=end, damping=self.damping, power=self.power
        )
        return PiSSAUpdate(A, B, self._scale)

    def empty(self, shape: tuple[int, int]) -> PiSSAUpdate:
        """The same shapes, zeros."""
        return PiSSAUpdate(zeros(self.r, shape[1]).data, zeros(shape[0], self.r).data, self._scale)

    def check_statistics(self, stats: Mapping[str, Tensor], shape: tuple[int, int], name: str) -> list[str]:
        """A covariance of zeros: nothing can be chosen by it."""
        problems = super().check_statistics(stats, shape, name)
        if not problems and not stats["covariance"].diagonal().mean() > 0:
            problems.append(f"the covariance of layer '{name}' is zero: the examples never gave it an input")
        return problems

    def trainable_count(self, shape: tuple[int, int]) -> int:
        """r (in + out)."""
        return self.r * sum(shape)

    @property
    def _scale(self) -> float:
        return self.scaling(self.r if self.alpha is None else self.alpha, self.r)
