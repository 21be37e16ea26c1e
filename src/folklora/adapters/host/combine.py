"""The weighted sum of adapters as one more adapter, a plain LoRA: PEFT's `add_weighted_adapter`, for any methods."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from folklora.adapters.base import AdapterConfig
from folklora.adapters.host.export import at_least_one_term
from folklora.adapters.host.layer import FolkloraLayer, layers_of
from folklora.adapters.host.weights import WeightsLayer
from folklora.adapters.lora import LoRA
from folklora.factored import Factors, concatenate

COMBINATIONS = ("cat", "svd")


def check_combination(
    model: nn.Module,
    configs: dict[str, AdapterConfig],
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
) -> None:
    """Refuse what has no weighted sum.

    Raises:
        ValueError: With every problem found.
    """
    problems = [f"there is no adapter '{name}'" for name in adapters if name not in configs]
    if not adapters or len(adapters) != len(weights) or len(set(adapters)) != len(adapters):
        problems.append(f"adapters must be different names with one weight each, not {adapters} and {weights}")
    if adapter_name in configs:
        problems.append(f"there is an adapter '{adapter_name}' already; choose another name for the sum")
    if combination_type not in COMBINATIONS:
        problems.append(
            f"combination_type '{combination_type}' mixes the factors of LoRAs, and not what they add up to; here are "
            "'cat' (the sum as it is) and 'svd' (the best sum of a lower rank)"
        )
    for layer in layers_of(model):
        problems += _layer_problems(layer, [name for name in adapters if name in layer.folklora_updates])
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and set(adapters).intersection(module.modules_to_save):
            problems.append(f"'{name}' was trained in full by one of the adapters, and a LoRA does not hold that")
    if problems:
        raise ValueError("\n".join(problems))


def _layer_problems(layer: FolkloraLayer, names: list[str]) -> list[str]:
    if layer.merged_adapters and names:
        return [f"{', '.join(layer.merged_adapters)} is merged into layer '{layer.name}': call unmerge_adapter() first"]
    if isinstance(layer, WeightsLayer) and names:
        return [f"the {layer.kind.name} '{layer.name}' has several weights, whose updates are not summed up here"]
    gated = [name for name in names if layer.folklora_updates[name].gated]
    dense = [name for name in names if layer.folklora_updates[name].is_dense]
    return [
        f"the update of adapter '{name}' on layer '{layer.name}' changes entries of the weight and has no low rank"
        for name in dense
    ] + [
        f"the update of adapter '{name}' on layer '{layer.name}' depends on {layer.folklora_updates[name].depends_on}, "
        "so it is no fixed matrix that could be summed"
        for name in gated
    ]


@torch.no_grad()
def weighted_sum(
    model: nn.Module, adapters: Sequence[str], weights: Sequence[float], truncated: bool, rank: int | None = None
) -> dict[str, tuple[Tensor, Tensor, Tensor | None]]:
    """A [r, in], B [out, r] and the change of the bias, of the sum on every layer that one of the adapters is on.

    What a method takes out of the base itself (KaSA's noise) is the same for all of its adapters: the largest of it
    is taken once and whole, whatever the weights, as where the adapters are active at once.

    Args:
        model: The model.
        adapters: Names of adapters.
        weights: A number for each.
        truncated: Whether each sum is brought to a lower rank.
        rank: Which; None takes the largest of the terms' on each layer.
    """
    found = {}
    for layer in layers_of(model):
        own = [(name, weight) for name, weight in zip(adapters, weights, strict=True) if name in layer.folklora_updates]
        if not own:
            continue
        layer.admit_loaded([name for name, _ in own])
        terms = _terms(layer, own)
        factors = concatenate(terms).compact()
        if truncated:
            factors = factors.truncate(rank or max(term.rank for term in terms))
        A, B = factors.to_lora()
        changes = [(layer.folklora_updates[name].bias_change, weight) for name, weight in own]
        changes = [change * weight for change, weight in changes if change is not None]
        found[layer.name] = (A.float(), B.float(), sum(changes) if changes else None)
    return found


def _terms(layer: FolkloraLayer, own: list[tuple[str, float]]) -> list[Factors]:
    terms: list[Factors] = []
    made = layer._corrections_made([name for name, _ in own])
    for name, weight in own:
        update = layer.folklora_updates[name]
        learned, fixed = update.split() if update.corrects_base else (update.factors(), None)
        terms.append(learned.scale(weight))
        if fixed is not None and name not in made:
            terms.append(fixed)
    terms = [term.compact() for term in terms]
    # a LoRA has a rank of at least 1
    return [term for term in terms if term.rank] or [at_least_one_term(terms[0])]


def config_of(sums: dict[str, tuple[Tensor, Tensor, Tensor | None]], like: AdapterConfig) -> LoRA:
    """The LoRA that holds the sums, with scaling 1, for the task of another configuration."""
    ranks = {name: len(A) for name, (A, _, _) in sums.items()}
    common = max(ranks.values(), key=list(ranks.values()).count)
    # anchored: PEFT matches a key against the end of a name
    others = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != common}
    return LoRA(
        r=common,
        alpha=common,
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules="|".join(map(re.escape, ranks)),
        train_bias=any(change is not None for _, _, change in sums.values()),
        task_type=like.task_type,
        base_model_name_or_path=like.base_model_name_or_path,
        inference_mode=like.inference_mode,
    )


@torch.no_grad()
def fill(model: nn.Module, adapter_name: str, sums: dict[str, tuple[Tensor, Tensor, Tensor | None]]) -> None:
    """Give the LoRA its values."""
    for layer in layers_of(model):
        if adapter_name in layer.folklora_updates:
            update, (A, B, change) = layer.folklora_updates[adapter_name], sums[layer.name]
            update.A.copy_(A)
            update.B.copy_(B)
            if change is not None:
                update.bias_change.copy_(change)
