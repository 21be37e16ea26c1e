"""TIES, DARE, DELLA, Breadcrumbs and SCE: against PEFT and by hand; what election keeps; the traps of SCE's mask."""

from __future__ import annotations

import pytest
import torch
from peft.utils import merge_utils

from folklora.merge import breadcrumbs, breadcrumbs_ties, dare_linear, dare_ties, della, sce, task_arithmetic, ties

# sums of a few terms of size 1 in another order
CLOSE = {"rtol": 0, "atol": 1e-6}


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def magnitude(change: torch.Tensor, density: float) -> torch.Tensor:
    """What TIES keeps of a task vector that is alone."""
    return ties([change], torch.zeros_like(change), density=[density])


@pytest.fixture
def tasks(normal, around):
    base = normal(30, 20)
    models = around(base, 4, scale=1.0)
    return base, models, [model - base for model in models]


@pytest.mark.parametrize("density", [0.2, 0.7, 0.999])
def test_ties_is_pefts_for_equal_weights(tasks, density):
    base, models, changes = tasks
    expected = merge_utils.ties(changes, torch.ones(4), density)
    torch.testing.assert_close(ties(models, base, density=[density]) - base, expected, **CLOSE)


def test_task_arithmetic_and_trimming_are_pefts(tasks):
    base, models, changes = tasks
    weights = [0.5, -1.0, 2.0, 0.1]
    expected = merge_utils.task_arithmetic(changes, torch.tensor(weights))
    torch.testing.assert_close(task_arithmetic(models, base, weight=weights) - base, expected, **CLOSE)
    trimmed = [base + magnitude(change, 0.3) for change in changes]
    expected = merge_utils.magnitude_prune(changes, torch.tensor(weights), 0.3)
    torch.testing.assert_close(task_arithmetic(trimmed, base, weight=weights) - base, expected, **CLOSE)


def test_dare_is_pefts_on_average(tasks):
    base, models, changes = tasks
    torch.manual_seed(0)
    count = 400
    ours = sum(dare_linear(models, base, generator=generators(4, 10 * i), density=[0.5]) for i in range(count)) / count
    theirs = sum(merge_utils.dare_linear(changes, torch.ones(4), 0.5) for _ in range(count)) / count
    # each is within its own standard error of the sum, whose variance is Σ τ²
    error = (2 * sum(change.square() for change in changes) / count).sqrt()
    assert ((ours - base - theirs).abs() <= 5 * error).all()


def _last_first(method, models, base, **options):
    """The same merge with the last of equal magnitudes in place of the first, as another sort would have it."""
    return method([model.flip(0, 1) for model in models], base.flip(0, 1), **options).flip(0, 1)


