"""Generative Adapter: a trained generator writes a text into low-rank updates in one forward pass."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from folklora.adapters.base import AdapterConfig, Update, zeros
from folklora.adapters.choices import check_choices
from folklora.adapters.host.blocks import block_of
from folklora.polar import orthogonal_part

_CHOICES = {"norm": ("svd", "frobenius", "spectral"), "layout": ("completion", "reconstruction")}
_SAMPLES = 16


@dataclass
class GenerativeAdapter(AdapterConfig):
    r"""A generator that turns a text into an adapter in one forward pass, without gradient steps.

    A layer with frozen W [out, in] in a block that the hidden states h [tokens, D] enter holds the generator
    A₁ [R₁, in], A₂ [R₁, D], A₃ [R₂, D], B [out, R₂] and the weight g [D] of an RMSNorm. A segment of text gives
        u = RMSNorm(h) ⊙ g,  k = A₂ u,  v = A₃ u,  S_s = Σ_tokens k vᵀ     [R₁, R₂], padding left out
        S = Σ S_s over the segments written so far,  M = norm(S),  y = W x + b + c B Mᵀ (A₁ x),  c = α/R₂
    norm "svd" keeps the `max_rank` strongest directions of S and sets their singular values to 1; "frobenius" is
    S/√(‖S‖² + 1e-6), "spectral" S/σ₁. A₁, A₂, A₃ ~ N(0, 1/(3 columns)), g = 1, B = 0, so the first step sees the
    base. R₁ (in + D) + R₂ (D + out) + D trained parameters a weight; nothing is shared between layers.

    Training: consecutive rows of a batch are the `segments` of one text, each a sequence of its own: what a row
    knows of the others comes through the update alone. `layout="completion"`: row i sees rows 0 ... i-1 (predict the
    next window, or a conversation whose context are the rows before). `layout="reconstruction"`: the first half is
    that, and row n + j of the second half sees rows 0 ... j (repeat a piece of them). The loss is the language
    model's own on all rows. `folklora.adapters.contexts` lays batches out (`pretraining_batch`, `instruction_batch`).
    Use: `folklora.write` gives an adapter state, `folklora.applied` puts it (or one a row) under later calls,
    `Written.install` makes it a plain LoRA on the model, which merges, saves and exports. Within `applied` rows are
    never taken for segments of a text; `applied(model, None)` is the base.

    Directions of S below `tolerance` σ₁ are dropped: the authors' code gives them the value 1 where a text has fewer
    tokens than `max_rank`, which is noise. Its gradient is a closed form that is finite where singular values
    coincide; their code zeroes such an adapter. Their low-rank decomposition is random; ours starts from the same
    subspace at every call, of twice the dimensions.

    Source: Chen, Fang, Xia, Liu, Van Durme, Zettlemoyer, Gao, Cheng, "Generative Adapter: Contextualizing Language
    Models in Parameters with A Single Forward Pass", ICLR 2025, arXiv 2411.05877.

    When to choose:
        A context is long and asked about often, and an answer must come without gradient steps and without reading
        the context again. The generator must first be trained on much text (the authors take 1 B tokens); without
        that, retrieval or a prompt is better. What it holds of a text is limited by `max_rank`.

    Equation:
        S = \sum_{l} (A_2 u_l)(A_3 u_l)^\top, \qquad u_l = \mathrm{RMSNorm}(h_l)
        M = U_k V_k^\top, \qquad S = U \Sigma V^\top
        y = W x + b + \frac{\alpha}{R_2} B M^\top A_1 x

    Example:
        import torch
        from peft import get_peft_model
        from folklora import GenerativeAdapter, applied, tiny, write

        model = get_peft_model(tiny.llama(), GenerativeAdapter(r=8, target_modules=["o_proj"], segments=4))
        tiny.train(model)  # four rows of a batch are four segments of one text
        notes = write(model, torch.arange(20))
        notes = write(model, torch.arange(20, 40), onto=notes)
        with applied(model, notes):
            print(model(torch.tensor([[1, 2, 3]])).logits.shape)

    Args:
        r: R₂, the width of v; the authors train with 1024.
        inter_size: R₁, the width of k and A₁; None takes r.
        max_rank: How many directions of S "svd" keeps.
        alpha: α of the scaling c = α/r.
        norm: "svd", "frobenius" or "spectral".
        tolerance: Share of σ₁ below which "svd" drops a direction.
        iterations: Power iterations of "svd" where 2 `max_rank` is below R₁ and R₂ (the authors take 1, in a smaller
            subspace); None decomposes S exactly, which takes long at their sizes.
        segments: How many consecutive rows of a batch are one text; 1 lets every row stand alone.
        layout: "completion" or "reconstruction".
        window: Most tokens of a segment when a text is written.
        hidden_size: D; None takes it from the model's configuration.
    """

    method: str = "generative-adapter"
    r: int = 1024
    inter_size: int | None = None
    max_rank: int = 128
    alpha: float = 64.0
    norm: Literal["svd", "frobenius", "spectral"] = "svd"
    tolerance: float = 1e-4
    iterations: int | None = 2
    segments: int = 1
    layout: Literal["completion", "reconstruction"] = "completion"
    window: int = 1024
    hidden_size: int | None = None

    paper: ClassVar[str] = "Chen et al. 2025, arXiv 2411.05877"
    trains: ClassVar[str] = "a generator A1, A2, A3, B and its norm in each layer"
    layer_kinds: ClassVar[frozenset[str]] = frozenset({"linear"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_rank(self.r)
        if self.dropout:
            raise ValueError("GenerativeAdapter takes no dropout; the authors train without")
        check_choices(self, _CHOICES)
        for name in ("max_rank", "segments", "window", "inter_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.layout == "reconstruction" and self.segments % 2:
            raise ValueError(f'layout="reconstruction" needs an even number of segments, not {self.segments}')
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance must be above 0 and below 1, not {self.tolerance}")

    def fit(self, model: nn.Module) -> None:
        """Take D from the model, and the output projections of attention where no targets are named."""
        if self.target_modules is None:
            self.target_modules = ["o_proj"]
        if self.hidden_size is None:
            own = getattr(model, "config", None)
            text = own.get_text_config() if hasattr(own, "get_text_config") else own
            self.hidden_size = getattr(text, "hidden_size", None)
        if self.hidden_size is None:
            raise ValueError("the model's configuration gives no hidden_size: set GenerativeAdapter(hidden_size=...)")

    def check(self, shape: tuple[int, int], name: str) -> list[str]:
        """The layer must be in a block; the ranks may be above its sides."""
        try:
            block_of(name)
        except ValueError as error:
            return [f"{error}, and a generator reads what enters the block"]
        return []

    def update(self, weight: Tensor) -> GenerativeUpdate:
        """A generator at its start."""
        return GenerativeUpdate(self, tuple(weight.shape), weight)

    def empty(self, shape: tuple[int, int]) -> GenerativeUpdate:
        """The same shapes, to be filled."""
        return GenerativeUpdate(self, shape, torch.empty(0))

    def trainable_count(self, shape: tuple[int, int]) -> int:
        """R₁ (in + D) + R₂ (D + out) + D."""
        out, columns = shape
        return self.inner * (columns + self.hidden_size) + self.r * (self.hidden_size + out) + self.hidden_size

    @property
    def inner(self) -> int:
        """R₁."""
        return self.r if self.inter_size is None else self.inter_size

    def visible(self) -> list[int]:
        """How many of its text's segments, from the first on, each row sees."""
        if self.layout == "completion":
            return list(range(self.segments))
        half = self.segments // 2
        return [*range(half), *range(1, half + 1)]


