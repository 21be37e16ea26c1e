"""What updates remember of a pass, for one that continues from its cache."""

from __future__ import annotations

from torch import Tensor, nn

from folklora.adapters.base import Update
from folklora.adapters.host.layer import layers_of

Past = tuple[Update, tuple[Tensor, ...], int]


def saved_past(model: nn.Module, rows: int) -> list[Past]:
    """What the updates remember of the last pass, of `rows` rows, for one that continues from its cache."""
    updates = (update for layer in layers_of(model) for update in layer.folklora_updates.values())
    # an update that took no part in that pass may remember another
    kept = (update for update in updates if update.past is not None and len(update.past[0]) == rows)
    return [(update, update.past, update.past_length) for update in kept]


def restore_past(saved: list[Past], rows: Tensor) -> None:
    """Put it back, taking the given rows of the batch, as the cache's rows were taken."""
    for update, past, length in saved:
        update.past, update.past_length = tuple(part[rows.to(part.device)] for part in past), length
