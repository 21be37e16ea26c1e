"""LT-SFT: train all entries, keep the few that changed most, train those again; such changes add up."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from folklora.adapters.base import AdapterConfig, Update, zeros
from folklora.adapters.sparse import (
    index_dtype,
    indices_of,
    refuse_dropout,
    scattered,
    sparse_updates,
    whole,
)

_CHUNK = 2**24


@dataclass
class LTSFT(AdapterConfig):
    r"""Lottery-ticket sparse fine-tuning: a change of the K entries of all weights that full training moves most.

    Full phase: ΔW = D [out, in], trained in full from 0 on every target. `select` then takes the K entries of largest
    |D| over all targets together, P entries in all (exactly K: of equal ones the first), drops D, and so returns to
    the start. Sparse phase: ΔW has K trained values v [K], from 0, at fixed flat indices and is 0 elsewhere, so that
    no optimizer, momentum or weight decay can move another entry; a new optimizer is needed. `reopen` goes on with
    another full phase on top of what was learnt, the next `select` then chooses among the entries not chosen so far.
    Sparse changes add up: activate several adapters, such as one of a language and one of a task, in any order;
        W' = W + Σ_a ΔW_a.
    Loss: L_task + l1 Σ |ΔW| / N, N the number of the base model's parameters; its gradient, l1 sign(ΔW) / N, enters
    once a step. K = `k`, or round(`density` P). A file holds an index (4 bytes; 8 in a matrix of more than 2³¹
    entries) and a value (4 bytes) an entry.

    The layer multiplies with W + ΔW, summed up in float32 and rounded to W's dtype: one product whatever the number of
    such adapters. Memory: the full phase holds D, its gradient and the optimizer's state, as full fine-tuning does; in
    both phases a copy of each target weight is kept for the backward pass.

    The authors choose among all parameters but head, LayerNorms and (for languages) the output layer; here among the
    targets, all linear layers by default: name the embeddings in `target_modules` too. Tied weights are adapted where
    they are named, and only there. What is trained beside it (`modules_to_save`, `train_bias`) trains freely in both
    phases, without the L1 term, and `select` returns it to the base's values; the authors return to the values of the
    iteration's start. In bfloat16 the sum W + ΔW is rounded in every pass, but nothing is ever taken back off W.

    Source: Ansell, Ponti, Korhonen, Vulić, "Composable Sparse Fine-Tuning for Cross-Lingual Transfer", ACL 2022,
    arXiv 2110.07560.

    When to choose:
        Changes that are learnt apart and used together: a language and a task, several domains. Nothing is added to the
        model's layers and the result merges. Training needs the memory of full fine-tuning, for two runs; where one
        adapter is to be trained cheaply, LoRA does.

    Equation:
        \mathcal{M} = \mathrm{top}_K \, \lvert \theta^{(1)} - \theta^{(0)} \rvert
        \theta = \theta^{(0)} + \sum_a \phi_a, \quad \phi_a = 0 \text{ outside } \mathcal{M}_a

    Example:
        import torch
        from peft import get_peft_model
        from folklora import LTSFT, tiny
        from folklora.adapters.lt_sft import select

        model = get_peft_model(tiny.llama(), LTSFT(k=100))
        for phase in ("full", "sparse"):
            if phase == "sparse":
                select(model)
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
            for _ in range(3):
                model(**tiny.batch(), labels=tiny.batch()["input_ids"]).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        model.print_trainable_parameters()

    Args:
        target_modules: As for every adapter; all linear layers by default.
        density: Share of the targets' entries that is chosen, where `k` is not given.
        k: K, their number.
        l1_full: Weight of the L1 term in full phases; the authors have 0.1 for languages, 0 for tasks.
        l1_sparse: The same in sparse phases.
        full: Whether the adapter is in a full phase; `select` and `reopen` set it.
        counts: Number of chosen entries by layer; `select` sets it.
        base_parameters: N; read from the model.
    """

    method: str = "lt-sft"
    target_modules: list[str] | str | None = "all-linear"
    density: float = 0.01
    k: int | None = None
    l1_full: float = 0.0
    l1_sparse: float = 0.0
    full: bool = True
    counts: dict[str, int] = field(default_factory=dict)
    base_parameters: int = 0

    paper: ClassVar[str] = "Ansell et al. 2022, arXiv 2110.07560"
    trains: ClassVar[str] = "the K entries of the weights that full training moves most"
    count: ClassVar[int] = 0
    """Number of chosen entries in the layer that these options are for; see `for_module`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_dropout(self)
        if not 0 < self.density <= 1:
            raise ValueError(f"density must be above 0 and at most 1, not {self.density}")
        if self.k is not None and self.k < 1:
            raise ValueError(f"k must be at least 1, not {self.k}")
        if self.l1_full < 0 or self.l1_sparse < 0:
            raise ValueError(f"l1_full and l1_sparse must be at least 0, not {self.l1_full} and {self.l1_sparse}")

    def fit(self, model: nn.Module) -> None:
        """Count the base model's parameters."""
        own = (p.numel() for name, p in model.named_parameters() if ".folklora_" not in name)
        self.base_parameters = self.base_parameters or sum(own)

    def wanted(self, total: int) -> int:
        """K of `total` entries.

        Raises:
            ValueError: `k` is above it.
        """
        if self.k is not None and self.k > total:
            raise ValueError(f"k={self.k} is above {total}, the number of entries that the targets have")
        return max(1, round(self.density * total)) if self.k is None else self.k

    def for_module(self, name: str) -> LTSFT:
        """The options for one layer, with the number of its entries that are chosen."""
        own = copy.copy(super().for_module(name))
        own.count = self.counts.get(name, 0)
        return own

    def check(self, shape: tuple[int, int], name: str) -> list[str]:
        """Any shape will do."""
        return []

    def update(self, weight: Tensor) -> LTSFTUpdate:
        """ΔW = 0."""
        return self.empty(tuple(weight.shape)).to(weight.device)

    def empty(self, shape: tuple[int, int]) -> LTSFTUpdate:
        """ΔW = 0, at no indices of meaning yet."""
        return LTSFTUpdate(shape, self)

    def trainable_count(self, shape: tuple[int, int]) -> int:
        """All entries in a full phase, the chosen ones in a sparse phase."""
        return shape[0] * shape[1] if self.full else self.count


