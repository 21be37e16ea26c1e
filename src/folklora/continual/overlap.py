"""How far what new adapters read overlaps with what old ones read."""

from __future__ import annotations

from collections.abc import Sequence

from peft import PeftModel
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from folklora.adapters.base import Update
from folklora.adapters.host.layer import layers_of
from folklora.spectrum import row_overlap


def trained_rows(update: nn.Module) -> nn.Parameter | None:
    """The one matrix A [r, in] that an update trains, whose rows are the directions that it reads; None without."""
    A = getattr(update, "A", None)
    if not isinstance(update, Update) or not isinstance(A, nn.Parameter) or A.dim() != 2:
        return None
    return None if "A" in update.frozen_parameters() else A


def reading_overlap(model: PeftModel, new: Sequence[str], old: Sequence[str]) -> dict[str, float]:
    """How much of what new adapters read, old ones read as well.

    Args:
        model: With the adapters.
        new: Their names.
        old: The names of the old ones.

    Returns:
        "reading_overlap", the mean over layers and pairs of adapters of `row_overlap` of their A [r, in], from 0 to 1;
        and "reading_overlap_by_chance", what is expected of random directions, the mean of r/in of the larger r.
        Nothing where there is no pair of adapters that train such an A; an A that is not finite, of training that
        diverged, is passed over.
    """
    found: list[float] = []
    chance: list[float] = []
    for layer in layers_of(model):
        ours, theirs = (
            [A for name in names if (A := _rows(layer.folklora_updates, name)) is not None] for names in (new, old)
        )
        for A in ours if theirs else ():
            found += row_overlap(A, pad_sequence([other.detach() for other in theirs], batch_first=True)).tolist()
            chance += [max(len(A), len(other)) / A.shape[1] for other in theirs]
    if not found:
        return {}
    means = {"reading_overlap": found, "reading_overlap_by_chance": chance}
    return {name: round(sum(values) / len(values), 6) for name, values in means.items()}


def _rows(updates: nn.ModuleDict, name: str) -> Tensor | None:
    A = trained_rows(updates[name]) if name in updates else None
    return A if A is not None and A.isfinite().all() else None
