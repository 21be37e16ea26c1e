"""The layers that carry an adapter of one method, for what is done to all of them."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from folklora.adapters.base import Update
from folklora.adapters.host.layer import FolkloraLayer, updates_of

U = TypeVar("U", bound=Update)


def carriers(model: nn.Module, adapter_name: str, kind: type[U], method: str) -> list[tuple[FolkloraLayer, U]]:
    """(layer, update) for each layer that carries the adapter, in the model's order.

    Args:
        model: A model with adapters.
        adapter_name: The adapter.
        kind: What the method's updates are.
        method: The method's usual spelling, for the message.

    Raises:
        ValueError: The model has no adapter of the method with that name.
    """
    pairs = list(updates_of(model, adapter_name))
    if not pairs or not all(isinstance(update, kind) for _, update in pairs):
        raise ValueError(f"the model has no {method} adapter named '{adapter_name}'")
    return pairs
