"""What updates in the frame of a weight's singular vectors share: the frozen frame, and what of it a file holds."""

from __future__ import annotations

import warnings
from typing import ClassVar

import torch
from torch import Tensor, nn

from folklora.adapters.base import Update
from folklora.spectrum import Triplets, top

# vectors turn by about (change of the weight) / (gap); this many times the change leaves a turn of 1 %
_SAFE_GAP = 100.0
# equal bases give equal values; other routines agree to a few roundings
_ROUNDINGS = 10.0


class VectorsUpdate(Update):
    """An update U M Vᵀ over the first t singular triplets of W: U [out, t], S [t] and V [in, t] are frozen.

    A saved file holds S. U and V are in it only with `save_vectors`; else `derive` decomposes the base weight again,
    the same way as at the start, and warns where its vectors may not be those of the training: where singular values
    lie so near each other that single vectors are not unique, or where the base has changed (been rounded, say) by more
    than their gaps bear.

    Args:
        frame: The triplets.
        save_vectors: Whether a saved file holds U and V.
    """

    frozen: ClassVar[frozenset[str]] = frozenset({"U", "S", "V"})

    def __init__(self, frame: Triplets, save_vectors: bool) -> None:
        super().__init__()
        self.U, self.S, self.V = (nn.Parameter(p, requires_grad=False) for p in (frame.U, frame.S, frame.V))
        self.unsaved = frozenset() if save_vectors else frozenset({"U", "V"})

    def derive(self, weight: Tensor, saved: dict[str, Tensor], layer: str) -> dict[str, Tensor]:
        """U and V of the base weight; a warning where they may not be those of the training."""
        frame, gap = leading(weight, len(saved["S"]))
        changed = float((frame.S.cpu() - saved["S"].cpu().float()).abs().max())
        if gap <= max(_SAFE_GAP * changed, _unsafe_gap(frame)):
            warnings.warn(
                f"layer '{layer}': its saved values may belong to other singular vectors than this base has: singular "
                f"values lie {gap:.1e} apart and differ from the saved ones by {changed:.1e}. Load the base in the "
                "precision of the training, or train with save_vectors=True",
                stacklevel=2,
            )
        return {"U": frame.U, "V": frame.V}


def frame_of(weight: Tensor, count: int, save_vectors: bool) -> Triplets:
    """The first `count` triplets; a warning where they are not unique and will not be saved."""
    frame, gap = leading(weight, count)
    if not save_vectors and gap <= _unsafe_gap(frame):
        warnings.warn(
            f"a weight {list(weight.shape)} has singular values only {gap:.1e} apart, so that single vectors are not "
            "unique and another machine may load others; set save_vectors=True to save them",
            stacklevel=2,
        )
    return frame


def empty_frame(shape: tuple[int, int], count: int) -> Triplets:
    """Triplets of these shapes, zeros."""
    return Triplets(torch.zeros(shape[0], count), torch.zeros(count), torch.zeros(shape[1], count))


def leading(weight: Tensor, count: int) -> tuple[Triplets, float]:
    """The first `count` triplets, float32, and the least gap between one of their values and its neighbours."""
    # one more than asked for, for the last gap; the same call at the start and at loading, so that bits agree
    found = top(weight, min(count + 1, min(weight.shape)))
    gaps = -found.S.diff()
    gap = float(gaps.min()) if len(gaps) else float("inf")
    return Triplets(found.U[:, :count].contiguous(), found.S[:count].clone(), found.V[:, :count].contiguous()), gap


def _unsafe_gap(frame: Triplets) -> float:
    return _ROUNDINGS * torch.finfo(torch.float32).eps * float(frame.S[0])
