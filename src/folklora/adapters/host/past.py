"""What the layers remember of a pass for those that continue from its cache, when the cache's rows are taken anew."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from folklora.adapters.base import Update
from folklora.adapters.host.call import CallContext
from folklora.adapters.host.layer import layers_of


@dataclass(frozen=True)
class Past:
    """What is remembered of one pass.

    Args:
        updates: What each update keeps of it, and of how many positions.
        mixtures: How much each adapter counts in each of its rows, by the context that says so.
    """

    updates: list[tuple[Update, tuple[Tensor, ...], int]]
    mixtures: list[tuple[CallContext, dict[str, Tensor]]]


def saved_past(model: nn.Module, rows: int) -> Past:
    """What is remembered of the last pass, of `rows` rows, for one that continues from its cache."""
    layers = list(layers_of(model))
    updates = (update for layer in layers for update in layer.folklora_updates.values())
    # an update that took no part in that pass may remember another
    kept = [(u, u.past, u.past_length) for u in updates if u.past is not None and len(u.past[0]) == rows]
    contexts = {id(layer.context): layer.context for layer in layers}.values()
    return Past(kept, [(context, context.mixture) for context in contexts if context.mixture is not None])


def restore_past(saved: Past, rows: Tensor) -> None:
    """Put it back, taking the given rows of the batch, as the cache's rows were taken."""
    for update, past, length in saved.updates:
        update.past, update.past_length = tuple(part[rows.to(part.device)] for part in past), length
    for context, mixture in saved.mixtures:
        # one weight alone is that of all rows
        context.mixture = {k: w[rows.to(w.device)] if len(w) > 1 else w for k, w in mixture.items()}
