"""Rocket: a few trained LoRAs, tuned together as experts of which each token takes some."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from folklora.adapters.base import AdapterConfig, Update, kaiming_uniform, zeros
from folklora.adapters.host.layer import FolkloraLayer, updates_of
from folklora.adapters.task_vectors import TaskVectors, adapters_of
from folklora.factored import Factors


@dataclass
class Rocket(AdapterConfig):
    r"""Rocket: from a bank of trained LoRAs, those that solve a few examples become one mixture of experts.

    A layer with frozen W [out, in] holds E experts (A_e [r, in], B_e [out, r]), which start as the LoRAs of `sources`
    with their scales folded into B_e, and a router G [E, in].
        p = softmax(G x)                                    for each token, in float32
        T = the k experts with the largest p,  p̂_e = p_e / Σ_{j ∈ T} p_j
        y = W x + b + Σ_{e ∈ T} p̂_e B_e (A_e x)            no further α/r
    Experts and routers are trained together, E r (in + out) + E in parameters a weight; G starts as a linear layer's
    weight, so the start is a mixture of the sources and not the base. All experts are computed and the closed ones
    multiplied by 0: they get no gradient from that token. No loss balances the load: `expert_use` tells it. At k = 1
    the open gate is 1 whatever the router says, and G learns nothing; at k = E every token has all experts.

    The stages before are `folklora.expertise`: which LoRAs (`measure`, `Expertise.choose`) and which open data
    (`augment`). The paper trains on the answers with AdamW, learning rate 5e-5, 5 epochs, batches of 64, dropout 0.05.

    Departures: the paper's formula shows a router that reads an expert's output, its code routes the layer's input, as
    here. The code ignores α/r (its bank has α = r); here each source keeps its own scale. Names that do not match
    leave its experts at zero without a word; here a source that adapts a layer less than the others is refused. A
    source of a lower rank than r is filled up by new rows of A beside zeros in B, which change nothing at the start.
    The router reads x without dropout. A saved adapter holds all of it and reads no source again.

    Source: Yang et al., "Leveraging Open Knowledge for Advancing Task Expertise in Large Language Models", 2024,
    arXiv 2408.15915.

    When to choose:
        There is a bank of LoRAs of one base, a few checked examples of a new task, and open data near it: the mixture
        starts from what several of them know, and can learn more than they do, where `atlas` only weighs them. With
        much data of the task itself, a LoRA does as well and merges into the weight; this does not.

    Equation:
        p = \operatorname{softmax}(G x), \quad T = \operatorname{top}_k(p), \quad \hat p_e = p_e / \sum_{j \in T} p_j
        y = W x + b + \sum_{e \in T} \hat p_e \, B_e A_e x

    Example:
        import torch
        from folklora import LoRA, Rocket, tiny
        from peft import get_peft_model

        for seed, task in enumerate(["art", "law", "music"]):  # in life, those that Expertise.choose names
            torch.manual_seed(seed)
            tiny.trained(LoRA(r=2, target_modules=["q_proj"])).save_pretrained(task)
        model = get_peft_model(tiny.llama(), Rocket(sources={name: name for name in ["art", "law", "music"]}))
        model.print_trainable_parameters()
        tiny.train(model)
        model.save_pretrained("expert")

    Args:
        target_modules: As for every adapter; None takes the layers that the sources adapt.
        sources: Name → the folder of a LoRA, PEFT's or of a Folklora adapter that has factors; put in the names' order.
        top_k: k, experts that a token takes.
        r: Rank of every expert; None takes the largest of the sources' on each layer.
    """

    method: str = "rocket"
    target_modules: list[str] | str | None = None
    sources: dict[str, str] = field(default_factory=dict)
    top_k: int = 2
    r: int | None = None

    paper: ClassVar[str] = "Yang et al. 2024, arXiv 2408.15915"
    trains: ClassVar[str] = "LoRAs of a bank and a router over them"
    layer_kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    example_sources: ClassVar[Literal["lora", "vl-adapter"]] = "lora"
    """What checks give it as sources where none are named."""
    bank: ClassVar[TaskVectors | None] = None
    """The sources, once `fit` has found them; no option."""
    layer: ClassVar[str] = ""
    """The layer that these options are for; see `for_module`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # the order of experts; a saved configuration is sorted too
        self.sources = dict(sorted(self.sources.items()))
        if self.r is not None:
            self.check_rank(self.r)
        elif self.rank_pattern:
            raise ValueError("rank_pattern changes the rank r of some layers: give r too")
        if self.alpha_pattern:
            raise ValueError("Rocket takes no alpha_pattern: each source has its own scale")
        # there are no sources before they are named
        if not isinstance(self.top_k, int) or not 1 <= self.top_k <= (len(self.sources) or self.top_k):
            raise ValueError(f"top_k must be between 1 and the {len(self.sources)} sources, not {self.top_k!r}")

    def fit(self, model: nn.Module) -> None:
        """Find the sources, the layers that they adapt where no target is named, and their ranks where none is given.

        Raises:
            ValueError: No source is named, or one is no adapter.
            FileNotFoundError: A folder holds none.
        """
        # a saved adapter holds its experts, and its sources may be gone
        if self.restoring and self.r is not None and self.target_modules is not None:
            return
        if not self.sources:
            raise ValueError('Rocket mixes trained LoRAs: name them, sources={"name": "folder", ...}')
        self.bank = bank = adapters_of({name: str(folder) for name, folder in self.sources.items()}, model)
        if self.target_modules is None:
            self.target_modules = bank.layers()
        if self.r is None:
            layers = [layer for layer in bank.layers() if layer in bank.shapes]
            self._take_ranks({layer: max(bank.ranks(layer).values()) for layer in layers})

    def _take_ranks(self, ranks: Mapping[str, int]) -> None:
        if not ranks:
            raise ValueError("the sources adapt no layer of this model: they are of another base")
        self.r = max(ranks.values(), key=list(ranks.values()).count)
        # anchored: PEFT matches a key against the end of a name
        self.rank_pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != self.r}

    def for_module(self, name: str) -> Rocket:
        """The options for one layer, which know its name."""
        own = copy.copy(super().for_module(name))
        own.layer, own.bank = name, self.bank
        return own

    def check(self, shape: tuple[int, int], name: str) -> list[str]:
        """Sources that do not fit or adapt other layers, or ranks below theirs; a rank above the weight's is none."""
        if self.bank is None:
            return []
        problems = self.bank.problems(list(self.sources), name, shape)
        if problems:
            return problems
        ranks = self.bank.ranks(name)
        return [
            f"source '{source}' has no update on layer '{name}': name in target_modules what all sources adapt"
            for source in self.sources
            if source not in ranks
        ] + [
            f"r = {self.r} is below the rank {rank} of source '{source}' on layer '{name}'"
            for source, rank in ranks.items()
            if rank > self.r
        ]

    def update(self, weight: Tensor) -> RocketUpdate:
        """The sources as experts, filled up to rank r; the router as a linear layer's weight."""
        out, columns = weight.shape
        A, B = kaiming_uniform(self.experts * self.r, columns, weight), zeros(out, self.experts * self.r, like=weight)
        with torch.no_grad():
            for expert, part in enumerate(self.bank.factors(list(self.sources), self.layer, (out, columns))):
                rows = slice(expert * self.r, expert * self.r + part.rank)
                A[rows], B[:, rows] = part.A.to(A), part.B.to(B)
        return RocketUpdate(A, B, kaiming_uniform(self.experts, columns, weight), self)

    def empty(self, shape: tuple[int, int]) -> RocketUpdate:
        """The same shapes, zeros."""
        out, columns = shape
        ranks = self.experts * self.r
        return RocketUpdate(zeros(ranks, columns), zeros(out, ranks), zeros(self.experts, columns), self)

    @property
    def experts(self) -> int:
        """E."""
        return len(self.sources)

    def trainable_count(self, shape: tuple[int, int]) -> int:
        """E r (in + out) + E in."""
        return self.experts * (self.r * sum(shape) + shape[1])


