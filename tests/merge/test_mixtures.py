"""Data mixtures: quotas, rewards and agreement by hand."""

from __future__ import annotations

import pytest
import torch

from folklora.merge.mixtures import by_agreement, by_quota, by_reward


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_quotas_are_met_without_repeats():
    axis = torch.tensor([0] * 10 + [1] * 4 + [2] * 6)
    rows = by_quota(axis, generator=generator())
    assert torch.bincount(axis[rows]).tolist() == [4, 4, 4]
    assert len(rows.unique()) == 12
    assert rows.tolist() == sorted(rows.tolist())
    rows = by_quota(axis, [10, 0, 3], generator=generator())
    assert torch.bincount(axis[rows], minlength=3).tolist() == [10, 0, 3]
    assert not torch.equal(rows, by_quota(axis, [10, 0, 3], generator=generator(1)))
    with pytest.raises(ValueError, match=r"have \[10, 4, 6\] examples, which does not allow quotas of \[1, 5, 1\]"):
        by_quota(axis, [1, 5, 1], generator=generator())


def test_rewards_choose_the_best_that_pass_on_every_axis():
    scores = torch.tensor([[1.0, 1.0], [9.0, -1.0], [2.0, 2.0], [0.0, 5.0], [2.0, 2.0]])
    assert by_reward(scores, 0.4, weight=[1.0, 1.0]).tolist() == [1, 3]
    assert by_reward(scores, 0.4, weight=[1.0, 1.0], floor=0.5).tolist() == [2, 4]
    assert by_reward(scores, 0.2, weight=[1.0, 1.0], floor=0.5).tolist() == [2]
    assert by_reward(scores, 1.0, weight=[1.0, 0.0], floor=0.5).tolist() == [0, 2, 4]
    assert by_reward(scores, 0.2, weight=[0.0, 1.0]).tolist() == [3]
    with pytest.raises(ValueError, match="2 axes, but 1 weights"):
        by_reward(scores, 0.2, weight=[1.0])
    with pytest.raises(ValueError, match="fraction is 2"):
        by_reward(scores, 2.0, weight=[1.0, 1.0])


def test_examples_on_which_axes_disagree_are_left_out():
    margins = torch.tensor([[1.0, 0.0, 2.0], [1.0, -0.1, 2.0], [-1.0, -1.0, 3.0]])
    assert by_agreement(margins).tolist() == [0]
    assert by_agreement(margins, conflicts=1).tolist() == [0, 1]
