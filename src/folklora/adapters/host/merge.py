"""Merging updates into the weights of their layer, and taking them out again bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from folklora.adapters.host.dense import with_dense
from folklora.adapters.host.kinds import is_quantised_weight, put_weight, weight_at
from folklora.factored import Factors

if TYPE_CHECKING:
    from folklora.adapters.host.layer import FolkloraLayer


def merge(layer: FolkloraLayer, names: list[str], *, finite: bool) -> None:
    """Put W + ΔW in the place of a layer's weight, and keep W itself aside.

    Args:
        layer: The layer.
        names: Adapters that are not merged yet; those that the layer does not carry are passed over.
        finite: Refuse a sum that is not finite.

    Raises:
        ValueError: An update depends on its input, the weight is quantised or parametrised, or the sum is not finite.
    """
    names = [name for name in names if name in layer.folklora_updates]
    if not names:
        return
    base = layer.get_base_layer()
    layer.admit_loaded(names)
    _check_mergeable(layer, names)
    # together with those merged before, since corrections of the base do not add up
    merged = layer.merged_weights([*layer.merged_adapters, *names])
    if finite and not all(torch.isfinite(value).all() for value in merged.values()):
        raise ValueError(f"merging {', '.join(names)} into layer '{layer.name}' gives values that are not finite")
    for key, value in merged.items():
        layer.unmerged.setdefault(key, weight_at(base, key))
        put_weight(base, key, nn.Parameter(value.contiguous(), requires_grad=False))
    layer.merged_adapters.extend(names)


def unmerge(layer: FolkloraLayer) -> None:
    """Put the layer's own weights back, bit for bit."""
    for key, value in layer.unmerged.items():
        put_weight(layer.get_base_layer(), key, value)
    layer.unmerged.clear()
    layer.merged_adapters.clear()


@torch.no_grad()
def with_added(layer: FolkloraLayer, names: list[str], total: Factors | None) -> dict[str, Tensor]:
    """A layer's weight with `total` and what dense adapters add, and its bias with the adapters' changes, by name."""
    base = layer.get_base_layer()
    present = base.weight
    base.weight = layer.unmerged.get("weight", present)
    try:
        matrix = layer.kind.matrix(base)
        changed = with_dense(layer, [name for name in names if layer.folklora_updates[name].is_dense], matrix)
        if total is not None:
            changed = changed + total.dense().to(changed.dtype)
        merged = {"weight": layer.kind.layout(base, changed.to(matrix.dtype))}
    finally:
        base.weight = present
    changes = [layer.folklora_updates[name].bias_change for name in names]
    changes = [change for change in changes if change is not None]
    if changes:
        own = layer.unmerged.get("bias", base.bias)
        merged["bias"] = (own.float() + sum(changes)).to(own.dtype)
    return merged


def _check_mergeable(layer: FolkloraLayer, names: list[str]) -> None:
    gated = [name for name in names if layer.folklora_updates[name].gated]
    if gated:
        raise ValueError(
            f"adapter {', '.join(gated)} cannot be merged into layer '{layer.name}': its update depends on "
            f"{layer.folklora_updates[gated[0]].depends_on}, so no single weight equals it"
        )
    if parametrize.is_parametrized(layer.get_base_layer()):
        raise ValueError(
            f"layer '{layer.name}' computes its weight from other parameters (a parametrization), which merging "
            "would have to change; remove the parametrization to merge"
        )
    if is_quantised_weight(layer.stored_weight()):
        raise ValueError(
            f"layer '{layer.name}' is quantised; merging would need its weight in floating point: load the base "
            "model unquantised to merge"
        )
