"""Where prompts stand among padded rows, position by position."""

from __future__ import annotations

import torch

from folklora.prompts.places import extended_mask, extended_positions, extended_rows, first_real, places, tokens

# left padding, none, right padding, a hole, padding alone
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]])
STARTS = [2, 0, 0, 1, 0]


def by_hand(rows: list[list], prompts: list[list], at: list[int] = STARTS) -> list[list]:
    return [[*row[:s], *prompt, *row[s:]] for row, prompt, s in zip(rows, prompts, at, strict=True)]


def test_a_prompt_stands_directly_before_the_first_real_token():
    rows = torch.arange(1, 21).view(5, 4)
    prompts = torch.tensor([[-1, -2, -3]] * 5) - torch.arange(5)[:, None] * 10
    at = first_real(MASK)
    assert at.tolist() == STARTS
    whole = torch.cat([prompts, rows], dim=1).gather(1, places(at, 3, 4))
    assert whole.tolist() == by_hand(rows.tolist(), prompts.tolist())
    embedded = extended_rows(rows[..., None].float(), prompts[..., None].float(), at)
    assert embedded[..., 0].tolist() == whole.tolist()
    assert extended_mask(MASK, 3).tolist() == by_hand(MASK.tolist(), [[1] * 3] * 5)
    unpadded = extended_rows(rows[..., None].float(), prompts[..., None].float(), None)
    assert unpadded[..., 0].tolist() == torch.cat([prompts, rows], dim=1).tolist()


def test_a_prompt_stands_before_any_token():
    rows, prompts, at = torch.arange(1, 21).view(5, 4), [[-1, -2, -3]] * 5, [3, 3, 1, 0, 2]
    order = places(torch.tensor(at), 3, 4)
    whole = torch.cat([torch.tensor(prompts), rows], dim=1).gather(1, order)
    assert whole.tolist() == by_hand(rows.tolist(), prompts, at)
    assert torch.equal(whole.gather(1, tokens(torch.tensor(at), 3, 4)), rows)
    assert extended_mask(MASK, 3, torch.tensor(at)).tolist() == by_hand(MASK.tolist(), [[1] * 3] * 5, at)


def test_position_numbers_count_on_through_the_prompt():
    positions = (MASK.cumsum(1) - 1).clamp(min=0)
    at = first_real(MASK)
    behind = positions + 3 * (torch.arange(4) >= at[:, None])
    found = extended_positions(positions, 3, at)
    assert found.tolist() == by_hand(behind.tolist(), [[0, 1, 2]] * 5)
    # three axes at once, as vision-language models have them, and one row for all
    stacked = extended_positions(torch.stack([positions, positions * 2, positions]), 3, at)
    assert torch.equal(stacked[0], found)
    doubled = positions * 2 + 3 * (torch.arange(4) >= at[:, None])
    assert stacked[1].tolist() == by_hand(doubled.tolist(), [[0, 1, 2]] * 5)
    one = extended_positions(torch.arange(4)[None], 3, torch.tensor([0, 3]))
    assert one.tolist() == [list(range(7))] * 2
    assert extended_positions(torch.arange(4), 3, None).tolist() == list(range(7))
