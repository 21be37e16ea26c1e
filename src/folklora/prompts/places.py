"""Where soft prompts stand among the positions of a batch. Functions of tensors.

At the front a prompt stands directly before a row's first real token, behind padding on the left, so that it is to the
model what tokens before the text would be:

    [pad pad x₁ x₂]  becomes  [pad pad P₁ P₂ x₁ x₂],   [x₁ x₂ pad pad]  becomes  [P₁ P₂ x₁ x₂ pad pad]

Or it stands before another token, whose position in its row is `at`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def first_real(mask: Tensor) -> Tensor:
    """Position of each row's first real token, [rows]; 0 for a row of padding alone."""
    return mask.ne(0).int().argmax(dim=1)


def places(at: Tensor, length: int, positions: int) -> Tensor:
    """Which position of [prompt, row] each position of a row with its prompt comes from, [rows, length + positions].

    Args:
        at: [rows], the position in its row that each prompt stands before.
        length: Positions of the prompt.
        positions: Those of a row.
    """
    start = at.unsqueeze(1)
    here = torch.arange(length + positions, device=at.device)
    row_or_prompt = torch.where(here < start, here + length, here - start)
    return torch.where(here < start + length, row_or_prompt, here)


def tokens(at: Tensor, length: int, positions: int) -> Tensor:
    """Where each position of a row is once its prompt is in place, [rows, positions]; arguments as for `places`."""
    here = torch.arange(positions, device=at.device)
    return torch.where(here < at.unsqueeze(1), here, here + length)


def extended_mask(mask: Tensor, length: int, at: Tensor | None = None) -> Tensor:
    """The mask of rows with their prompts, [rows, length + positions].

    Args:
        mask: [rows, positions], not 0 for real tokens.
        length: Positions of the prompt.
        at: As for `places`; None where the prompts stand at the front.
    """
    ones = mask.new_ones(len(mask), length)
    at = first_real(mask) if at is None else at.to(mask.device)
    return torch.cat([ones, mask], dim=1).gather(1, places(at, length, mask.shape[1]))


def extended_rows(rows: Tensor, prompts: Tensor, at: Tensor | None) -> Tensor:
    """Embedded rows [rows, positions, width] with their prompts [rows, length, width], in front where `at` is None."""
    whole = torch.cat([prompts, rows], dim=1)
    if at is None:
        return whole
    order = places(at.to(whole.device), prompts.shape[1], rows.shape[1])
    return whole.gather(1, order.unsqueeze(-1).expand_as(whole))


def extended_positions(positions: Tensor, length: int, at: Tensor | None) -> Tensor:
    """Position numbers [..., rows, positions] of rows with their prompts, which go on from what stands before them.

    Args:
        positions: Those given; behind the prompts `length` comes on top.
        length: Positions of the prompt.
        at: As for `places`; None where the prompts stand at the start of rows without padding, and begin at 0.
    """
    first = torch.arange(length, device=positions.device)
    if at is None:
        return torch.cat([first.expand(*positions.shape[:-1], length), positions + length], dim=-1)
    positions = positions.expand(*positions.shape[:-2], len(at), positions.shape[-1])
    here = at.to(positions.device).unsqueeze(1).expand(*positions.shape[:-1], 1)
    behind = torch.arange(positions.shape[-1], device=positions.device) >= here
    whole = torch.cat([positions.gather(-1, here) + first, positions + length * behind], dim=-1)
    order = places(at.to(positions.device), length, positions.shape[-1])
    return whole.gather(-1, order.expand_as(whole))