@pytest.mark.parametrize(
    ("method", "options", "ranks"),
    [
        (ties, {"density": [0.5]}, [0.5]),
        (breadcrumbs, {"density": [0.5], "gamma": [0.1]}, [0.1, 0.6]),
        (breadcrumbs_ties, {"density": [0.5], "gamma": [0.1]}, [0.1, 0.6]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_another_choice_among_equal_magnitudes_changes_the_entries_at_the_threshold_alone(
    method, options, ranks, dtype, normal
):
    base = (0.02 * normal(64, 96)).to(dtype)
    models = [(base + 0.002 * normal(64, 96, seed=1 + i).to(dtype)).float() for i in range(2)]
    base = base.float()
    differ = method(models, base, **options) != _last_first(method, models, base, **options)
    at_threshold = torch.zeros_like(differ)
    for magnitudes in ((model - base).abs() for model in models):
        order = magnitudes.flatten().sort(descending=True).values
        for rank in ranks:
            at_threshold |= magnitudes == order[int(rank * len(order)) - 1]
    assert not (differ & ~at_threshold).any()
    # where the checkpoints are bfloat16 it is the reason why two correct programs differ; in float32 nothing is equal
    assert bool(differ.any()) == (dtype == torch.bfloat16)


def test_ties_by_hand():
    base = torch.zeros(4)
    models = [torch.tensor([1.0, 0.1, 2.0, -1.0]), torch.tensor([3.0, 0.2, -1.0, -3.0])]
    assert ties(models, base, density=[0.75]).tolist() == [2.0, 0.0, 2.0, -2.0]
    assert ties(models, base, density=[0.75], weight=[3.0, 1.0]).tolist() == [1.5, 0.0, 2.0, -1.5]
    assert ties(models, base, normalize=False, lambda_=2.0)[2] == 4
    # +1 and -1 sum to 0: the positive one is elected
    assert ties([torch.ones(1), -torch.ones(1)], torch.zeros(1)).tolist() == [1.0]


@pytest.mark.parametrize("weights", [[1.0] * 4, [0.3, 2.0, -1.0, 0.5]])
def test_no_entry_has_the_sign_that_was_voted_down(tasks, weights):
    base, models, changes = tasks
    trimmed = [weight * magnitude(change, 0.5) for weight, change in zip(weights, changes, strict=True)]
    elected = sum(trimmed)
    for normalize in (True, False):
        change = ties(models, base, weight=weights, density=[0.5], normalize=normalize) - base
        assert (change * elected >= 0).all()


def test_where_signs_agree_ties_is_the_mean(normal):
    models = [normal(6, 5, seed=seed).abs() for seed in range(3)]
    torch.testing.assert_close(ties(models, torch.zeros(6, 5)), sum(models) / 3, **CLOSE)


def test_a_negative_weight_takes_a_task_away(tasks):
    base, models, changes = tasks
    torch.testing.assert_close(ties(models[:1], base, weight=[-1.0]), base - changes[0], **CLOSE)


@pytest.mark.parametrize("method", [dare_linear, dare_ties, della])
def test_a_random_mask_depends_on_its_generator_alone(tasks, method):
    base, models, _ = tasks
    zero = [base, base, base]

    def alone(models, seeds):
        source = [torch.Generator().manual_seed(seed) for seed in seeds]
        return method(models, base, generator=source, density=[0.5], normalize=False) - base

    first = alone([models[0], *zero], [7, 1, 2, 3])
    assert torch.equal(first, alone([*zero, models[0]], [4, 5, 6, 7]))
    assert not torch.equal(first, alone([models[0], *zero], [8, 1, 2, 3]))


def test_breadcrumbs_by_hand():
    assert breadcrumbs([torch.arange(10.0)], torch.zeros(10), density=[0.5], gamma=[0.1]).tolist() == [
        *[0.0] * 4,
        *[4.0, 5.0, 6.0, 7.0, 8.0],
        0.0,
    ]


def test_a_bias_survives_breadcrumbs(normal):
    bias = normal(64)
    kept = breadcrumbs([bias], torch.zeros(64), density=[0.9])
    assert int((kept != 0).sum()) == 57


def test_sce_by_hand():
    base = torch.zeros(4)
    models = [torch.tensor([1.0, 1.0, 0.0, 2.0]), torch.tensor([1.0, -3.0, 1.0, 2.0])]
    # mean squares 6/4 and 15/4; the second entry's sum is negative
    weights = torch.tensor([6 / 21, 15 / 21])
    expected = torch.tensor([1.0, -3.0, 1.0, 2.0])
    torch.testing.assert_close(sce(models, base), expected, **CLOSE)
    expected[0] = float(weights @ torch.tensor([3.0, 1.0]))
    changed = [torch.tensor([3.0, 1.0, 0.0, 2.0]), models[1]]
    weights = torch.tensor([14.0, 15.0]) / 29
    expected[0] = float(weights @ torch.tensor([3.0, 1.0]))
    torch.testing.assert_close(sce(changed, base), expected, **CLOSE)


@pytest.mark.parametrize("shape", [(5,), (4, 3), (2, 3, 4)])
@pytest.mark.parametrize("select", [0.0, -1.0, 1e-9, 0.4, 1.0, 2.0])
def test_sce_keeps_the_tensors_shape_whatever_it_selects(normal, around, shape, select):
    base = normal(*shape)
    result = sce(around(base, 3), base, select_topk=select)
    assert result.shape == base.shape
    if select <= 1e-9:
        assert torch.equal(result, base)


def test_sce_selects_its_share_of_what_varies(normal):
    base = torch.zeros(100)
    models = [normal(100), normal(100, seed=1)]
    for model in models:
        model[50:] = 1.0
    assert int((sce(models, base, select_topk=0.5) != 0).sum()) == 25


def test_sce_weighs_small_changes_as_it_weighs_large_ones(normal, around):
    base = torch.zeros(20, 10)
    models = [normal(20, 10), 3 * normal(20, 10, seed=1)]
    small = sce([1e-4 * model for model in models], base)
    torch.testing.assert_close(small * 1e4, sce(models, base), rtol=1e-4, atol=1e-6)
