"""ExSSNeT: a mask a task over shared weights, and training of those of its weights that no earlier mask has."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from folklora.adapters.base import AdapterConfig, Update, kaiming_uniform, zeros
from folklora.adapters.sparse import (
    index_dtype,
    indices_of,
    packed,
    packed_size,
    refuse_dropout,
    scattered,
    sparse_updates,
    unpacked,
    whole,
)


@dataclass
class ExSSNeT(AdapterConfig):
    r"""Exclusive supermasks: task t computes with (W + D) ⊙ M_t, and trains D only where no earlier mask is 1.

    M_t [out, in] is 1 at the share `density` of the weight's entries with the largest |S_t| (of n entries,
    n - ⌊(1 - density) n⌋ ones; of equal ones the last). Mask search: the scores S_t [out, in], Kaiming-uniform at the
    start, are trained with W and D frozen, the gradient passing the mask straight through:
    ∂L/∂S_t = ∂L/∂M_t ⊙ sign(S_t). `fix_mask` ends it. Weight training: of D only E_t = M_t ∧ ¬(M_1 ∨ ... ∨ M_{t-1})
    is trained, as values [|E_t|] from 0, so that nothing else can move; M_t's other weights are read. `next_task`
    begins another search. `choose_task` says whose mask is used; the newest by default. What an earlier task computes
    never changes, to the bit. The host adds ΔW_t = M_t ⊙ D - (1 - M_t) ⊙ W; W itself stays.

    Kept a weight and task: a bit an entry, and a value and an index for each of E_t. The scores are dropped with the
    search; the stream keeps them where later tasks may start from them. If masks were independent, a share
    (1 - density)^(t - 1) of M_t would be free for task t; |E_t| of each layer is in `counts`.

    The paper masks a random network (W = ± a constant; over a frozen BERT, a convolution). Here the weights start from
    the pretrained W of the targets, and the rest of the model stays as it is: so the first mask takes knowledge out
    before it adds any, and a higher density than the paper's 0.02 to 0.1 may be needed. Biases, norms and heads
    are frozen; no batch norm is kept by task. The authors keep the best checkpoint on validation data, here the last.

    Source: Yadav and Bansal, "Exclusive Supermask Subnetwork Training for Continual Learning", ACL Findings 2023,
    arXiv 2210.10209.

    When to choose:
        Many tasks in one model, the task is known at test time, and nothing may be forgotten. An adapter a task
        (`per-task`) forgets nothing either, does not damage a pretrained weight, and is smaller at low ranks.

    Equation:
        y = \left( (W + D) \odot M_t \right) x + b
        E_t = M_t \wedge \neg \left( M_1 \vee \dots \vee M_{t-1} \right)
        \frac{\partial L}{\partial S_t} = \frac{\partial L}{\partial M_t} \odot \mathrm{sign}(S_t)

    Example:
        import torch
        from peft import get_peft_model
        from folklora import ExSSNeT, tiny
        from folklora.adapters.exssnet import fix_mask

        model = get_peft_model(tiny.llama(), ExSSNeT(density=0.5, target_modules=["q_proj", "v_proj"]))
        for phase in ("mask", "weights"):
            if phase == "weights":
                print(fix_mask(model))
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0)
            for _ in range(3):
                model(**tiny.batch(), labels=tiny.batch()["input_ids"]).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

    Args:
        density: Share of each weight's entries that a mask keeps (`sparsity` in the authors' code).
        searching: Whether the newest task's mask is still searched for; `fix_mask` and `next_task` set it.
        counts: |E_i| of each task whose mask is fixed, by layer; `fix_mask` sets it.
    """

    method: str = "exssnet"
    density: float = 0.1
    searching: bool = True
    counts: dict[str, list[int]] = field(default_factory=dict)

    paper: ClassVar[str] = "Yadav and Bansal 2023, arXiv 2210.10209"
    trains: ClassVar[str] = "a mask a task, then its weights that no earlier mask has"
    exclusive: ClassVar[Sequence[int]] = ()
    """|E_i| of each fixed task in the layer that these options are for; see `for_module`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_dropout(self)
        if not 0 < self.density <= 1:
            raise ValueError(f"density must be above 0 and at most 1, not {self.density}")
        given = [name for name in ("modules_to_save", "train_bias") if getattr(self, name)]
        if given:
            raise ValueError(
                f"exssnet keeps what earlier tasks compute, which {' and '.join(given)} would change: leave it out"
            )

    def for_module(self, name: str) -> ExSSNeT:
        """The options for one layer, with the sizes of what each of its tasks trained."""
        own = copy.copy(super().for_module(name))
        own.exclusive = self.counts.get(name, ())
        return own

    def check(self, shape: tuple[int, int], name: str) -> list[str]:
        """Any shape will do."""
        return []

    def update(self, weight: Tensor) -> ExSSNeTUpdate:
        """Draw the first task's scores."""
        update = ExSSNeTUpdate(tuple(weight.shape), self)
        update.search(kaiming_uniform(*weight.shape, like=weight).data)
        return update

    def empty(self, shape: tuple[int, int]) -> ExSSNeTUpdate:
        """The same shapes, zeros."""
        update = ExSSNeTUpdate(tuple(shape), self)
        if self.searching:
            update.search(torch.zeros(shape))
        return update

    def trainable_count(self, shape: tuple[int, int]) -> int:
        """All scores while a mask is searched for, then |E_t|."""
        return shape[0] * shape[1] if self.searching else self.exclusive[-1]


