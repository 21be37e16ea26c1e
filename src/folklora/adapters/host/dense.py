"""Updates that change a weight without factors: the layer computes with W + ΔW in the place of W."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from folklora.adapters.host.layer import FolkloraLayer


def forward_with_dense(layer: FolkloraLayer, x: Tensor, names: list[str]) -> Tensor:
    """The layer's output with these adapters, some of which are dense; one product, whatever their number.

    Rows that have their own adapters take one more product for each dense one.
    """
    dense = [name for name in names if layer.folklora_updates[name].is_dense]
    others = [name for name in names if name not in dense]
    if layer.context.mixture is not None:
        raise ValueError(
            f"a mixture by row cannot weigh adapters that change the entries of layer '{layer.name}' one by one: mix "
            "adapters in factors"
        )
    if layer.context.rows is None:
        y = layer._forward_factored(x, others, changed_weight(layer, dense))
    else:
        y = layer._forward_factored(x, others)
        for name in dense:
            own = layer._forward_factored(x, [], changed_weight(layer, [name]))
            y = torch.where(layer.context.own_rows(name, x, layer.name).bool(), own, y)
    return layer._with_biases(y, x, dense)


def changed_weight(layer: FolkloraLayer, names: list[str]) -> Tensor:
    """W + ΔW of these dense adapters, in W's own layout and dtype; added up in float32 or more."""
    base = layer.get_base_layer()
    matrix = layer.kind.matrix(base)
    return layer.kind.layout(base, with_dense(layer, names, matrix).to(matrix.dtype))


def with_dense(layer: FolkloraLayer, names: list[str], matrix: Tensor) -> Tensor:
    """The matrix W [out, in] with what these dense adapters add, in float32 or more."""
    precise = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    # in one order, so that the order in which adapters are named makes no difference in the last bit
    changes = [layer.folklora_updates[name].dense(precise) for name in sorted(names)]
    return precise + functools.reduce(torch.add, changes) if changes else precise
