"""CoDyRA: a LoRA whose rank shrinks while it learns, by soft thresholds on a gate for each of its components."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from folklora.adapters.base import AdapterConfig, Update, kaiming_uniform, zeros
from folklora.adapters.carriers import carriers
from folklora.factored import Factors, concatenate


@dataclass
class CoDyRA(AdapterConfig):
    r"""Continual dynamic rank-selective LoRA: learn a task with as few rank-one components as it needs.

    y = W x + b + B (w ⊙ (A x)), with A [r, in], B [out, r] and one gate w_i [r] for each component, no further scale.
    A starts Kaiming-uniform, B at 0, w ~ N(0, 1), so the first step sees the base model exactly.
    r (in + out + 1) trained parameters a weight.

    The L1 penalty on w is applied by its proximal operator after each optimizer step, wherever that is taken:
        w ← sign(w) max(|w| - κ_t, 0),  κ_t = 0 up to step `dense` · `steps`; then the `thresholds` values from 0 to
    `kappa_max` in equal parts of the remaining steps. κ is an absolute threshold: neither the gradient nor the
    learning rate scales it, and it stays at `kappa_max` after `steps`. A gate at 0 still gets a gradient and may come
    back; what is 0 at the end is pruned; what survives has been shrunk as well. With the defaults the thresholds sum
    to 0.65, so that of r = 16 gates that learn nothing 8 survive: the start sets the scale of the rank, learning
    moves it. The authors train with AdamW, learning rate 5e-4, betas (0.9, 0.9999), no weight decay, cosine to 0.
    `compact` takes the pruned components out of the model and of what is saved; merging and exporting leave them out
    anyway. `next_task` does the same at the border to the next task: what survives is kept as frozen factors (the
    paper adds it to W, which is never changed here; the function is the same) and A, B, w start anew at full rank.
    Those factors never have more than min(in, out) terms: where they would, they are multiplied out.
    The reference code's operator is not the soft threshold: it shrinks and then sets to 0 what fell below κ, that is
    all |w| < 2 κ.

    Source: Lu, Zhao, Xue, Yao, Moore, Gong, "Adaptive Rank, Reduced Forgetting: Knowledge Retention in Continual
    Learning Vision-Language Models with Dynamic Rank-Selective LoRA", 2024, arXiv 2412.01004.

    When to choose:
        When one model learns task after task without replay or task ids and must keep what it knew, zero-shot ability
        included. It forgets less than a LoRA of fixed rank since it changes the weights less; a task that needs a
        large change is learned less well. For a single task with nothing to forget, a plain LoRA does.

    Equation:
        \Delta W = \sum_{i=1}^{r} w_i B_{:,i} A_{i,:}
        w \leftarrow \mathrm{sign}(w) \max(|w| - \kappa_t, 0)

    Example:
        import torch
        from peft import get_peft_model
        from folklora import CoDyRA, tiny
        from folklora.adapters.codyra import compact

        config = CoDyRA(r=8, steps=40, kappa_max=0.05, target_modules=["q_proj", "v_proj"])
        model = get_peft_model(tiny.llama(), config)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, weight_decay=0)
        for _ in range(40):
            model(**tiny.batch(), labels=tiny.batch()["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(compact(model))

    Args:
        r: Rank at the start of a task.
        steps: Number T of optimizer steps that a task is trained; set it to your run's.
        dense: Share of the steps before the first threshold.
        thresholds: Number of thresholds from 0 to `kappa_max`; no more than there are steps left.
        kappa_max: Largest threshold; 0 prunes nothing.
        gate_init: Start of w, N(0, 1) or ones.
        reference_operator: Apply the reference code's operator in place of the soft threshold.
        ranks: Rank of the layers that `compact` made smaller, by name.
        history: Rank of what `next_task` keeps of the earlier tasks, by layer.
    """

    method: str = "codyra"
    r: int = 16
    steps: int = 500
    dense: float = 0.5
    thresholds: int = 50
    kappa_max: float = 0.005
    gate_init: Literal["normal", "ones"] = "normal"
    reference_operator: bool = False
    ranks: dict[str, int] = field(default_factory=dict)
    history: dict[str, int] = field(default_factory=dict)

    paper: ClassVar[str] = "Lu et al. 2024, arXiv 2412.01004"
    trains: ClassVar[str] = "A, B, gates w that shrink to 0"
    past: ClassVar[int] = 0
    """Rank of the earlier tasks on the layer that these options are for; see `for_module`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_rank(self.r)
        if self.gate_init not in ("normal", "ones"):
            raise ValueError(f"gate_init must be 'normal' or 'ones', not {self.gate_init!r}")
        if self.steps < 1 or self.thresholds < 2 or self.kappa_max < 0 or not 0 <= self.dense < 1:
            raise ValueError(
                "CoDyRA needs steps >= 1, thresholds >= 2, kappa_max >= 0 and dense from 0 to below 1, "
                f"not {self.steps}, {self.thresholds}, {self.kappa_max} and {self.dense}"
            )

    def for_module(self, name: str) -> CoDyRA:
        """The options for one layer, with what is left of its rank and what it keeps of earlier tasks."""
        own = copy.copy(super().for_module(name))
        own.r, own.past = self.ranks.get(name, own.r), self.history.get(name, 0)
        return own

    def update(self, weight: Tensor) -> CoDyRAUpdate:
        """New A, B and gates."""
        update = CoDyRAUpdate(self, tuple(weight.shape)).to(weight.device)
        update.start(self.r)
        return update

    def empty(self, shape: tuple[int, int]) -> CoDyRAUpdate:
        """The same shapes, zeros."""
        return CoDyRAUpdate(self, shape)

    def trainable_count(self, shape: tuple[int, int]) -> int:
        """r (in + out + 1)."""
        return self.r * (sum(shape) + 1)

    def threshold(self, t: Tensor) -> Tensor:
        """κ after the optimizer step number t, counted from 0; without reading t back from its device."""
        start = round(self.dense * self.steps)
        count = max(2, min(self.thresholds, self.steps - start))
        every = max(1, (self.steps - start) // count)
        # how often a multiple of `every` was passed from `start` on
        moves = torch.div(t, every, rounding_mode="floor") - (start - 1) // every
        kappa = self.kappa_max * moves.clamp(0, count - 1) / (count - 1)
        return torch.where(t > start, kappa, 0.0)

    def shrink(self, w: Tensor, kappa: Tensor) -> Tensor:
        """The proximal operator of κ ‖w‖₁, or the reference code's."""
        small = w.sign() * (w.abs() - kappa).clamp_min(0)
        if not self.reference_operator:
            return small
        moved = torch.where(w.abs() > kappa, small, w)
        return torch.where(moved.abs() < kappa, 0.0, moved)


class CoDyRAUpdate(Update):
    """ΔW = B diag(w) A + B' A'; A, B, w trained, A' [past, in] and B' [out, past] of earlier tasks frozen."""

    frozen: ClassVar[frozenset[str]] = frozenset({"old_A", "old_B"})

    def __init__(self, config: CoDyRA, shape: tuple[int, int]) -> None:
        super().__init__()
        out, columns = shape
        self.config = config
        self.A, self.B, self.w = zeros(config.r, columns), zeros(out, config.r), zeros(config.r)
        # FSDP cannot shard a parameter without elements
        self.old_A = zeros(config.past, columns, requires_grad=False) if config.past else None
        self.old_B = zeros(out, config.past, requires_grad=False) if config.past else None
        # a count of steps is no parameter: it changes, but is not trained
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def start(self, r: int) -> None:
        """New values for a new task, at rank r."""
        out, columns = self.B.shape[0], self.A.shape[1]
        self.A = kaiming_uniform(r, columns, self.A)
        self.B = zeros(out, r, like=self.A)
        draw = torch.randn if self.config.gate_init == "normal" else torch.ones
        self.w = nn.Parameter(draw(r, device=self.A.device))
        self.step.zero_()

    def factors(self, x: Tensor | None = None, mask: Tensor | None = None) -> Factors:
        """(A, w, B), and what is kept of earlier tasks."""
        learned, kept = self.split()
        return learned if kept is None else concatenate([learned, kept])

    def split(self, x: Tensor | None = None, mask: Tensor | None = None) -> tuple[Factors, Factors | None]:
        """(A, w, B) reads the dropped-out input, (A', 1, B') the whole: the paper has it in W."""
        kept = None if self.old_A is None else Factors(self.old_A, 1.0, self.old_B)
        return Factors(self.A, self.w, self.B), kept

    def after_step(self) -> None:
        """The proximal step on the gates."""
        self.w.copy_(self.config.shrink(self.w, self.config.threshold(self.step)))
        self.step += 1

    @torch.no_grad()
    def prune(self) -> int:
        """Take the components with a gate of 0 out; returns how many are left."""
        keep = self.w.nonzero().flatten()
        for name, value in (("A", self.A[keep]), ("B", self.B[:, keep]), ("w", self.w[keep])):
            setattr(self, name, nn.Parameter(value.contiguous(), getattr(self, name).requires_grad))
        return len(keep)

    @torch.no_grad()
    def remember(self) -> int:
        """Move what survives into the frozen factors of the earlier tasks; returns their rank."""
        if self.prune():
            A, B = self.w[:, None] * self.A, self.B
            if self.old_A is not None:
                A, B = _no_more_than_dense(torch.cat([self.old_A, A]), torch.cat([self.old_B, B], dim=1))
            self.old_A, self.old_B = (nn.Parameter(value.contiguous(), requires_grad=False) for value in (A, B))
        return 0 if self.old_A is None else self.old_A.shape[0]


def compact(model: nn.Module, adapter_name: str = "default") -> dict[str, int]:
    """Take the pruned components out of the adapter; what it computes stays the same.

    Its parameters are new ones: an optimizer has to be made anew.

    Args:
        model: A PEFT model that carries the CoDyRA adapter.
        adapter_name: The adapter.

    Returns:
        The rank that is left, by layer; 0 where every component was pruned.

    Raises:
        ValueError: The model has no CoDyRA adapter of that name.
    """
    pairs, config = carriers(model, adapter_name, CoDyRAUpdate, "CoDyRA"), model.peft_config[adapter_name]
    for layer, update in pairs:
        config.ranks[layer.name] = update.prune()
    return dict(config.ranks)


def next_task(model: nn.Module, adapter_name: str = "default") -> dict[str, int]:
    """End a task: keep what survives of it in frozen factors, and start anew at full rank.

    Its parameters are new ones: an optimizer has to be made anew.

    Args:
        model: A PEFT model that carries the CoDyRA adapter.
        adapter_name: The adapter.

    Returns:
        The rank of all that is kept so far, by layer.

    Raises:
        ValueError: The model has no CoDyRA adapter of that name.
    """
    pairs, config = carriers(model, adapter_name, CoDyRAUpdate, "CoDyRA"), model.peft_config[adapter_name]
    for layer, update in pairs:
        config.history[layer.name] = update.remember()
        config.ranks.pop(layer.name, None)
        update.start(config.for_module(layer.name).r)
        layer.set_requires_grad(adapter_name, True)
    return dict(config.history)


def set_steps(model: nn.Module, steps: int, adapter_name: str = "default") -> None:
    """Spread the thresholds over a task of `steps` optimizer steps; whoever trains may learn their number only then.

    Args:
        model: A PEFT model that carries the CoDyRA adapter.
        steps: T, at least 1.
        adapter_name: The adapter.

    Raises:
        ValueError: The model has no CoDyRA adapter of that name.
    """
    pairs = carriers(model, adapter_name, CoDyRAUpdate, "CoDyRA")
    for config in (model.peft_config[adapter_name], *(update.config for _, update in pairs)):
        config.steps = steps


def _no_more_than_dense(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the same product B A that have at most as many terms as it has rows or columns."""
    if A.shape[0] <= min(B.shape[0], A.shape[1]):
        return A, B
    dense = (B.double() @ A.double()).to(A.dtype)
    eye = torch.eye(min(dense.shape), dtype=A.dtype, device=A.device)
    return (dense, eye) if dense.shape[0] <= dense.shape[1] else (eye, dense)