class LTSFTUpdate(Update):
    """ΔW = `values` [K of this weight] at flat `indices`, plus `change` [out, in] in a full phase."""

    is_dense: ClassVar[bool] = True

    def __init__(self, shape: tuple[int, int], config: LTSFT) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.l1 = {True: config.l1_full, False: config.l1_sparse}
        self.base_parameters = config.base_parameters
        self.change = zeros(*shape) if config.full else None
        self.indices = self.values = None
        if config.count:
            self.indices = whole(torch.zeros(config.count, dtype=index_dtype(shape[0] * shape[1])))
            self.values = zeros(config.count)

    def frozen_parameters(self) -> frozenset[str]:
        """What was chosen is the start of a further full phase."""
        return frozenset({"indices"}) if self.change is None else frozenset({"indices", "values"})

    def dense(self, weight: Tensor) -> Tensor:
        """ΔW [out, in]."""
        total = self._learned()
        return torch.zeros_like(weight) if total is None else total

    def _learned(self) -> Tensor | None:
        if self.values is None:
            return self.change
        kept = scattered(self.indices, self.values, self.shape)
        return kept if self.change is None else kept + self.change

    def penalty(self) -> Tensor | None:
        """l1 Σ |ΔW| / N."""
        weight, learned = self.l1[self.change is not None], self._learned()
        return weight * learned.abs().sum() / self.base_parameters if weight and learned is not None else None

    def sizes(self) -> Tensor:
        """|D| [out · in], -1 where an entry is chosen already."""
        sizes = self.change.detach().abs().flatten()
        return sizes if self.indices is None else sizes.index_fill(0, self.indices.long(), -1.0)

    def choose(self, chosen: Tensor) -> int:
        """Add flat indices to those chosen, with value 0, and drop D; how many there are now."""
        indices, values = [chosen], [self.change.new_zeros(len(chosen))]
        if self.values is not None:
            indices, values = [self.indices, *indices], [self.values.detach(), *values]
        self.change = None
        count = sum(map(len, indices))
        self.indices = whole(torch.cat(indices)) if count else None
        self.values = nn.Parameter(torch.cat(values)) if count else None
        return count