class RocketUpdate(Update):
    """A [E r, in], B [out, E r] and router [E, in], all trained; expert e has the ranks from e r to (e + 1) r."""

    gated: ClassVar[bool] = True
    starts_at_base: bool = False

    def __init__(self, A: nn.Parameter, B: nn.Parameter, router: nn.Parameter, config: Rocket) -> None:
        super().__init__()
        self.A, self.B, self.router = A, B, router
        self.top_k, self.r = config.top_k, config.r

    def factors(self, x: Tensor | None = None, mask: Tensor | None = None) -> Factors:
        """(A, p̂ repeated for the ranks of each expert, B)."""
        if x is None:
            raise ValueError("Rocket's update depends on the layer's input, and none was given")
        return Factors(self.A, self.gates(x).to(x.dtype).repeat_interleave(self.r, dim=-1), self.B)

    def gates(self, x: Tensor) -> Tensor:
        """p̂ [..., E] of inputs [..., in], float32 or more: 0 for all but k experts."""
        logits = F.linear(x, self.router.to(x.dtype))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        best = logits.topk(self.top_k, dim=-1)
        # what softmax over all would divide by falls out when the k are made to sum to 1
        return torch.zeros_like(logits).scatter(-1, best.indices, best.values.softmax(dim=-1))


@torch.no_grad()
def expert_use(
    model: nn.Module, inputs: Mapping[str, Any], adapter_name: str = "default"
) -> dict[str, dict[str, float]]:
    """The share of the tokens of a batch that each expert is open for, by layer and source; they sum to k.

    Padding is left out where the attention mask tells it. An expert that is open for hardly any token has starved.

    Args:
        model: A PEFT model that carries a Rocket adapter, which is the active one.
        inputs: What to call it with.
        adapter_name: The adapter.

    Raises:
        ValueError: There is no such adapter.
    """
    pairs = [pair for pair in updates_of(model, adapter_name) if isinstance(pair[1], RocketUpdate)]
    if not pairs:
        raise ValueError(f"the model carries no Rocket adapter '{adapter_name}'")
    names, found = list(model.peft_config[adapter_name].sources), {}

    def note(layer: FolkloraLayer, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        is_open = (layer.folklora_updates[adapter_name].gates(x) > 0).flatten(0, -2).double()
        mask = layer.context.own_mask(adapter_name, x, layer.name)
        weights = torch.ones_like(is_open[:, 0]) if mask is None else (mask != 0).flatten().double()
        found[layer.name] = dict(zip(names, (weights @ is_open / weights.sum()).tolist(), strict=True))

    handles = [layer.register_forward_pre_hook(note) for layer, _ in pairs]
    try:
        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found