class ExSSNeTUpdate(Update):
    """ΔW = M ⊙ D - (1 - M) ⊙ W; by task `masks` (bits), and `indices` and `values` of E_i; `scores` in a search."""

    is_dense: ClassVar[bool] = True

    def __init__(self, shape: tuple[int, int], config: ExSSNeT) -> None:
        super().__init__()
        self.shape, self.density = shape, config.density
        self.starts_at_base = config.density == 1
        count = shape[0] * shape[1]
        self.masks = nn.ParameterList(
            whole(torch.zeros(packed_size(count), dtype=torch.uint8)) for _ in config.exclusive
        )
        self.indices = nn.ParameterList(whole(torch.zeros(size, dtype=index_dtype(count))) for size in config.exclusive)
        self.values = nn.ParameterList(zeros(size) for size in config.exclusive)
        self.scores: nn.Parameter | None = None
        self.task = len(self.masks) - 1

    def search(self, scores: Tensor) -> None:
        """Begin a task whose mask is searched for from these scores [out, in]."""
        self.scores = nn.Parameter(scores)
        self.task = len(self.masks)

    def frozen_parameters(self) -> frozenset[str]:
        """All but the newest task's."""
        newest = len(self.masks) if self.scores is not None else len(self.masks) - 1
        frozen = {f"{name}.{i}" for name in ("masks", "indices") for i in range(len(self.masks))}
        return frozenset(frozen | {f"values.{i}" for i in range(newest)})

    def dense(self, weight: Tensor) -> Tensor:
        """What makes (W + D) ⊙ M of W, for the chosen task."""
        mask = self.mask().to(weight.dtype)
        # exactly D where M is 1 and -W where it is 0; and ∂/∂M is D + W
        return mask * self._learned(weight) + (mask - 1) * weight

    def mask(self) -> Tensor:
        """M [out, in] of the chosen task; in a search, with the straight-through gradient."""
        if self.task < len(self.masks):
            return unpacked(self.masks[self.task], self.shape)
        sizes = self.scores.abs()
        return largest(sizes.detach(), self.density).to(sizes.dtype) + (sizes - sizes.detach())

    def _learned(self, weight: Tensor) -> Tensor:
        """D [out, in] as far as the chosen task reads it: later tasks train nothing that it has."""
        count = min(self.task + 1, len(self.values))
        if not count:
            return torch.zeros_like(weight)
        return scattered(torch.cat(list(self.indices)[:count]), torch.cat(list(self.values)[:count]), self.shape)

    @torch.no_grad()
    def fix_mask(self) -> int:
        """Keep the mask that the scores give, and train what it has for itself; |E_t|."""
        mask = largest(self.scores.abs(), self.density)
        own = mask.clone()
        for bits in self.masks:
            own &= ~unpacked(bits, self.shape)
        indices = indices_of(own)
        self.masks.append(whole(packed(mask)))
        self.indices.append(whole(indices))
        self.values.append(zeros(len(indices), like=indices))
        self.scores = None
        return len(indices)