@torch.no_grad()
def select(model: nn.Module, count: int | None = None, adapter_name: str = "default") -> dict[str, int]:
    """End a full phase: choose the entries that moved most, and return everything to the phase's start.

    The trained parameters are new ones: an optimizer has to be made anew.

    Args:
        model: A PEFT model that carries the LT-SFT adapter.
        count: How many entries to choose besides those chosen before; None takes the options' K.
        adapter_name: The adapter.

    Returns:
        The number of entries that are chosen now, by layer.

    Raises:
        ValueError: The model has no such adapter, it is in a sparse phase or merged, or fewer entries are left.
    """
    pairs, config = sparse_updates(model, adapter_name, LTSFTUpdate, "LT-SFT"), model.peft_config[adapter_name]
    if not config.full:
        raise ValueError(f"adapter '{adapter_name}' is in its sparse phase; reopen() begins another full one")
    total = sum(update.change.numel() for _, update in pairs)
    count, left = config.wanted(total) if count is None else count, total - sum(config.counts.values())
    if not 1 <= count <= left:
        raise ValueError(f"cannot choose {count} entries: {left} of {total} are left, choose 1 to {left}")
    least, ties = smallest_chosen((update.sizes() for _, update in pairs), count)
    for layer, update in pairs:
        trained, sizes = update.change.requires_grad, update.sizes()
        chosen = sizes > least.to(sizes)
        equal = (sizes == least.to(sizes)).nonzero().squeeze(1)[:ties]
        ties -= len(equal)
        chosen[equal] = True
        config.counts[layer.name] = update.choose(indices_of(chosen))
        if update.bias_change is not None:
            update.bias_change.zero_()
        layer.set_requires_grad(adapter_name, trained)
    config.full = False
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            module.modules_to_save[adapter_name].load_state_dict(module.original_module.state_dict())
    return dict(config.counts)


def smallest_chosen(parts: Iterable[Tensor], count: int) -> tuple[Tensor, int]:
    """The `count`-th largest of all values in these flat tensors, and how many that equal it are among the largest.

    At most `count` values and a chunk are held at once.
    """
    best: Tensor | None = None
    for part in parts:
        for chunk in part.split(_CHUNK):
            top = chunk.topk(min(count, len(chunk)), sorted=False).values
            best = top if best is None else torch.cat([best, top.to(best)])
            best = best.topk(min(count, len(best)), sorted=False).values
    least = best.min()
    return least, int((best == least).sum())


def reopen(model: nn.Module, adapter_name: str = "default") -> None:
    """Begin another full phase from what the sparse phase learnt; the trained parameters are new ones.

    Args:
        model: A PEFT model that carries the LT-SFT adapter.
        adapter_name: The adapter.

    Raises:
        ValueError: The model has no such adapter, or it is in a full phase or merged.
    """
    pairs, config = sparse_updates(model, adapter_name, LTSFTUpdate, "LT-SFT"), model.peft_config[adapter_name]
    if config.full:
        raise ValueError(f"adapter '{adapter_name}' is in its full phase; select() ends it")
    for layer, update in pairs:
        update.change = zeros(*update.shape, like=update.base_sample)
        layer.set_requires_grad(adapter_name, True)
    config.full = True
