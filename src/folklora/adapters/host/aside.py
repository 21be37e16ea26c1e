"""Adapters taken out of a model for a while, so that work on one costs the same however many others it carries.

PEFT walks over the whole model many times for each adapter that it adds, loads or saves. With every adapter in place,
n of them would cost n² walks' worth of parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from folklora.adapters.host.layer import layers_of


@contextmanager
def others_aside(model: nn.Module, adapter_name: str | None = None) -> Iterator[None]:
    """Within this block the model's layers carry no updates but the named adapter's, and those that are put there.

    Args:
        model: The model; it must not be run within the block.
        adapter_name: The adapter that stays; None takes all aside.
    """
    layers = list(layers_of(model))
    shared = {id(layer.context): layer.context.shared for layer in layers}
    holders = [holder._modules for holder in (*(layer.folklora_updates for layer in layers), *shared.values())]
    before = [dict(holder) for holder in holders]
    for holder in holders:
        for name in holder.keys() - {adapter_name}:
            del holder[name]
    try:
        yield
    finally:
        for holder, old in zip(holders, before, strict=True):
            # adapters are summed in their order, and what is new comes last
            ordered = {**old, **holder}
            gone = {adapter_name} - holder.keys()
            holder.clear()
            holder.update({name: part for name, part in ordered.items() if name not in gone})
