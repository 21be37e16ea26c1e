"""ViDA: a low-rank and a high-rank update side by side, whose shares are set from outside for each batch or sample."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from folklora.adapters.base import AdapterConfig, Update, kaiming_uniform, zeros
from folklora.adapters.host.call import by_row, telling
from folklora.adapters.host.layer import layers_of
from folklora.factored import Factors

_TOLD = "vida_scales"
_ATTENTION = ("attention", "attn")


@dataclass
class ViDA(AdapterConfig):
    r"""Visual domain adapter: a low- and a high-rank update with scales of their own, for test-time adaptation.

    y = W x + b + λ_l U₁ D₁ x + λ_h U₂ D₂ x, with D₁ [r₁, in], U₁ [out, r₁], r₁ = 1, and D₂ [r₂, in], U₂ [out, r₂],
    r₂ = 128. Here D₁ and D₂ are stacked as A [r₁ + r₂, in], U₁ and U₂ side by side as B [out, r₁ + r₂], and the scales
    are their gate: s = (λ_l, ..., λ_l, λ_h, ..., λ_h). D ~ N(0, 1/r⁴), so that its standard deviation is 1/r²; U = 0:
    the first step sees the base. (r₁ + r₂) (in + out) trained parameters a weight. Where no target is named, every
    linear layer inside attention is adapted, as in the authors' code.

    The low rank is to hold what the domains have in common, the high rank to follow the present one. The scales are 1
    until `folklora.adapters.vida.scaled(model, low, high)` sets them for the calls within: numbers, or one value a row
    of the batch. With numbers (or none) the update merges and exports at these scales; with one value a row it has no
    single weight. `folklora.HomeostaticAdaptation` sets them by the teacher's uncertainty and is the method's loop.

    The authors' code never applies λ_h: a condition sets one scale a layer, always the low one. Here both count. Its
    start leaves the high rank almost dead (1/128² = 6e-5); the authors load adapters that were trained on source data,
    how long is not said. `start="kaiming"` draws both parts as LoRA does.

    Source: Liu, Yang, Jia, Lu, Guo, Xue, Zhang, "ViDA: Homeostatic Visual Domain Adapter for Continual Test Time
    Adaptation", ICLR 2024, arXiv 2306.04344.

    When to choose:
        A deployed image classifier meets unlabelled images whose domain keeps changing, and its base must stay as it
        is. It needs `folklora.HomeostaticAdaptation`; without that it is a LoRA of rank r₁ + r₂. Where labels are
        there, take LoRA; where a batch may cost one pass only, compare `folklora.domain.TENT`.

    Equation:
        y = W x + b + \lambda_l\, U_1 D_1 x + \lambda_h\, U_2 D_2 x
        (\lambda_l, \lambda_h) = (1 - u, 1 + u) \ (u \ge \Theta), \quad (1 + u, 1 - u) \ (u < \Theta)

    Example:
        import torch
        from folklora import HomeostaticAdaptation, ViDA
        from transformers import ViTConfig, ViTForImageClassification

        sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
        classifier = ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=4))
        adaptation = HomeostaticAdaptation(classifier, ViDA(r=8))
        for images in torch.rand(3, 5, 3, 16, 16):  # a stream of three batches, no labels
            print(adaptation.predict(images).argmax(1))

    Args:
        r: r₂, the high rank.
        low_rank: r₁, the low rank.
        start: How D is drawn: "paper" from N(0, 1/r⁴) of its own rank, "kaiming" from U(-1/√in, 1/√in).
    """

    method: str = "vida"
    r: int = 128
    low_rank: int = 1
    start: Literal["paper", "kaiming"] = "paper"

    paper: ClassVar[str] = "Liu et al. 2024, arXiv 2306.04344"
    trains: ClassVar[str] = "a low-rank and a high-rank pair A, B"
    layer_kinds: ClassVar[frozenset[str]] = frozenset({"linear"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_rank(self.r)
        if not isinstance(self.low_rank, int) or not 1 <= self.low_rank <= self.r:
            raise ValueError(
                f"low_rank must be a whole number from 1 to the high rank r = {self.r}, not {self.low_rank!r}"
            )
        if self.start not in ("paper", "kaiming"):
            raise ValueError(f"start must be 'paper' or 'kaiming', not {self.start!r}")

    def fit(self, model: nn.Module) -> None:
        """Take the linear layers inside attention where no targets are named."""
        if self.target_modules is None and not self.target_parameters:
            found = [name for name, part in model.named_modules() if _in_attention(name, part)]
            self.target_modules = [name.removesuffix(".base_layer") for name in found]
            if not self.target_modules:
                raise ValueError("no linear layer of this model is inside attention: name the layers in target_modules")

    def update(self, weight: Tensor) -> ViDAUpdate:
        """Both A at their random start, B zero."""
        out, columns = weight.shape
        ranks = (self.low_rank, self.r)
        if self.start == "kaiming":
            A = kaiming_uniform(sum(ranks), columns, weight)
        else:
            parts = [torch.randn(rank, columns, device=weight.device) / rank**2 for rank in ranks]
            A = nn.Parameter(torch.cat(parts))
        return ViDAUpdate(A, zeros(out, sum(ranks), like=weight), ranks)

    def empty(self, shape: tuple[int, int]) -> ViDAUpdate:
        """The same shapes, zeros."""
        rank = self.low_rank + self.r
        return ViDAUpdate(zeros(rank, shape[1]), zeros(shape[0], rank), (self.low_rank, self.r))

    def trainable_count(self, shape: tuple[int, int]) -> int:
        """(r₁ + r₂) (in + out)."""
        return (self.low_rank + self.r) * sum(shape)


class ViDAUpdate(Update):
    """A [r₁ + r₂, in] and B [out, r₁ + r₂] trained; the scales are told by `scaled`, and 1 outside of it."""

    depends_on: ClassVar[str] = "the scales of each row that `scaled` set"

    def __init__(self, A: nn.Parameter, B: nn.Parameter, ranks: tuple[int, int]) -> None:
        super().__init__()
        self.A, self.B, self.ranks = A, B, ranks

    def placed(self, layer: Any, adapter_name: str) -> None:
        """Note where the scales are told."""
        self.context, self.layer_name = layer.context, layer.name

    @property
    def gated(self) -> bool:
        """Whether the rows of the present batch have scales of their own."""
        scales = self._scales()
        return scales is not None and scales.dim() == 2

    def factors(self, x: Tensor | None = None, mask: Tensor | None = None) -> Factors:
        """(A, s, B) with s = (λ_l ... λ_h ...), [r₁ + r₂] or [batch, 1, ..., r₁ + r₂]."""
        scales = self._scales()
        if scales is None:
            return Factors(self.A, 1.0, self.B)
        # cast before moved: not every device has float64
        scales = scales.to(self.A.dtype).to(self.A.device)
        if scales.dim() == 2:
            if x is None:
                raise ValueError("the rows have scales of their own, and no layer's input was given")
            scales = by_row("the list of scales", scales, x, self.layer_name)
        low, high = scales.split(1, dim=-1)
        shares = [part.expand(*part.shape[:-1], rank) for part, rank in zip((low, high), self.ranks, strict=True)]
        s = torch.cat(shares, dim=-1)
        return Factors(self.A, s if x is None else s.to(x.dtype), self.B)

    def _scales(self) -> Tensor | None:
        context = getattr(self, "context", None)
        return None if context is None else context.told.get(_TOLD)


@contextmanager
def scaled(model: nn.Module, low: Tensor | float, high: Tensor | float) -> Iterator[None]:
    """Within this block, the ViDA adapters of a model have these scales.

    Args:
        model: A model that carries a `ViDA`.
        low: λ_l, a number or [rows]: one value for each row of every batch within.
        high: λ_h, of the same shape.

    Raises:
        ValueError: The model carries no `ViDA`, or the scales have other shapes.
    """
    # those of experts are parts of another update
    parts = (part for layer in layers_of(model) for part in layer.folklora_updates.modules())
    if not any(isinstance(part, ViDAUpdate) for part in parts):
        raise ValueError("this model carries no ViDA adapter whose scales could be set")
    low, high = (x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64) for x in (low, high))
    if low.shape != high.shape or low.dim() > 1:
        raise ValueError(
            f"the scales must be two numbers or two tensors [rows], not of shapes {list(low.shape)} and "
            f"{list(high.shape)}"
        )
    with telling(model, **{_TOLD: torch.stack([low, high.to(low.device)], dim=-1)}):
        yield


def _in_attention(name: str, part: nn.Module) -> bool:
    steps = name.lower().split(".")
    if not isinstance(part, nn.Linear) or "folklora_updates" in steps:
        return False
    return any(word in step for step in steps for word in _ATTENTION)
