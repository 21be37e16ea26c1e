"""Sparse changes of a weight as flat indices and values, and sets of its entries as bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from folklora.adapters.base import AdapterConfig, Update
from folklora.adapters.carriers import carriers

if TYPE_CHECKING:
    from folklora.adapters.host.layer import FolkloraLayer

_BITS = 8


def index_dtype(count: int) -> torch.dtype:
    """The smaller of the whole numbers that can name each of `count` entries."""
    return torch.int32 if count <= torch.iinfo(torch.int32).max else torch.int64


def indices_of(chosen: Tensor) -> Tensor:
    """The flat indices, row by row, of the true entries of a tensor of any shape."""
    return chosen.flatten().nonzero().squeeze(1).to(index_dtype(chosen.numel()))


def scattered(indices: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A dense tensor with `values` at flat `indices`, which are all different, and 0 elsewhere."""
    count = torch.Size(shape).numel()
    return values.new_zeros(count).scatter(0, indices.long(), values).view(shape)


def whole(values: Tensor) -> nn.Parameter:
    """Whole numbers as a frozen parameter."""
    return nn.Parameter(values, requires_grad=False)


def packed(chosen: Tensor) -> Tensor:
    """A tensor of true and false as bytes [⌈n / 8⌉], the first entry in the lowest bit."""
    flat = chosen.flatten().to(torch.uint8)
    flat = torch.cat([flat, flat.new_zeros(-flat.numel() % _BITS)]).view(-1, _BITS)
    return (flat << torch.arange(_BITS, dtype=torch.uint8, device=flat.device)).sum(1, dtype=torch.uint8)


def packed_size(count: int) -> int:
    """How many bytes hold `count` entries."""
    return -(-count // _BITS)


def unpacked(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor of true and false that `packed` gave `bits` for."""
    places = torch.arange(_BITS, dtype=torch.uint8, device=bits.device)
    flat = (bits.unsqueeze(1) >> places) & 1
    return flat.flatten()[: torch.Size(shape).numel()].view(shape).bool()


def refuse_dropout(config: AdapterConfig) -> None:
    """Refuse what a change of the weight itself has no place for.

    Raises:
        ValueError: `dropout` is above 0.
    """
    if config.dropout:
        raise ValueError(f"{config.method} changes the weight itself, which has no input to drop: set dropout=0")


def sparse_updates(
    model: nn.Module, adapter_name: str, kind: type[Update], method: str
) -> list[tuple[FolkloraLayer, Update]]:
    """(layer, update) of an adapter whose form is about to change.

    Raises:
        ValueError: The model has no such adapter, or it is merged.
    """
    pairs = carriers(model, adapter_name, kind, method)
    merged = [layer.name for layer, _ in pairs if layer.merged]
    if merged:
        raise ValueError(f"layer '{merged[0]}' is merged: call unmerge_adapter()")
    for layer, _ in pairs:
        layer.admit_loaded([adapter_name])
    return pairs
