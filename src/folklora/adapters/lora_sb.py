"""LoRA-SB: LoRA-XS between the factors of the first update that full fine-tuning would make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from folklora.adapters.base import AdapterConfig
from folklora.adapters.lora_xs import LoRAXSUpdate
from folklora.spectrum import top


@dataclass
class LoRASB(AdapterConfig):
    r"""LoRA "silver bullet": train R [r, r] between frozen factors of the first full update, which R starts with.

    G [out, in] is the gradient of the task's loss by W on a few examples, and AdamW's first step with it is
    ΔW₁ = -η sign(G) ≈ U_r S_r V_rᵀ.  B = U_r [out, r] and A = V_rᵀ [r, in] are frozen, R = diag(S_r / s) is trained,
    and y = W x + b + s B (R (A x)),  s = α/r, which is 1 by default and in the authors' code. So the model starts at
    W + ΔW₁ cut to rank r, not at W, by design. A and B are orthonormal, so a gradient step of size h on R moves W by
    -h s² B Bᵀ G Aᵀ A, at s = 1 the full gradient projected onto their spans: no scaling is left to tune. (That R's
    start is divided by s is not verified in the paper.) r² trained parameters a weight, whatever its size.

    The gradient is taken in evaluation mode, without dropout, unlike the authors', and its decomposition is exact and
    in float32, where theirs is randomised and in bfloat16. The sign makes the start blind to the loss's scale. Entries
    of G that are 0 (a unit that no example reached) add nothing.

    Source: Ponkshe, Singhal, Gorbunov, Tumanov, Horvath, Vepakomma, "Initialization using Update Approximation is a
    Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning", 2024, arXiv 2411.19557. The gradient comes from 50
    (mathematics) or 170 (common sense) training examples there.

    When to choose:
        Where LoRA-XS' size is wanted and its accuracy does not suffice, or where rank and α are not to be tuned
        together. It needs a full gradient of the adapted weights once, before training, and its frozen factors depend
        on the task, so they are stored with R.

    Equation:
        \Delta W_1 = -\eta\,\mathrm{sign}(G) \approx U_r S_r V_r^\top, \quad B = U_r, \; A = V_r^\top, \; R_0 = S_r / s
        y = W x + b + s\,B R A x

    Example:
        from peft import get_peft_model
        from folklora import LoRASB, calibrate, tiny

        model, batch = tiny.llama(), tiny.batch()
        batch["labels"] = batch["input_ids"]
        config = LoRASB(r=8, target_modules=["q_proj", "v_proj"])
        statistics = calibrate(model, [batch], config.needs, target_modules=config)
        adapted = get_peft_model(model, config.calibrated(statistics))
        adapted.print_trainable_parameters()

    Args:
        r: Rank; 96 for language models and 24 on GLUE in the authors' scripts.
        alpha: α of the scaling s = α/r; None takes α = r, the authors' s = 1.
        eta: η, the size of each entry of ΔW₁: the learning rate of the first warm-up step, peak rate / (warm-up share ×
            steps). The default is that of the authors' arithmetic script, 1e-4 / (0.02 × 16,667). Directions matter
            far more.
    """

    method: str = "lora-sb"
    r: int = 96
    alpha: float | None = None
    eta: float = 3e-7

    paper: ClassVar[str] = "Ponkshe et al. 2024, arXiv 2411.19557"
    trains: ClassVar[str] = "R, r × r, between frozen factors of the first full update"
    needs: ClassVar[frozenset[str]] = frozenset({"gradient"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_rank(self.r)
        if self.eta <= 0:
            raise ValueError(f"eta must be above 0, not {self.eta}")

    def update(self, weight: Tensor, stats: Mapping[str, Tensor]) -> LoRAXSUpdate:
        """Decompose the first update."""
        # the sign has entries of -1, 0 and 1: η is left out until after the decomposition
        step = top(-stats["gradient"].sign(), self.r)
        R = torch.diag(self.eta / self._scale * step.S)
        return LoRAXSUpdate(step.V.mT, R, step.U, self._scale, starts_at_base=False)

    def empty(self, shape: tuple[int, int]) -> LoRAXSUpdate:
        """The same shapes, zeros."""
        return LoRAXSUpdate.zeros(self.r, shape, self._scale, starts_at_base=False)

    def check_statistics(self, stats: Mapping[str, Tensor], shape: tuple[int, int], name: str) -> list[str]:
        """A gradient of zeros: it has no direction."""
        problems = super().check_statistics(stats, shape, name)
        if not problems and not stats["gradient"].any():
            problems.append(f"the gradient of layer '{name}' is zero, so the first step has no direction; exclude it")
        return problems

    def trainable_count(self, shape: tuple[int, int]) -> int:
        """r²."""
        return self.r**2

    @property
    def _scale(self) -> float:
        return self.scaling(self.r if self.alpha is None else self.alpha, self.r)
