"""Merging updates into the weight of their layer, and taking them out again bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from folklora.adapters.host.kinds import is_quantised

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
    together = [*layer.merged_adapters, *names]
    merged, bias = _merged_weight(layer, together), _merged_bias(layer, together)
    if finite and not torch.isfinite(merged).all():
        raise ValueError(f"merging {', '.join(names)} into layer '{layer.name}' gives values that are not finite")
    if layer.unmerged_weight is None:
        layer.unmerged_weight, layer.unmerged_bias = base.weight, getattr(base, "bias", None)
    base.weight = nn.Parameter(merged.contiguous(), requires_grad=False)
    if bias is not None:
        base.bias = nn.Parameter(bias, requires_grad=False)
    layer.merged_adapters.extend(names)


def unmerge(layer: FolkloraLayer) -> None:
    """Put the layer's own weight back, bit for bit."""
    if layer.unmerged_weight is None:
        return
    base = layer.get_base_layer()
    base.weight = layer.unmerged_weight
    if layer.unmerged_bias is not None:
        base.bias = layer.unmerged_bias
    layer.unmerged_weight = layer.unmerged_bias = None
    layer.merged_adapters.clear()


@torch.no_grad()
def _merged_weight(layer: FolkloraLayer, names: list[str]) -> Tensor:
    base = layer.get_base_layer()
    present = base.weight
    if layer.unmerged_weight is not None:
        base.weight = layer.unmerged_weight
    try:
        matrix = layer.kind.matrix(base)
        precise = torch.promote_types(matrix.dtype, torch.float32)
        total = layer.fixed_factors(names).dense()
        return layer.kind.layout(base, (matrix.to(precise) + total.to(precise)).to(matrix.dtype))
    finally:
        base.weight = present


@torch.no_grad()
def _merged_bias(layer: FolkloraLayer, names: list[str]) -> Tensor | None:
    changes = [layer.folklora_updates[name].bias_change for name in names]
    changes = [change for change in changes if change is not None]
    if not changes:
        return None
    own = layer.unmerged_bias if layer.merged_adapters else layer.get_base_layer().bias
    return (own.float() + sum(changes)).to(own.dtype)


def _check_mergeable(layer: FolkloraLayer, names: list[str]) -> None:
    gated = [name for name in names if layer.folklora_updates[name].gated]
    if gated:
        raise ValueError(
            f"adapter {', '.join(gated)} cannot be merged into layer '{layer.name}': its update depends on "
            f"{layer.folklora_updates[gated[0]].depends_on}, so no single weight equals it"
        )
    if parametrize.is_parametrized(layer.get_base_layer(), "weight"):
        raise ValueError(
            f"layer '{layer.name}' computes its weight from other parameters (a parametrization), which merging "
            "would have to change; remove the parametrization to merge"
        )
    if is_quantised(layer.get_base_layer()):
        raise ValueError(
            f"layer '{layer.name}' is quantised; merging would need its weight in floating point: load the base "
            "model unquantised to merge"
        )
