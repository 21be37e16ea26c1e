"""LoRA: a low-rank update learned beside a frozen weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from folklora.adapters.base import AdapterConfig, Update, kaiming_uniform, zeros
from folklora.factored import Factors


@dataclass
class LoRA(AdapterConfig):
    r"""Low-rank adaptation: y = W x + b + s B (A x), with A [r, in] and B [out, r] trained and W frozen.

    A starts Kaiming-uniform, U(-1/√in, 1/√in), B at 0, so the first step sees the base model exactly. The scaling s is
    α/r, or α/√r with `rslora`, which keeps the update's size as the rank grows. r (in + out) trained parameters a
    weight.
    (The paper draws A from a Gaussian; its code and PEFT use Kaiming-uniform, as here.)

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv 2106.09685; the scaling
    α/√r: Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", 2023, arXiv 2312.03732.

    When to choose:
        First: every tool reads it, it merges into the weight, and the first steps are safe. Where its rank does not
        suffice or its size is too much, the other methods here say what they do better. On a stream of tasks it
        overwrites what it learnt before.

    Equation:
        y = W x + b + s\,B A x, \quad s = \frac{\alpha}{r}

    Example:
        from peft import get_peft_model
        from folklora import LoRA, tiny

        model = get_peft_model(tiny.llama(), LoRA(r=8, target_modules="all-linear"))
        model.print_trainable_parameters()
        model(**tiny.batch(), labels=tiny.batch()["input_ids"]).loss.backward()

    Args:
        r: Rank.
        alpha: α of the scaling.
        rslora: Scale by α/√r in place of α/r.
    """

    method: str = "lora"
    r: int = 8
    alpha: float = 16.0
    rslora: bool = False

    paper: ClassVar[str] = "Hu et al. 2022, arXiv 2106.09685"
    trains: ClassVar[str] = "A, B"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_rank(self.r)

    def update(self, weight: Tensor) -> LoRAUpdate:
        """A new LoRA pair: A Kaiming-uniform, B zero."""
        out, columns = weight.shape
        return LoRAUpdate(kaiming_uniform(self.r, columns, weight), zeros(out, self.r, like=weight), self._scale)

    def empty(self, shape: tuple[int, int]) -> LoRAUpdate:
        """The same shapes, zeros."""
        return LoRAUpdate(zeros(self.r, shape[1]), zeros(shape[0], self.r), self._scale)

    def trainable_count(self, shape: tuple[int, int]) -> int:
        """r (in + out)."""
        return self.r * sum(shape)

    @property
    def _scale(self) -> float:
        return self.scaling(self.alpha, self.r, self.rslora)


class LoRAUpdate(Update):
    """ΔW = s B A; A [r, in] and B [out, r] trained, s a constant."""

    def __init__(self, A: nn.Parameter, B: nn.Parameter, scale: float) -> None:
        super().__init__()
        self.A, self.B, self.scale = A, B, scale

    def factors(self, x: Tensor | None = None, mask: Tensor | None = None) -> Factors:
        """(A, s, B)."""
        return Factors(self.A, self.scale, self.B)
