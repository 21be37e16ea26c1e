"""RandLoRA: an update of full rank from fixed random bases that all layers share, scaled by trained diagonals."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from folklora.adapters.base import AdapterConfig, Update, zeros
from folklora.adapters.choices import check_choices
from folklora.factored import Factors

_CHOICES = {"scale_rule": ("alpha/r", "alpha/(r sqrt n)"), "bases": ("dense", "sparse", "very-sparse")}


@dataclass
class RandLoRA(AdapterConfig):
    r"""Full-rank update made of fixed random low-rank products, each rescaled by two trained diagonals.

    For W [out, in] let d = min(out, in), D = max(out, in) and n = ⌈d / r⌉.
        ΔW = s Σ_{j ≤ n} B_j diag(λ_j) A diag(γ_j)       B_j [D, r]   λ_j [r]   A [r, d]   γ_j [d]
    and its transpose where in > out, so that the diagonals stand on the small side. λ [r, n] starts at 0 and γ [n, d]
    at 1 / max(n, d): the first step sees the base model exactly. r n + n d trained parameters a weight: a smaller r
    trains more. The rank is min(n r, d) = d.

    A [r, d] and B [D, n, r] are random, frozen and the same for all layers: they are drawn once for the largest out
    and in (element by element) of the adapted layers, and a smaller layer takes the first rows, columns and bases.
    They are divided by their own standard deviation. Their entries are uniform, or -1, 0, 1 with probabilities 1/6,
    2/3, 1/6 (sparse) or p, 1 - 2 p, p with p = 1 / (2 √d) (very-sparse); the zeros are not used for speed, and a
    column of A that holds only zeros (probability (2/3)^r or (1 - 2 p)^r) takes one from the rank. The model keeps
    one copy, in the base's dtype, and so does the saved file. They could be drawn again from the seed, but PyTorch
    promises the same random numbers neither for another release nor for another platform, so they are saved. A rank
    of its own in `rank_pattern` has bases of its own.

    Cost: the factored form has n r ≥ d terms. A layer's forward pass costs what one to two more layers of its
    size would, and training keeps γ ⊙ A [n r, d] for each layer; the bases are read without a copy, but cast layer by
    layer under autocast. Merged, it costs nothing; a LoRA exported from it has rank d, the update's true rank. An
    embedding makes D the number of words.

    The reference implementations flatten the bases in one order and the scaled A in another, so that column (j, k) of
    B meets another row of A than the formula says. With random bases that makes no difference to quality, but what
    PEFT trained must be read with its pairing: `peft_layout`.

    Source: Albert, Zhang, Saratchandran, Rodriguez-Opazo, van den Hengel, Abbasnejad, "RandLoRA: Full-rank
    parameter-efficient fine-tuning of large models", ICLR 2025, arXiv 2502.00987.

    When to choose:
        When a higher rank no longer helps LoRA and the number of trained parameters must stay small: updates with a
        flat spectrum, vision-language models. It fits more than LoRA and also drifts further from the base; where the
        wanted change has a low rank, LoRA finds it with fewer parameters and less time.

    Equation:
        \Delta W = s \sum_{j=1}^{n} B_j \, \mathrm{diag}(\lambda_j) \, A \, \mathrm{diag}(\gamma_j)
        n = \lceil \min(d_{out}, d_{in}) / r \rceil, \quad s = \alpha / r

    Example:
        from peft import get_peft_model
        from folklora import RandLoRA, tiny

        model = get_peft_model(tiny.llama(), RandLoRA(r=8, target_modules=["q_proj", "v_proj"]))
        model.print_trainable_parameters()
        model(**tiny.batch(), labels=tiny.batch()["input_ids"]).loss.backward()

    Args:
        r: Rank of one basis; the update's own rank is full.
        alpha: α of the scale; None takes 20 r, as PEFT does at its default rank. A large α does not bear high
            learning rates.
        scale_rule: s = α/r (PEFT, the authors' vision code) or α/(r √n) (the authors' language code, with α = 2 r).
        bases: How A and B are drawn.
        seed: Of the generator that draws the bases, on the CPU.
        peft_layout: Pair the bases as PEFT does, for values that PEFT trained.
    """

    method: str = "randlora"
    r: int = 32
    alpha: float | None = None
    scale_rule: Literal["alpha/r", "alpha/(r sqrt n)"] = "alpha/r"
    bases: Literal["dense", "sparse", "very-sparse"] = "dense"
    seed: int = 0
    peft_layout: bool = False

    paper: ClassVar[str] = "Albert et al. 2025, arXiv 2502.00987"
    trains: ClassVar[str] = "diagonals λ, γ of fixed random bases"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_rank(self.r)
        check_choices(self, _CHOICES)

    def update(self, weight: Tensor) -> RandLoRAUpdate:
        """λ zero, γ constant."""
        return RandLoRAUpdate(self, tuple(weight.shape)).to(weight.device)

    def empty(self, shape: tuple[int, int]) -> RandLoRAUpdate:
        """The same shapes; nothing of the start is random."""
        return RandLoRAUpdate(self, shape)

    def shared(self, layers: dict[str, tuple[int, int]], like: Tensor) -> dict[str, nn.Parameter]:
        """A_r [r, d] and B_r [D, n, r] for each rank r that occurs."""
        shapes = defaultdict(list)
        for name, shape in layers.items():
            shapes[self.for_module(name).r].append(shape)
        found = {}
        for r, own in shapes.items():
            d, largest = sorted(max(sizes) for sizes in zip(*own, strict=True))
            drawn = draw_bases(self.bases, r, d, largest, self.seed)
            for name, basis in zip("AB", drawn, strict=True):
                found[f"{name}_{r}"] = nn.Parameter(basis.to(like), requires_grad=False)
        return found

    def trainable_count(self, shape: tuple[int, int]) -> int:
        """r n + n d."""
        n, d = self.counts(shape)
        return n * (self.r + d)

    def counts(self, shape: tuple[int, int]) -> tuple[int, int]:
        """(n, d): the number of bases and the small side of a weight of `shape`."""
        d = min(shape)
        return math.ceil(d / self.r), d


class RandLoRAUpdate(Update):
    """ΔW = s Σ_j B_j diag(λ_j) A diag(γ_j); λ [r, n] and γ [n, d] trained, A and B shared and frozen."""

    def __init__(self, config: RandLoRA, shape: tuple[int, int]) -> None:
        super().__init__()
        n, d = config.counts(shape)
        self.lambda_ = zeros(config.r, n)
        self.gamma = nn.Parameter(torch.full((n, d), 1 / max(n, d)))
        self.large, self.wide, self.peft_layout = max(shape), shape[1] > shape[0], config.peft_layout
        alpha = 20 * config.r if config.alpha is None else config.alpha
        self.scale = alpha / config.r / (math.sqrt(n) if config.scale_rule == "alpha/(r sqrt n)" else 1)

    def frozen_parameters(self) -> frozenset[str]:
        """The bases."""
        return frozenset(self.shared or ())

    def factors(self, x: Tensor | None = None, mask: Tensor | None = None) -> Factors:
        """(γ ⊙ A [n r, d], s λ, B [D, n r]), or its transpose for a wide weight; term (j, k) is number j r + k."""
        r, n = self.lambda_.shape
        A, B = self.common(f"A_{r}")[:, : self.gamma.shape[1]], self.common(f"B_{r}")[: self.large, :n]
        if self.peft_layout:
            scaled, s = A[:, None] * self.gamma, self.lambda_
        else:
            scaled, s = A * self.gamma[:, None], self.lambda_.T
        small, large, s = scaled.flatten(0, 1), B.flatten(1), self.scale * s.flatten()
        return Factors(large.T, s, small.T) if self.wide else Factors(small, s, large)


def draw_bases(bases: str, r: int, d: int, large: int, seed: int) -> tuple[Tensor, Tensor]:
    """A [r, d] and B [large, n, r] with n = ⌈d / r⌉, of standard deviation 1, float32 on the CPU.

    Args:
        bases: "dense", "sparse" or "very-sparse".
        r: Rank of one basis.
        d: The small side of the weights.
        large: The large side.
        seed: Of a generator of their own; PyTorch's global one is left alone.

    Raises:
        ValueError: A sparse basis came out as nothing but zeros.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    p = 1 / 6 if bases == "sparse" else 1 / (2 * math.sqrt(d))
    drawn = []
    for shape in ((r, d), (large, math.ceil(d / r), r)):
        values = torch.rand(shape, generator=generator, device="cpu")
        values = 2 * values - 1 if bases == "dense" else (values > 1 - p).float() - (values < p).float()
        if not values.any():
            raise ValueError(f"the {bases} basis of shape {list(shape)} holds only zeros; choose another seed or bases")
        # the mean is 0 by design; what little a sample has of it belongs to the basis
        drawn.append(values / _spread(values))
    A, B = drawn
    return A, B


def _spread(values: Tensor) -> Tensor:
    """The standard deviation; of a single value, or of values that do not differ, their magnitude."""
    spread = values.std(correction=min(1, values.numel() - 1))
    return spread if spread > 0 else values.abs().max()
