"""SALT: scale and shift the strongest singular values, correct the rest of the spectrum by a low-rank core."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from folklora.adapters.base import AdapterConfig, zeros
from folklora.adapters.vectors import VectorsUpdate, empty_frame, frame_of
from folklora.factored import Factors
from folklora.spectrum import Triplets


@dataclass
class SALT(AdapterConfig):
    r"""Singular-value adaptation with low-rank transformation: W' = U M⁺ Vᵀ, and only the core M is trained.

    W = U S Vᵀ with all k = min(in, out) triplets, U [out, k] and V [in, k] frozen, S₁ its t strongest values, S₂ the
    others:  M = [diag(a ⊙ S₁ + c), 0; 0, diag(S₂) + X Y],  M⁺ = ReLU(M). Trained: a [t] from 1, c [t] from 0,
    X [k - t, r] Kaiming-uniform, Y [r, k - t] from 0, so that the first step sees the base exactly (the authors'
    first code drew X and Y both small, and did not). Here ΔW = U (M⁺ - diag(S)) Vᵀ is added to an untouched W, and
    a - 1 is held in place of a (`scale`, beside `shift` = c), so that weight decay pulls to the base.
    2 t + 2 r (k - t) trained parameters a weight; t = max(1, ⌊`top_ratio` k⌋), or `top`.

    `relu="all"` is the reference: every entry of M⁺ is at least 0. Where Y = 0 that lets a gradient pass only on the
    core's diagonal, later on about half its entries, and ΔW has rank k. "diag" keeps only singular values from
    turning negative; "none" keeps nothing, ΔW = U₁ diag((a - 1) ⊙ S₁ + c) V₁ᵀ + U₂ X Y V₂ᵀ of rank t + r. Each
    exports as a LoRA, of rank k, k, and t + r: a small file only with "none".

    Loss: L_task + `penalty_weight` Σ (‖(a - 1) ⊙ S₁ + c‖ + ‖X Y‖_F) over the weights; the shipped configuration has 0.
    Each norm is √(‖·‖² + ε) - √ε with the machine's ε, so that its gradient at 0 is 0.

    A saved file holds 2 t + 2 r (k - t) + k numbers a weight, what is trained and S; loading decomposes the base
    weight again. Where singular values lie near each other single vectors are not unique: a warning says where, or
    where the base that is loaded differs too much from the training's. `save_vectors` also saves U and V, up to twice
    the weight. In memory they are there in any case, float32; the start needs one full decomposition a weight.
    The authors train layer norms, position embeddings and a text layer besides: name them in `modules_to_save`.

    Source: Elsayed, Hashmi, Elseiagy, Wang, Yaqub, Almakky, "SALT: Singular Value Adaptation with Low-Rank
    Transformation", BMVC 2025, arXiv 2503.16055.

    When to choose:
        Few labelled examples for a vision model (it was made for segmentation), where rescaling singular values alone
        does too little and LoRA at a small rank underfits. It costs more memory and time a step than LoRA.

    Equation:
        M = \begin{pmatrix} \mathrm{diag}(a \odot S_1 + c) & 0 \\ 0 & \mathrm{diag}(S_2) + X Y \end{pmatrix}
        y = U \, \mathrm{ReLU}(M) \, V^\top x + b

    Example:
        from peft import get_peft_model
        from folklora import SALT, tiny

        model = get_peft_model(tiny.llama(), SALT(r=4, top_ratio=0.2, target_modules=["q_proj", "v_proj"]))
        model.print_trainable_parameters()

    Args:
        r: Rank of X Y, at most k - t. The authors' runs have 256 on weights of 768 and more.
        top_ratio: Share of the singular values that are scaled and shifted.
        top: Their number, in place of the share.
        relu: Where M is cut off at 0: "all", "diag" or "none".
        penalty_weight: Weight of the regulariser.
        save_vectors: Save the singular vectors too, so that loading decomposes nothing.
    """

    method: str = "salt"
    r: int = 8
    top_ratio: float = 0.1
    top: int | None = None
    relu: Literal["all", "diag", "none"] = "all"
    penalty_weight: float = 0.0
    save_vectors: bool = False

    paper: ClassVar[str] = "Elsayed et al. 2025, arXiv 2503.16055"
    trains: ClassVar[str] = "scale and shift of the top singular values, a low-rank core"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_rank(self.r)
        if not 0 < self.top_ratio < 1:
            raise ValueError(f"top_ratio must be above 0 and below 1, not {self.top_ratio}")
        if self.top is not None and self.top < 1:
            raise ValueError(f"top must be at least 1, not {self.top}")
        if self.relu not in ("all", "diag", "none"):
            raise ValueError(f"relu must be 'all', 'diag' or 'none', not {self.relu!r}")
        if self.penalty_weight < 0:
            raise ValueError(f"penalty_weight must be at least 0, not {self.penalty_weight}")

    def update(self, weight: Tensor) -> SALTUpdate:
        """Decompose the weight; draw X."""
        return SALTUpdate(frame_of(weight, min(weight.shape), self.save_vectors), self)

    def empty(self, shape: tuple[int, int]) -> SALTUpdate:
        """The same shapes, zeros where something is frozen."""
        return SALTUpdate(empty_frame(shape, min(shape)), self)

    def check(self, shape: tuple[int, int], name: str) -> list[str]:
        """More top values and rank than there are singular values."""
        k = min(shape)
        t = self.top_count(k)
        if t + self.r > k:
            return [
                f"{t} top singular values and rank {self.r} for the others are more than the {k} singular values of "
                f"layer '{name}' with weight {list(shape)}"
            ]
        return []

    def trainable_count(self, shape: tuple[int, int]) -> int:
        """2 t + 2 r (k - t)."""
        t = self.top_count(min(shape))
        return 2 * t + 2 * self.r * (min(shape) - t)

    def top_count(self, k: int) -> int:
        """How many of k singular values are scaled and shifted."""
        return max(1, int(self.top_ratio * k)) if self.top is None else self.top


class SALTUpdate(VectorsUpdate):
    """ΔW = U (M⁺ - diag(S)) Vᵀ; `scale` = a - 1, `shift` = c, X and Y trained."""

    batched_penalty: ClassVar[bool] = True
    penalty_reads: ClassVar[frozenset[str]] = frozenset({"S"})

    def __init__(self, frame: Triplets, config: SALT) -> None:
        super().__init__(frame, config.save_vectors)
        k = len(frame.S)
        t = config.top_count(k)
        self.scale, self.shift = zeros(t, like=frame.S), zeros(t, like=frame.S)
        X = torch.empty(k - t, config.r, device=frame.S.device)
        self.X = nn.Parameter(nn.init.kaiming_uniform_(X, nonlinearity="relu"))
        self.Y = zeros(config.r, k - t, like=frame.S)
        self.relu, self.penalty_weight = config.relu, config.penalty_weight

    def factors(self, x: Tensor | None = None, mask: Tensor | None = None) -> Factors:
        """([V₁ᵀ; right], [M⁺₁ - S₁; 1], [U₁ | left]), with left right = U₂ (M⁺₂ - S₂) V₂ᵀ."""
        t = len(self.scale)
        # half precision has not the digits for a small change of a product of the core
        with torch.autocast(self.S.device.type, enabled=False):
            change = self._top_change()
            if self.relu != "none":
                change = _at_least(change, -self.S[:t])
            left, right = self._others()
        A, B = torch.cat([self.V[:, :t].T, right]), torch.cat([self.U[:, :t], left], dim=1)
        return Factors(A, torch.cat([change, change.new_ones(len(right))]), B)

    def _top_change(self) -> Tensor:
        """(a - 1) ⊙ S₁ + c."""
        return self.scale * self.S[: len(self.scale)] + self.shift

    def _others(self) -> tuple[Tensor, Tensor]:
        """(left, right), [out, p] and [p, in]; the core is multiplied into the shorter side."""
        t = len(self.scale)
        U, S, V = self.U[:, t:], self.S[t:], self.V[:, t:]
        if self.relu == "none":
            return U @ self.X, self.Y @ V.T
        # ReLU(diag(S₂) + X Y) - diag(S₂), without losing a small X Y beside a large S₂
        floor = torch.diag(-S)
        if self.relu == "diag":
            floor = floor.masked_fill(~torch.eye(len(S), dtype=torch.bool, device=S.device), -torch.inf)
        change = _at_least(self.X @ self.Y, floor)
        return (U @ change, V.T) if len(U) <= len(V) else (U, change @ V.T)

    def penalty(self) -> Tensor | None:
        """The weighted norms of both changes; None where the weight is 0."""
        if not self.penalty_weight:
            return None
        # ‖X Y‖² = tr(Xᵀ X Y Yᵀ), r x r
        core = ((self.X.T @ self.X) * (self.Y @ self.Y.T)).sum().clamp(min=0)
        return self.penalty_weight * (_norm(self._top_change().square().sum()) + _norm(core))


def _at_least(change: Tensor, floor: Tensor) -> Tensor:
    # as ReLU: no gradient where the floor is touched
    return torch.where(change > floor, change, floor)


def _norm(squares: Tensor) -> Tensor:
    eps = torch.finfo(squares.dtype).eps
    return (squares + eps).sqrt() - eps**0.5
