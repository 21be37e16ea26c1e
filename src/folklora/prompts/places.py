"""Where soft prompts stand among the positions of a batch. Functions of tensors.

A prompt stands directly before a row's first real token, behind padding on the left, so that it is to the model what
tokens before the text would be:

    [pad pad x₁ x₂]  becomes  [pad pad P₁ P₂ x₁ x₂],   [x₁ x₂ pad pad]  becomes  [P₁ P₂ x₁ x₂ pad pad]
"""

from __future__ import annotations

import torch
from torch import Tensor


def places(mask: Tensor, length: int) -> Tensor:
    """Which position of [prompt, row] each position of a row with its prompt comes from, [rows, length + positions].

    Args:
        mask: [rows, positions], not 0 for real tokens.
        length: Positions of the prompt.
    """
    # 0 for a row of padding alone
    start = mask.ne(0).int().argmax(dim=1, keepdim=True)
    here = torch.arange(length + mask.shape[1], device=mask.device)
    pad_or_prompt = torch.where(here < start, here + length, here - start)
    return torch.where(here < start + length, pad_or_prompt, here)


def extended_mask(mask: Tensor, length: int) -> Tensor:
    """The mask of rows with their prompts, [rows, length + positions]."""
    ones = mask.new_ones(len(mask), length)
    return torch.cat([ones, mask], dim=1).gather(1, places(mask, length))


def extended_rows(rows: Tensor, prompts: Tensor, mask: Tensor | None) -> Tensor:
    """Embedded rows [rows, positions, width] with their prompts [rows, length, width] in place."""
    whole = torch.cat([prompts, rows], dim=1)
    if mask is None:
        return whole
    order = places(mask, prompts.shape[1]).to(whole.device)
    return whole.gather(1, order.unsqueeze(-1).expand_as(whole))


def extended_positions(positions: Tensor, length: int, mask: Tensor | None) -> Tensor:
    """Position numbers [..., rows, positions] of rows with their prompts: 0 to length - 1, then those given on top."""
    first = torch.arange(length, device=positions.device).expand(*positions.shape[:-1], length)
    whole = torch.cat([first, positions + length], dim=-1)
    if mask is None:
        return whole
    order = places(mask, length).to(whole.device)
    whole = whole.expand(*whole.shape[:-2], *order.shape)
    return whole.gather(-1, order.expand_as(whole))
