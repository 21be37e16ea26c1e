"""One soft prompt, the same for every row; several on one model stand in a row, the newest first."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from peft import PeftModel
from torch import Tensor, nn

from folklora.prompts.base import Prompt, PromptConfig, vocabulary
from folklora.prompts.host import prompts_of

_SHAPES = ("none", "mlp1", "mlp2")


@dataclass
class SoftPrompt(PromptConfig):
    """P [prompt_length, width], trained vectors before the embeddings of the text (prompt tuning).

    P starts at the embeddings of random tokens. With `mlp`, P' = P + f(P) stands before the text, and f is trained too:
        "mlp1": f(P) = tanh(P V₁ + c₁) V₂ + c₂,  V₁ [width, bottleneck]
        "mlp2": f(P) = tanh(relu(P V₁ + c₁) V₂ + c₂) V₃ + c₃,  V₂ [bottleneck, bottleneck // 2]
    `fold` writes P' into P once it is learnt. Of several active ones the last named stands first.

    Args:
        prompt_length: L_p.
        mlp: f: "none", "mlp1" or "mlp2".
        bottleneck: Width of f's hidden layer.
    """

    method: str = "soft-prompt"
    mlp: Literal["none", "mlp1", "mlp2"] = "none"
    bottleneck: int = 800

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_sizes("bottleneck")
        if self.mlp not in _SHAPES:
            raise ValueError(f"mlp must be {', '.join(_SHAPES[:-1])} or {_SHAPES[-1]}, not {self.mlp!r}")
        if self.mlp == "mlp2" and self.bottleneck < 2:
            raise ValueError("mlp2 halves its bottleneck, which must be at least 2")

    def prompt(self, embedding: nn.Module) -> Prompt:
        """P at random tokens' embeddings, and f as PyTorch starts linear layers."""
        return SoftPromptVectors(vocabulary(embedding, self.prompt_length), self.mlp, self.bottleneck)


class SoftPromptVectors(Prompt):
    """P, and f where there is one.

    Args:
        start: P [length, width].
        mlp: As in `SoftPrompt`.
        bottleneck: As in `SoftPrompt`.
    """

    def __init__(self, start: Tensor, mlp: str = "none", bottleneck: int = 800) -> None:
        super().__init__(len(start))
        self.embedding = nn.Parameter(start)
        self.mlp = None if mlp == "none" else _mlp(mlp, start.shape[1], bottleneck, start.device)

    def vectors(self, query: Tensor | None = None) -> Tensor:
        """P', [1, length, width]."""
        whole = self.embedding if self.mlp is None else self.embedding + self.mlp(self.embedding)
        return whole.unsqueeze(0)

    @torch.no_grad()
    def fold(self) -> None:
        """P becomes P'; f is gone."""
        self.embedding.copy_(self.vectors()[0])
        self.mlp = None


def fold(model: PeftModel, adapter_name: str) -> None:
    """Write a soft prompt's `mlp` into its vectors; the model computes what it did."""
    prompts_of(model)[adapter_name].fold()
    model.peft_config[adapter_name].mlp = "none"


def _mlp(shape: str, width: int, bottleneck: int, device: torch.device) -> nn.Sequential:
    linear = partial(nn.Linear, device=device)
    if shape == "mlp1":
        return nn.Sequential(linear(width, bottleneck), nn.Tanh(), linear(bottleneck, width))
    half = bottleneck // 2
    inner = (linear(width, bottleneck), nn.ReLU(), linear(bottleneck, half), nn.Tanh())
    return nn.Sequential(*inner, linear(half, width))