def largest(values: Tensor, density: float) -> Tensor:
    """Which entries are among the largest: all but the first ⌊(1 - density) n⌋ in ascending, stable order."""
    flat = values.flatten()
    order = flat.sort(stable=True).indices[int((1 - density) * flat.numel()) :]
    return torch.zeros_like(flat, dtype=torch.bool).scatter(0, order, True).view_as(values)


def fix_mask(model: nn.Module, adapter_name: str = "default") -> dict[str, int]:
    """End a mask search: the newest task's mask is fixed, and the weights that it alone has are trained from now on.

    The trained parameters are new ones: an optimizer has to be made anew.

    Args:
        model: A PEFT model that carries the ExSSNeT adapter.
        adapter_name: The adapter.

    Returns:
        |E_t|, how many weights the task may train, by layer.

    Raises:
        ValueError: The model has no such adapter, no mask is searched for, or it is merged.
    """
    pairs, config = sparse_updates(model, adapter_name, ExSSNeTUpdate, "ExSSNeT"), model.peft_config[adapter_name]
    if not config.searching:
        raise ValueError(f"adapter '{adapter_name}' searches for no mask; next_task() begins a search")
    for layer, update in pairs:
        trained = update.scores.requires_grad
        config.counts.setdefault(layer.name, []).append(update.fix_mask())
        layer.set_requires_grad(adapter_name, trained)
    config.searching = False
    return {layer.name: config.counts[layer.name][-1] for layer, _ in pairs}


def next_task(model: nn.Module, scores: dict[str, Tensor] | None = None, adapter_name: str = "default") -> None:
    """Begin the search for another task's mask; the tasks so far are frozen.

    Args:
        model: A PEFT model that carries the ExSSNeT adapter.
        scores: The scores [out, in] to start from, by layer, which are copied; None draws them.
        adapter_name: The adapter.

    Raises:
        ValueError: The model has no such adapter, a mask is still searched for, or it is merged.
    """
    pairs, config = sparse_updates(model, adapter_name, ExSSNeTUpdate, "ExSSNeT"), model.peft_config[adapter_name]
    if config.searching:
        raise ValueError(f"adapter '{adapter_name}' still searches for a mask; fix_mask() ends that")
    for layer, update in pairs:
        start = kaiming_uniform(*update.shape, like=update.base_sample).data if scores is None else scores[layer.name]
        update.search(start.to(update.base_sample, copy=True))
        layer.set_requires_grad(adapter_name, True)
    config.searching = True


def choose_task(model: nn.Module, task: int, adapter_name: str = "default") -> None:
    """Say whose mask the coming passes use.

    Args:
        model: A PEFT model that carries the ExSSNeT adapter.
        task: Number of the task, from 0.
        adapter_name: The adapter.

    Raises:
        ValueError: The model has no such adapter or task, or it is merged.
    """
    pairs = sparse_updates(model, adapter_name, ExSSNeTUpdate, "ExSSNeT")
    for _, update in pairs:
        known = len(update.masks) + (update.scores is not None)
        if not 0 <= task < known:
            raise ValueError(f"the adapter has {known} tasks, from 0; there is no task {task}")
        update.task = task
