"""Boolean masks, eight entries a byte."""

from __future__ import annotations

import torch
from torch import Tensor

_PLACES = 2 ** torch.arange(8, dtype=torch.uint8)


def pack(mask: Tensor) -> Tensor:
    """A boolean tensor as bytes, uint8 of one dimension; the first entry is the lowest bit of the first byte."""
    flat = mask.flatten().to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    return (flat * _PLACES.to(flat.device)).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, shape: torch.Size) -> Tensor:
    """The boolean tensor of that shape again."""
    flat = (packed.unsqueeze(1) & _PLACES.to(packed.device)) != 0
    return flat.flatten()[: shape.numel()].view(shape)
