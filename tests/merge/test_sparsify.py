"""Sparsifiers: how many entries stay and which, with ties, tiny tensors and huge ones; what random masks average to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from folklora.merge import sparsify
from folklora.merge.blocks import Blocks
from folklora.merge.sparsify import Largest


def alone(sparsifier: Callable[..., Blocks]) -> Callable[..., Tensor]:
    """A sparsifier of one task vector."""

    def call(delta: Tensor, *options: Any) -> Tensor:
        own = [[option] if isinstance(option, (float, torch.Generator)) else option for option in options]
        return sparsifier(Blocks.of([delta]), *own).merged(lambda deltas, _: deltas[0]).whole()

    return call


magnitude, outliers, random, by_rank = map(
    alone, (sparsify.magnitude, sparsify.outliers, sparsify.random, sparsify.by_rank)
)


def largest(values: Tensor, count: int) -> Tensor:
    parts = Blocks.of([values])
    return parts.each_pass(Largest(parts, [count]).masks).merged(lambda masks, _: masks[0]).whole()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [0, 1, 37, 500, 1000])
def test_the_largest_are_those_of_a_sort(normal, count, dtype):
    values = normal(20, 50, dtype=dtype).abs()
    mask = largest(values, count)
    assert int(mask.sum()) == count
    expected = values.flatten().sort(descending=True).values[:count]
    assert torch.equal(values[mask].sort(descending=True).values, expected)


def test_of_equal_values_the_first_are_taken():
    values = torch.tensor([1.0, 2.0, 1.0, 1.0, 2.0, 0.0])
    assert largest(values, 3).tolist() == [True, True, False, False, True, False]
    # zeros are frequent in deltas of bfloat16 checkpoints; a threshold would keep all of them
    zeros = torch.zeros(100)
    zeros[7] = 1
    assert largest(zeros, 40).nonzero().flatten().tolist() == list(range(40))


def test_values_of_one_power_of_two_and_the_smallest_are_told_apart():
    values = 1 + torch.arange(1000) * 2.0**-23
    assert largest(values, 10).nonzero().flatten().tolist() == list(range(990, 1000))
    denormal = torch.tensor([0.0, 1e-45, 1e-40, 1e-38])
    assert largest(denormal, 2).tolist() == [False, False, True, True]


def test_a_tensor_above_two_to_the_24_entries_keeps_exactly_its_share():
    size = 2**24 + 5
    delta = torch.arange(size, dtype=torch.float32).remainder_(4099)
    kept = magnitude(delta, 0.25)
    assert int(torch.count_nonzero(kept)) == int(0.25 * size)
    dropped = delta - kept
    assert dropped.max() <= kept[kept > 0].min()


@pytest.mark.parametrize("size", [1, 3, 64, 1001])
@pytest.mark.parametrize("density", [0.0, 0.2, 0.9, 1.0])
def test_magnitude_keeps_exactly_its_share(normal, size, density):
    delta = normal(size)
    kept = magnitude(delta, density)
    assert int((kept != 0).sum()) == int(density * size)
    assert torch.equal(kept[kept != 0], delta[kept != 0])
    if density < 1:
        dropped = delta[kept == 0].abs()
        assert not len(dropped) or not (kept != 0).any() or dropped.max() <= kept[kept != 0].abs().min()


@pytest.mark.parametrize(("size", "density", "gamma"), [(1000, 0.85, 0.01), (1000, 0.1, 0.2), (200, 0.99, 0.005)])
def test_breadcrumbs_keep_exactly_their_share_and_no_outlier(normal, size, density, gamma):
    delta = normal(size)
    kept = outliers(delta, density, gamma)
    top = largest(delta.abs(), int(gamma * size))
    assert int((kept != 0).sum()) == int(density * size)
    assert not (kept[top] != 0).any()
    assert (delta.abs()[top].min() if top.any() else 9.0) >= kept.abs().max()


def test_a_tensor_too_small_for_an_outlier_keeps_its_share(normal):
    # where the slice of the outliers is empty, -0 as its end would keep nothing
    delta = normal(64)
    assert torch.equal(outliers(delta, 0.9, 0.01), magnitude(delta, 0.9))
    assert int((outliers(delta, 0.9, 0.01) != 0).sum()) == 57


def test_density_goes_before_outliers(normal):
    delta = normal(1000)
    assert int((outliers(delta, 0.995, 0.01) != 0).sum()) == 995
    # 5 entries are dropped, the largest ones
    assert not outliers(delta, 0.995, 0.01)[largest(delta.abs(), 5)].any()


def test_random_masks_average_to_the_tensor(normal):
    delta, count, density = normal(40), 4000, 0.3
    source = generator()
    mean = sum(random(delta, density, source, True, "expected") for _ in range(count)) / count
    deviation = delta.abs() * ((1 - density) / density / count) ** 0.5
    # 40 entries: all within 4 standard errors with probability 0.997 for a random seed, and this one is fixed
    assert ((mean - delta).abs() <= 4 * deviation).all()


def test_random_masks_keep_or_drop_and_rescale(normal):
    delta = normal(50, 40)
    kept = random(delta, 0.25, generator(), True, "expected")
    torch.testing.assert_close(kept[kept != 0], delta[kept != 0] * 4, rtol=1e-6, atol=0)
    plain = random(delta, 0.25, generator(), False, "expected")
    assert torch.equal(plain != 0, kept != 0)
    assert torch.equal(plain[plain != 0], delta[plain != 0])
    level = random(delta, 0.25, generator(), True, "l1")
    torch.testing.assert_close(level.abs().sum(), delta.abs().sum(), rtol=1e-5, atol=0)
    assert torch.equal(random(delta, 1.0, generator(), True, "expected"), delta)
    assert not random(delta, 0.0, generator(), True, "expected").any()
    assert not random(delta, 0.0, generator(), True, "l1").any()


@pytest.mark.parametrize("shape", [(30, 11), (3, 4, 5), (11,)])
def test_della_keeps_more_of_the_large_and_its_share_on_average(normal, shape):
    delta, count, density, epsilon = normal(*shape), 3000, 0.5, 0.3
    source, kept = generator(), torch.zeros(shape)
    for _ in range(count):
        kept += by_rank(delta, density, epsilon, source, False, "expected") != 0
    rows, rates = delta.abs().flatten(1) if delta.dim() > 1 else delta.abs()[None], (kept / count)
    rates = rates.flatten(1) if delta.dim() > 1 else rates[None]
    ranked = rates.gather(1, rows.argsort(1))
    n = rows.shape[1]
    expected = density - epsilon + 2 * epsilon * torch.arange(n) / (n - 1)
    # 5 standard errors of a rate, for 330 of them
    assert ((ranked - expected).abs() <= 5 * (0.25 / count) ** 0.5).all()
    assert abs(float(expected.mean()) - density) < 1e-6


def test_della_averages_to_the_tensor(normal):
    delta, count = normal(4, 10), 4000
    source = generator(3)
    mean = sum(by_rank(delta, 0.5, 0.3, source, True, "expected") for _ in range(count)) / count
    # the least probability is 0.2
    assert ((mean - delta).abs() <= 4 * delta.abs() * (0.8 / 0.2 / count) ** 0.5).all()


def test_della_of_a_row_of_one_entry_is_drawn_with_the_density():
    kept = sum(by_rank(torch.ones(1, 1), 0.5, 0.3, generator(seed), False, "l1") for seed in range(400)) / 400
    assert abs(float(kept) - 0.5) < 4 * (0.25 / 400) ** 0.5


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda x: magnitude(x, -0.1), "density is -0.1, but is a fraction"),
        (lambda x: outliers(x, 0.5, 1.5), "gamma is 1.5, but is a fraction"),
        (lambda x: by_rank(x, 0.9, 0.15, generator(), True, "l1"), "probabilities from 0.75 to 1.05"),
        (lambda x: by_rank(x, 0.1, 0.15, generator(), True, "l1"), "choose them so that both lie between 0 and 1"),
    ],
)
def test_fractions_that_cannot_be_are_refused(normal, call, expected):
    with pytest.raises(ValueError, match=expected):
        call(normal(4, 4))
