"""KaSA: drop the weakest singular directions of a weight, learn an update in singular-value form."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from folklora.adapters.base import AdapterConfig, Update, kaiming_uniform, zeros
from folklora.factored import Factors, concatenate
from folklora.spectrum import bottom_factors, orthonormality_error

# what models of transformers and timm call their output layers
_HEADS = ("lm_head", "embed_out", "score", "classifier", "pre_classifier", "classification_head", "qa_outputs", "head")


@dataclass
class KaSA(AdapterConfig):
    r"""Knowledge-aware singular-value adaptation.

    W_world = W - P Q without its t weakest singular directions (P Q, [out, t] [t, in]), then
    y = W_world x + b + η B (d ⊙ (A x)),  η = α/r, with A [r, in], B [out, r] and the singular values d [r] trained.
    A starts Kaiming-uniform, B at 0, d ~ N(0, 1); the output changes at the start by design, by the dropped part.
    W itself is kept and -P Q is a frozen part of the update, so that disabling the adapter gives back the base bit
    for bit and the update exports as a LoRA of rank r + t. r (in + out) + r trained parameters a weight.
    Small weights and heads need all their directions: t is at most `truncate_limit` of a weight's min(in, out) singular
    values, and 0 on layers that `untruncated` names (the authors' code knows neither limit). Of several KaSA adapters
    active at once on a layer, the largest truncation counts, once: W_world + Σ η B diag(d) A.

    Loss, over the M adapted weights:  L_task + β Σ L2 + γ Σ L3,  L2 = Σ_j d_j²,  and L3 in one of two forms:
    `l3="paper"`:      ‖Bᵀ B - I_r‖_F + ‖A Aᵀ - I_r‖_F;
    `l3="reference"`:  ‖B Bᵀ - I_out‖_F + ‖Aᵀ A - I_in‖_F, the authors' code, which equals
    √(‖Bᵀ B - I_r‖² + out - r) + √(‖A Aᵀ - I_r‖² + in - r) and pulls 10-15 times more weakly at the start.
    `reduction="mean"` divides both sums by M (the authors' code), "sum" does not (PEFT). The defaults are what the
    published β and γ were used with. The host adds the penalty's gradient once a step, after gradient clipping, and not
    through the loss.

    Source: Wang, Jiang, Park, Kim, Tang, "KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models",
    ICLR 2025, arXiv 2412.06071.

    When to choose:
        Where the weakest directions of a weight are rather noise than knowledge for the task: the paper has it above
        LoRA at the same rank. It does not start at its base, and its penalty takes time in each step. Where the base's
        answers must hold at the start, take LoRA.

    Equation:
        y = (W - P Q)\, x + b + \eta\, B \left( d \odot (A x) \right), \quad \eta = \frac{\alpha}{r}
        L = L_{task} + \beta \sum_j d_j^2 + \gamma \left( \| B^\top B - I \|_F + \| A A^\top - I \|_F \right)

    Example:
        from peft import get_peft_model
        from folklora import KaSA, penalty, tiny

        model = get_peft_model(tiny.llama(), KaSA(r=4, target_modules=["q_proj", "v_proj"]))
        loss = model(**tiny.batch(), labels=tiny.batch()["input_ids"]).loss
        print(loss.item(), penalty(model).item())

    Args:
        r: Rank of the trained update.
        alpha: α of η = α/r.
        rslora: η = α/√r.
        truncate: Number t of dropped directions; None takes t = r, as the authors' code does.
        truncate_limit: Largest share of a weight's singular values that is dropped; t is lowered to it. 1 sets no
            limit, the default 1/16 leaves weights of fewer than 16 whole.
        untruncated: Layers that are never truncated: those with one of these as a part of their name.
        beta: Weight β of L2.
        gamma: Weight γ of L3.
        l3: Form of L3.
        reduction: Over the adapted weights, "mean" or "sum".
    """

    method: str = "kasa"
    r: int = 8
    alpha: float = 16.0
    rslora: bool = False
    truncate: int | None = None
    truncate_limit: float = 1 / 16
    untruncated: list[str] = field(default_factory=lambda: list(_HEADS))
    beta: float = 1e-4
    gamma: float = 1e-3
    l3: Literal["paper", "reference"] = "reference"
    reduction: Literal["mean", "sum"] = "mean"

    paper: ClassVar[str] = "Wang et al. 2025, arXiv 2412.06071"
    trains: ClassVar[str] = "A, B, singular values d"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_rank(self.r)
        if self.l3 not in ("paper", "reference"):
            raise ValueError(f"l3 must be 'paper' or 'reference', not {self.l3!r}")
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', not {self.reduction!r}")
        if self.truncate is not None and self.truncate < 0:
            raise ValueError(f"truncate must be at least 0, not {self.truncate}")
        if not 0 <= self.truncate_limit <= 1:
            raise ValueError(f"truncate_limit must be from 0 to 1, not {self.truncate_limit}")

    @property
    def penalty_reduction(self) -> str:
        """How the host combines the weights' penalties."""
        return self.reduction

    def for_module(self, name: str) -> KaSA:
        """The options for one layer: no truncation where `untruncated` names it."""
        own = super().for_module(name)
        return replace(own, truncate=0) if set(name.split(".")).intersection(self.untruncated) else own

    def update(self, weight: Tensor) -> KaSAUpdate:
        """Decompose the weight's weak end; draw A and d."""
        out, columns = weight.shape
        t = self._truncated(weight.shape)
        if t:
            P, Q = bottom_factors(weight, t)
        else:
            P, Q = (
                weight.new_zeros(out, 0, dtype=torch.float32),
                weight.new_zeros(0, columns, dtype=torch.float32),
            )
        A = kaiming_uniform(self.r, columns, weight)
        d = nn.Parameter(torch.randn(self.r, device=weight.device))
        return KaSAUpdate(A, zeros(out, self.r, like=weight), d, P, Q, self)

    def empty(self, shape: tuple[int, int]) -> KaSAUpdate:
        """The same shapes, zeros."""
        out, columns = shape
        t = self._truncated(shape)
        P, Q = torch.zeros(out, t), torch.zeros(t, columns)
        return KaSAUpdate(zeros(self.r, columns), zeros(out, self.r), zeros(self.r), P, Q, self)

    def check(self, shape: tuple[int, int], name: str) -> list[str]:
        """A rank above the weight's, or nothing left after the truncation."""
        problems = super().check(shape, name)
        if self._truncated(shape) >= min(shape):
            problems.append(
                f"truncating {self._truncated(shape)} directions leaves nothing of layer '{name}' with weight "
                f"{list(shape)}; at most {min(shape) - 1}"
            )
        return problems

    def trainable_count(self, shape: tuple[int, int]) -> int:
        """r (in + out) + r."""
        return self.r * sum(shape) + self.r

    def _truncated(self, shape: tuple[int, int]) -> int:
        wanted = self.r if self.truncate is None else self.truncate
        return min(wanted, int(self.truncate_limit * min(shape)))


class KaSAUpdate(Update):
    """ΔW = η B diag(d) A - P Q; A, B, d trained, P [out, t] and Q [t, in] frozen."""

    frozen: ClassVar[frozenset[str]] = frozenset({"P", "Q"})
    batched_penalty: ClassVar[bool] = True
    corrects_base: ClassVar[bool] = True

    def __init__(self, A: nn.Parameter, B: nn.Parameter, d: nn.Parameter, P: Tensor, Q: Tensor, config: KaSA) -> None:
        super().__init__()
        self.A, self.B, self.d = A, B, d
        self.P, self.Q = nn.Parameter(P, requires_grad=False), nn.Parameter(Q, requires_grad=False)
        self.eta = config.scaling(config.alpha, config.r, config.rslora)
        self.beta, self.gamma, self.l3 = config.beta, config.gamma, config.l3
        self.starts_at_base = not P.numel()

    def factors(self, x: Tensor | None = None, mask: Tensor | None = None) -> Factors:
        """([A; Q], [η d; -1], [B | P])."""
        learned, dropped = self.split()
        return learned if dropped is None else concatenate([learned, dropped])

    def split(self, x: Tensor | None = None, mask: Tensor | None = None) -> tuple[Factors, Factors | None]:
        """(A, η d, B) reads the dropped-out input, (Q, -1, P) the whole: it belongs to W_world."""
        dropped = Factors(self.Q, -1.0, self.P) if self.Q.shape[0] else None
        return Factors(self.A, self.eta * self.d, self.B), dropped

    def penalty(self) -> Tensor | None:
        """β Σ d² + γ L3 of this weight; None where both weights are 0."""
        if not self.beta and not self.gamma:
            return None
        return self.beta * self.d.square().sum() + self.gamma * (self._l3(self.A) + self._l3(self.B.T))

    def _l3(self, rows: Tensor) -> Tensor:
        error = orthonormality_error(rows)
        if self.l3 == "paper":
            return error
        r, n = rows.shape
        return torch.sqrt(error.square() + (n - r)) if n > r else error
