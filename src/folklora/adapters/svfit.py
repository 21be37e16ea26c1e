"""SVFit: train nothing but the strongest singular values of each weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from folklora.adapters.base import AdapterConfig, zeros
from folklora.adapters.vectors import VectorsUpdate, empty_frame, frame_of
from folklora.factored import Factors
from folklora.spectrum import Triplets, energy_rank

# singular vectors of values below this share of the largest are round-off, not the weight's
_NULL = 1e-6


@dataclass
class SVFit(AdapterConfig):
    r"""Singular-value fine-tuning: y = W x + b + U_r ((σ - S_r) ⊙ (V_rᵀ x)), and only the r numbers σ are trained.

    W = U S Vᵀ with U_r [out, r], S_r [r], V_r [in, r] its r strongest triplets, frozen like W itself. σ starts at S_r,
    so the first step sees the base exactly. What is trained and saved is δ = σ - S_r, from 0: a weight decay then pulls
    back to the base and not to a weight without these components. The sign of σ is free. r trained parameters a weight.
    Components whose singular value is 0 (below 1e-6 of the largest) are none of the weight's: their δ has no effect.

    Without `r`, each weight has the least r that holds the share `energy` of Σ S² (`energy_of="s2"`) or Σ S ("s"); the
    ranks found are written into `rank_pattern`, so that such a configuration belongs to one model. The paper says "over
    99 % of the information" and not of which, and its parameter counts mean r = 768, all values, on RoBERTa-base. No
    code of the authors is public: where σ starts and what is frozen is the paper's, the rest is our choice.

    A saved file holds 2 r numbers a weight, δ and S_r, and loading decomposes the base weight again. Single vectors are
    unique only where their singular values lie apart: a warning says where they do not, or where the base that is
    loaded (in another precision, say) differs too much from the training's. `save_vectors` also saves U_r and V_r,
    r (in + out) numbers, up to twice the weight. In memory they are there in any case, float32. Exports as a LoRA of
    rank r.

    Source: Sun, Wei, Wu, Shi, He, Ma, Xie, Yang, "SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models
    Using Singular Values", 2024, arXiv 2409.05926.

    When to choose:
        Where an adapter must be a few hundred numbers a weight (one a user, say) and the task is near what the model
        knows: directions are rescaled, never turned, and what needs a new direction is not learnt. Its learning rate
        must be far above LoRA's, 1e-2 to 1e-1. It forgets old tasks faster than LoRA does.

    Equation:
        y = W x + b + U_r \, \mathrm{diag}(\sigma - S_r) \, V_r^\top x

    Example:
        from peft import get_peft_model
        from folklora import SVFit, tiny

        model = get_peft_model(tiny.llama(), SVFit(energy=0.9, target_modules=["q_proj", "v_proj"]))
        model.print_trainable_parameters()
        print(model.peft_config["default"].rank_pattern)

    Args:
        r: Number of singular values; None chooses it for each weight by `energy`.
        energy: Share of a weight's energy that the chosen values hold, above 0 and at most 1.
        energy_of: What energy is summed over, "s2" for S² or "s" for S.
        save_vectors: Save the singular vectors too, so that loading decomposes nothing.
    """

    method: str = "svfit"
    r: int | None = None
    energy: float = 0.99
    energy_of: Literal["s2", "s"] = "s2"
    save_vectors: bool = False

    paper: ClassVar[str] = "Sun et al. 2024, arXiv 2409.05926"
    trains: ClassVar[str] = "the top singular values"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r is not None:
            self.check_rank(self.r)
        if not 0 < self.energy <= 1:
            raise ValueError(f"energy must be above 0 and at most 1, not {self.energy}")
        if self.energy_of not in ("s2", "s"):
            raise ValueError(f"energy_of must be 's2' or 's', not {self.energy_of!r}")

    def chosen_rank(self, weight: Tensor) -> int | None:
        """The number of singular values that hold `energy`; None where r is given."""
        return energy_rank(weight, self.energy, squared=self.energy_of == "s2") if self.r is None else None

    def update(self, weight: Tensor) -> SVFitUpdate:
        """Decompose the weight; δ starts at 0."""
        return SVFitUpdate(frame_of(weight, self._rank, self.save_vectors), self.save_vectors)

    def empty(self, shape: tuple[int, int]) -> SVFitUpdate:
        """The same shapes, zeros."""
        return SVFitUpdate(empty_frame(shape, self._rank), self.save_vectors)

    def check(self, shape: tuple[int, int], name: str) -> list[str]:
        """A rank above the weight's."""
        return [] if self.r is None else super().check(shape, name)

    def trainable_count(self, shape: tuple[int, int]) -> int:
        """r."""
        return self._rank

    @property
    def _rank(self) -> int:
        if self.r is None:
            raise ValueError(
                "r is None: the number of singular values is read from each weight when a model that has its weights "
                "is adapted; give r where there are none yet"
            )
        return self.r


class SVFitUpdate(VectorsUpdate):
    """ΔW = U diag(δ) Vᵀ; δ trained."""

    def __init__(self, frame: Triplets, save_vectors: bool) -> None:
        super().__init__(frame, save_vectors)
        self.delta = zeros(len(frame.S), like=frame.S)

    @property
    def sigma(self) -> Tensor:
        """The trained singular values σ = S_r + δ."""
        return self.S + self.delta

    def factors(self, x: Tensor | None = None, mask: Tensor | None = None) -> Factors:
        """(Vᵀ, δ, U)."""
        return Factors(self.V.T, self.delta * (self.S > _NULL * self.S[:1]), self.U)
