"""DiffoRA: learn which modules get a LoRA, by gates on all of them that are made 0 or 1 after a search."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn

from folklora.adapters.base import AdapterConfig, Update, kaiming_uniform, zeros
from folklora.adapters.bilevel import ValidationSteps
from folklora.adapters.choices import check_choices
from folklora.adapters.lora import LoRAUpdate
from folklora.factored import Factors

_CHOICES = {"select": ("row", "global"), "gate": ("sigmoid", "softmax-row", "softmax-global")}


@dataclass
class DiffoRA(AdapterConfig):
    r"""Selection of the modules that get a LoRA, by bi-level optimisation of a relaxed 0/1 matrix over all modules.

    The differential adaptation matrix Γ [L, N] has a row for each of L blocks and a column for each of N types of
    module (q, k, v, up, ...). Module (i, j) has W [out, in], A [r, in] Kaiming-uniform and B [out, r] zero; s = α/r.
    Search:  y = W x + b + s γ_ij B (A x),  γ = sigmoid(θ) with one logit θ_ij a module, 0 at the start (or a softmax
        over a row or over all modules). A, B lower the loss of the training data in any trainer; θ lowers the loss of
        validation data, min_θ L_val(w*(θ), θ), in steps of its own (`Search`): while a `with Search(...)` is open,
        every optimizer step on A and B is followed by an Adam step on θ. r (in + out) trained parameters a module.
    Discretisation (`discretise`):  Γ_ij = 1 for the ⌊ϱ N⌋ largest γ of each row (or the ⌊ϱ L N⌋ largest of all),
        0 elsewhere; θ is dropped.
    Training:  y = W x + b + s (Γ_ij B (A x) + (1 - Γ_ij) Bˢ_j (Aˢ_j x)).  Chosen modules get a LoRA of their own; the
        others of one type and shape share one pair of rank r_s, kept and saved once, or get nothing without
        `weight_sharing`. Σ_chosen r (in + out) + Σ_types r_s (in + out) trained parameters.
    The first step of either phase sees the base model exactly. γ multiplies B, so that B can make up for a small γ:
    weight decay on A and B keeps the order of the gates meaningful. As long as B is 0, θ gets no gradient: train a
    few steps first (`warmup`).

    Source: Jiang, Wang, Yuan, "DiffoRA: Enabling Parameter-Efficient Fine-Tuning via Differential Module Selection",
    2025, arXiv 2502.08905 (first version: "... LLM Fine-Tuning via Differential Low-Rank Matrix Adaptation"). No code
    is public. Its abstracts give the matrix, its relaxation, discretisation and weight sharing, and ϱ by name.
    Reconstructed without the full text, and options for that reason: the gate, the selection by rows, what is shared
    and its rank, ϱ = 0.5, and the optimiser of θ, which follows DARTS (Liu, Simonyan, Yang, "DARTS: Differentiable
    Architecture Search", ICLR 2019, arXiv 1806.09055).

    When to choose:
        When only a part of the modules may carry an adapter and it is not known which part matters. The search costs
        a further forward and backward pass a step, and validation data that training does not see. Where all modules
        can be adapted, LoRA with a smaller rank is simpler.

    Equation:
        h = W_0 x + s \, \gamma_{ij} B_{ij} A_{ij} x, \quad \gamma_{ij} = \sigma(\theta_{ij})
        \min_{\theta} L_{val}(w^*(\theta), \theta), \quad w^*(\theta) = \arg\min_w L_{train}(w, \theta)
        h = W_0 x + s \left( \Gamma_{ij} B_{ij} A_{ij} + (1 - \Gamma_{ij}) B^s_j A^s_j \right) x

    Example:
        import torch
        from peft import get_peft_model
        from folklora import DiffoRA, tiny
        from folklora.adapters.diffora import Search, discretise

        model = get_peft_model(tiny.llama(), DiffoRA(r=4, target_modules="all-linear"))
        batch = {**tiny.batch(), "labels": tiny.batch()["input_ids"]}

        def train(model, steps):  # any trainer does
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
            for _ in range(steps):
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

        with Search(model, validation=[batch], warmup=3):
            train(model, 10)
        print(discretise(model).selected)
        train(model, 10)

    Args:
        r: Rank of a module's own LoRA.
        alpha: α of s = α/r, for own and shared pairs.
        rho: ϱ, the share of the modules that is chosen.
        select: Choose the same number in each "row" (block), or the best of all, "global".
        gate: γ of a module: the sigmoid of its θ, or a softmax with which the modules of a row, or all, compete. The
            softmax bears only small steps of θ.
        weight_sharing: Whether modules that are not chosen share a pair by type.
        shared_r: Its rank r_s.
        selected: Names of the chosen modules; None searches. Written by `discretise`. Without weight sharing they
            are the target modules.
    """

    method: str = "diffora"
    r: int = 8
    alpha: float = 16.0
    rho: float = 0.5
    select: Literal["row", "global"] = "row"
    gate: Literal["sigmoid", "softmax-row", "softmax-global"] = "sigmoid"
    weight_sharing: bool = True
    shared_r: int = 4
    selected: list[str] | None = None

    paper: ClassVar[str] = "Jiang et al. 2025, arXiv 2502.08905"
    trains: ClassVar[str] = "A, B of chosen modules, one shared pair a type"
    module: ClassVar[str] = ""
    """Name of the layer that these options are for; see `for_module`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_rank(self.r)
        self.check_rank(self.shared_r)
        check_choices(self, _CHOICES)
        if not 0 < self.rho <= 1:
            raise ValueError(f"rho must be above 0 and at most 1, not {self.rho}")
        if self.selected is not None and not self.weight_sharing:
            self.target_modules = list(self.selected)

    def for_module(self, name: str) -> DiffoRA:
        """The options for one layer, which is chosen or not by its name."""
        own = copy.copy(super().for_module(name))
        own.module = name
        return own

    def update(self, weight: Tensor) -> Update:
        """A gated LoRA in the search, a LoRA on a chosen module, else a place of the shared pair."""
        out, columns = weight.shape
        if self._shares:
            return SharedPairUpdate(_pair(self.module, (out, columns)), self._scale)
        return self._own(kaiming_uniform(self.r, columns, weight), zeros(out, self.r, like=weight))

    def empty(self, shape: tuple[int, int]) -> Update:
        """The same shapes, zeros."""
        if self._shares:
            return SharedPairUpdate(_pair(self.module, shape), self._scale)
        return self._own(zeros(self.r, shape[1]), zeros(shape[0], self.r))

    def shared(self, layers: dict[str, tuple[int, int]], like: Tensor) -> dict[str, nn.Parameter]:
        """θ of every module in the search; after it, a pair for each type and shape of those that are not chosen."""
        if self.selected is None:
            return {_theta(name): zeros(1, like=like) for name in layers}
        unknown = sorted(set(self.selected) - set(layers))
        if unknown:
            raise ValueError(f"selected names {', '.join(unknown)}, which target_modules does not match in this model")
        pairs = {}
        for key, (out, columns) in self._pairs(layers).items():
            pairs[f"A/{key}"] = kaiming_uniform(self.shared_r, columns, like)
            pairs[f"B/{key}"] = zeros(out, self.shared_r, like=like)
        return pairs

    def check(self, shape: tuple[int, int], name: str) -> list[str]:
        """A rank above the weight's."""
        if not self._shares or self.shared_r <= min(shape):
            return [] if self._shares else super().check(shape, name)
        return [f"shared_r {self.shared_r} is above {min(shape)}, the largest for layer '{name}' of {list(shape)}"]

    def trainable_count(self, shape: tuple[int, int]) -> int:
        """r (in + out); nothing of its own on a module that is not chosen."""
        return 0 if self._shares else self.r * sum(shape)

    def shared_count(self, layers: dict[str, tuple[int, int]]) -> int:
        """r_s (in + out) a type and shape of the modules that are not chosen."""
        return 0 if self.selected is None else self.shared_r * sum(sum(s) for s in self._pairs(layers).values())

    def _pairs(self, layers: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        return {_pair(name, shape): shape for name, shape in layers.items() if name not in self.selected}

    def _own(self, A: nn.Parameter, B: nn.Parameter) -> LoRAUpdate:
        return SearchUpdate(A, B, self) if self.selected is None else LoRAUpdate(A, B, self._scale)

    @property
    def _shares(self) -> bool:
        return self.selected is not None and self.module not in self.selected

    @property
    def _scale(self) -> float:
        return self.scaling(self.alpha, self.r)


class SearchUpdate(LoRAUpdate):
    """ΔW = s γ B A; A, B trained, θ shared with the other modules and trained by `Search` alone."""

    def __init__(self, A: nn.Parameter, B: nn.Parameter, config: DiffoRA) -> None:
        super().__init__(A, B, config.scaling(config.alpha, config.r))
        self.name, self.gate, self.rivals = config.module, config.gate, [_theta(config.module)]

    def share(self, parameters: nn.ParameterDict) -> None:
        """Note which modules' logits a softmax reads."""
        super().share(parameters)
        if self.gate == "softmax-global":
            self.rivals = list(parameters)
        elif self.gate == "softmax-row":
            self.rivals = [key for key in parameters if _place(key)[0] == _place(_theta(self.name))[0]]

    def frozen_parameters(self) -> frozenset[str]:
        """θ: no trainer's optimizer moves it."""
        return frozenset(self.shared or ())

    def gamma(self) -> Tensor:
        """γ [1], in float32 as θ is."""
        own = self.common(_theta(self.name))
        if self.gate == "sigmoid":
            return torch.sigmoid(own)
        logits = torch.cat([self.common(key) for key in self.rivals])
        return torch.exp(own - logits.logsumexp(0))

    def factors(self, x: Tensor | None = None, mask: Tensor | None = None) -> Factors:
        """(A, s γ, B)."""
        return Factors(self.A, (self.scale * self.gamma()).expand(self.A.shape[0]), self.B)


class SharedPairUpdate(Update):
    """ΔW = s Bˢ Aˢ, a pair in common with the other modules of the type that were not chosen."""

    def __init__(self, key: str, scale: float) -> None:
        super().__init__()
        self.key, self.scale = key, scale

    def factors(self, x: Tensor | None = None, mask: Tensor | None = None) -> Factors:
        """(Aˢ, s, Bˢ)."""
        return Factors(self.common(f"A/{self.key}"), self.scale, self.common(f"B/{self.key}"))


class Search(ValidationSteps):
    """The steps on θ: while this is entered, one follows every optimizer step on the adapter, whatever the trainer.

    Args:
        model: The PEFT model with a DiffoRA adapter in its search.
        validation: Batches that training does not see.
        lr: Learning rate of θ.
        adapter_name: The adapter.
        **options: As `ValidationSteps` takes them: `loss`, `warmup`, `training` for the second-order gradient, ...
    """

    def __init__(
        self,
        model: nn.Module,
        validation: Iterable[Any],
        lr: float = 5e-3,
        adapter_name: str = "default",
        **options: Any,
    ) -> None:
        updates = list(_searched(model, adapter_name).values())
        follows = [p for update in updates for p in (update.A, update.B)]
        super().__init__(model, list(updates[0].shared.values()), follows, validation, lr=lr, **options)


class Phases(NamedTuple):
    """Numbers of optimizer steps."""

    warmup: int
    search: int
    training: int


def phases(steps: int, search: float = 0.25, warmup: float = 0.2) -> Phases:
    """How to divide a run of so many steps.

    Args:
        steps: All steps of the run.
        search: The share of the search, its warm-up included.
        warmup: The share of the search in which θ rests.

    Returns:
        The steps of the warm-up, of the whole search, and of the training after the discretisation.
    """
    searched = round(search * steps)
    return Phases(round(warmup * searched), searched, steps - searched)


def gates(model: nn.Module, adapter_name: str = "default") -> dict[str, float]:
    """γ of every module in the search, by the module's name."""
    with torch.no_grad():
        return {name: update.gamma().item() for name, update in _searched(model, adapter_name).items()}


def choose(gammas: dict[str, float], rho: float, select: str = "row") -> list[str]:
    """The modules whose Γ is 1: of each row, or of all, the share ϱ with the largest γ; in the model's order.

    Raises:
        ValueError: So small a share leaves none.
    """
    rows = defaultdict(list)
    for name in gammas:
        rows[_place(name)[0] if select == "row" else ""].append(name)
    chosen = set()
    for names in rows.values():
        # a product such as 0.29 · 100 lies just below the whole number that is meant
        count = math.floor(rho * len(names) + 1e-9)
        chosen.update(sorted(names, key=gammas.get, reverse=True)[:count])
    if not chosen:
        raise ValueError(f"rho {rho} chooses none of {len(gammas)} modules in {len(rows)} rows; raise it")
    return [name for name in gammas if name in chosen]


def discretise(model: PeftModel, adapter_name: str = "default", keep: bool = False) -> DiffoRA:
    """End the search: choose the modules, and put the final adapter in the place of the searched one.

    The optimizer and its schedule have to be made anew for the training that follows. Modules that are trained in
    full (`modules_to_save`) start anew too.

    Args:
        model: The PEFT model with a DiffoRA adapter in its search.
        adapter_name: The adapter.
        keep: Let the chosen modules go on from the searched A and γ B; else from a new start.

    Returns:
        The final adapter's options.
    """
    searched, config = _searched(model, adapter_name), model.peft_config[adapter_name]
    selected = choose(gates(model, adapter_name), config.rho, config.select)
    final = dataclasses.replace(config, selected=selected, inference_mode=False)
    with torch.no_grad():
        found = {name: (searched[name].A.clone(), searched[name].B * searched[name].gamma()) for name in selected}
    model.delete_adapter(adapter_name)
    model.add_adapter(adapter_name, final)
    model.set_adapter(adapter_name)
    if keep:
        for name, update in _updates(model, adapter_name).items():
            if name in found:
                update.A.data.copy_(found[name][0])
                update.B.data.copy_(found[name][1])
    return final


def _updates(model: nn.Module, adapter_name: str) -> dict[str, Update]:
    from folklora.adapters.host.layer import updates_of

    return {layer.name: update for layer, update in updates_of(model, adapter_name)}


def _searched(model: nn.Module, adapter_name: str) -> dict[str, SearchUpdate]:
    updates = _updates(model, adapter_name)
    if not updates or not all(isinstance(update, SearchUpdate) for update in updates.values()):
        raise ValueError(f"the model has no DiffoRA adapter named '{adapter_name}' that is still in its search")
    return updates


def _place(name: str) -> tuple[str, str]:
    """(row, type) of a module: its name up to the first number in it, which counts the blocks, and the rest."""
    parts = name.replace("/", ".").split(".")
    end = next((i + 1 for i, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[:end]), ".".join(parts[end:])


def _theta(name: str) -> str:
    # a parameter's name holds no dot
    return f"theta/{name}".replace(".", "/")


def _pair(name: str, shape: tuple[int, int]) -> str:
    return f"{_place(name)[1]}/{shape[0]}x{shape[1]}".replace(".", "/")