class GenerativeUpdate(Update):
    """One layer's generator; what it adds depends on what was written, so it has no factors of its own."""

    gated: ClassVar[bool] = True
    depends_on: ClassVar[str] = "the text that was written (Written.install makes a plain LoRA, with one weight, of it)"
    is_function: ClassVar[bool] = True
    reads_block: ClassVar[bool] = True

    def __init__(self, config: GenerativeAdapter, shape: tuple[int, int], like: Tensor) -> None:
        super().__init__()
        self.config = config
        self.scale = config.scaling(config.alpha, config.r)
        self.decomposes = config.norm == "svd"
        self.A1 = _normal(config.inner, shape[1], like)
        self.A2 = _normal(config.inner, config.hidden_size, like)
        self.A3 = _normal(config.r, config.hidden_size, like)
        self.B = zeros(shape[0], config.r, like=like)
        self.g = nn.Parameter(torch.ones(config.hidden_size, device=like.device))

    def placed(self, layer: Any, adapter_name: str) -> None:
        """Note where the layer reads what enters its block and what was written."""
        self.context, self.key, self.block = layer.context, (adapter_name, layer.name), block_of(layer.name)

    def function(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor | None:
        """C B Mᵀ (A₁ x) with the M that is applied or that the segments of this batch give; None where there is none.

        What a call is told: "record", a dict to be filled with the rows' S by (adapter, layer), and "cores", the M
        [rows or 1, R₁, R₂] to apply by the same keys.
        """
        told = self.context.told
        if "record" in told:
            told["record"][self.key] = self.statistic(self._entering(x), mask)
        if "cores" in told:
            M = told["cores"].get(self.key)
        elif self.config.segments > 1:
            M = self._segments(self._entering(x), mask)
        elif self.training and torch.is_grad_enabled() and self.A1.requires_grad:
            raise ValueError(
                "a GenerativeAdapter is trained on texts cut into segments, and with segments=1 there is nothing to "
                "train: set segments, and lay batches out with folklora.adapters.contexts"
            )
        else:
            M = None
        return None if M is None else self._applied(x, M).to(y.dtype)

    def statistic(self, h: Tensor, mask: Tensor | None = None) -> Tensor:
        """S of each row, [rows, R₁, R₂], from the hidden states [rows, tokens, D]; at least float32."""
        precise = torch.promote_types(h.dtype, torch.float32)
        u = F.rms_norm(h.to(precise), self.g.shape, self.g.to(precise), eps=1e-6).to(h.dtype)
        k, v = F.linear(u, self.A2.to(u.dtype)), F.linear(u, self.A3.to(u.dtype))
        # sums over thousands of tokens
        with torch.autocast(h.device.type, enabled=False):
            k, v = k.to(precise), v.to(precise)
            return (k if mask is None else k * mask.unsqueeze(-1).to(precise)).mT @ v

    def normalise(self, S: Tensor) -> Tensor:
        """M = norm(S), [..., R₁, R₂]."""
        config = self.config
        with torch.autocast(S.device.type, enabled=False):
            if config.norm == "svd":
                return orthogonal_part(S, config.max_rank, config.tolerance, config.iterations)
            if config.norm == "frobenius":
                return S * (S.square().sum((-2, -1), keepdim=True) + 1e-6).rsqrt()
            largest = torch.linalg.matrix_norm(S, 2, keepdim=True)
            return S / largest.clamp_min(torch.finfo(S.dtype).tiny)

    def written(self, S: Tensor) -> tuple[Tensor, Tensor]:
        """The update that a state S [R₁, R₂] stands for, as a LoRA pair (Mᵀ A₁ [R₂, in], c B [out, R₂])."""
        M = self.normalise(S)
        return M.mT @ self.A1.to(M), self.scale * self.B.to(M)

    def sample(self) -> Tensor:
        """A few values of each of the generator's parameters: enough to tell one generator from another."""
        flat = [parameter.detach().reshape(-1) for parameter in (self.A1, self.A2, self.A3, self.B, self.g)]
        return torch.cat([values[:: max(1, len(values) // _SAMPLES)][:_SAMPLES].float() for values in flat]).cpu()

    def _segments(self, h: Tensor, mask: Tensor | None) -> Tensor:
        """M of each row from the rows of its text that it sees, [rows, R₁, R₂]."""
        visible = self.config.visible()
        if len(h) % len(visible):
            raise ValueError(
                f"a batch of {len(h)} rows is no whole number of texts of {len(visible)} segments; give all segments, "
                "or none with folklora.applied(model, None), or train with segments=1"
            )
        if self.context.rows is not None:
            raise ValueError("adapter_names cannot be used where the rows of a batch are segments of one text")
        used = slice(0, max(visible))
        h = h.unflatten(0, (-1, len(visible)))[:, used].flatten(0, 1)
        mask = None if mask is None else mask.unflatten(0, (-1, len(visible)))[:, used].flatten(0, 1)
        S = self.statistic(h, mask).unflatten(0, (-1, max(visible)))
        nothing_first = F.pad(self.normalise(S.cumsum(1)), (0, 0, 0, 0, 1, 0))
        return nothing_first[:, visible].flatten(0, 1)

    def _applied(self, x: Tensor, M: Tensor) -> Tensor:
        if len(x) % len(M):
            raise ValueError(
                f"{len(M)} adapters were applied, one a row, to a batch of {len(x)} rows that layer '{self.key[1]}' "
                "sees, which is no multiple of that"
            )
        # beams stand in equal runs of their row
        z = F.linear(x, self.A1.to(x.dtype)) @ M.to(x.dtype).repeat_interleave(len(x) // len(M), dim=0)
        return F.linear(z, self.B.to(z.dtype)) * self.scale

    def _entering(self, x: Tensor) -> Tensor:
        h = self.context.blocks.get(self.block)
        if h is None or h.shape != (*x.shape[:-1], self.config.hidden_size) or x.dim() != 3:
            nothing = "nothing is known to have (a block that changes its input first cannot be computed again)"
            seen = nothing if h is None else f"{list(h.shape)} did"
            raise RuntimeError(
                f"the generator of layer '{self.key[1]}' reads the hidden states [rows, tokens, "
                f"{self.config.hidden_size}] that enter block '{self.block}' for an input of {list(x.shape)}; {seen}"
            )
        return h


def _normal(rows: int, columns: int, like: Tensor) -> nn.Parameter:
    """A [rows, columns] of Kaiming's normal start with a = √5, N(0, 1/(3 columns)), float32."""
    start = torch.empty(rows, columns, device=like.device)
    return nn.Parameter(nn.init.kaiming_normal_(start, a=math.sqrt(5)))
