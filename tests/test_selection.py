"""Choosing examples: shares, clusters, redundancy, entropy, sampling, projection, each against its definition."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from folklora.selection import (
    coverage_sample,
    deduplicate,
    hull_distance,
    kmeans,
    near_and_diverse,
    nearness,
    random_projection,
    random_sample,
    redundancy,
    score_entropy,
    shannon,
    sharpest,
    water_filling,
    zero_order_gradient,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blobs(counts: list[int], width: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows around far-away centres in a random order, and the number of each row's centre."""
    draw = seeded(seed)
    truth = torch.cat([torch.full((count,), i) for i, count in enumerate(counts)])
    truth = truth[torch.randperm(len(truth), generator=draw)]
    return 20 * torch.eye(len(counts), width)[truth] + torch.randn(len(truth), width, generator=draw), truth


def same_partition(labels: Tensor, truth: Tensor) -> bool:
    pairs = set(zip(labels.tolist(), truth.tolist(), strict=True))
    return len(pairs) == len(truth.unique()) == len(labels.unique())


@pytest.mark.parametrize("seed", range(30))
def test_shares_fill_like_water(seed: int):
    draw = random.Random(seed)
    sizes = [draw.randrange(0, 30) for _ in range(draw.randrange(1, 9))]
    total = draw.randrange(0, 120)
    shares = water_filling(sizes, total)
    assert sum(shares) == min(total, sum(sizes))
    assert all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))
    # a group with less than another, by more than the remainder's one, has given all
    for (a, size), (b, _) in itertools.permutations(zip(shares, sizes, strict=True), 2):
        assert a >= b - 1 or a == size


def test_equal_groups_get_equal_shares_and_small_ones_all():
    assert water_filling([10, 10, 10], 21) == [7, 7, 7]
    assert sorted(water_filling([10, 10, 10], 20)) == [6, 7, 7]
    assert water_filling([2, 50, 3, 50], 45) == [2, 20, 3, 20]
    assert water_filling([], 5) == []


@pytest.mark.parametrize("batch", [10_240, 16])
def test_clusters_far_apart_are_found(batch: int):
    vectors, truth = blobs([30, 8, 50, 12])
    assert same_partition(kmeans(vectors, 4, seeded(), batch), truth)


def test_clusters_are_lloyd_s_where_a_batch_holds_all():
    vectors = torch.randn(200, 5, generator=seeded(3))
    labels = kmeans(vectors, 7, seeded(1))
    centres = torch.stack([vectors[labels == label].mean(0) for label in range(7)])
    # a fixed point: the nearest mean of each row is that of its own cluster
    assert torch.equal(torch.cdist(vectors, centres).argmin(1), labels)
    # and far below the spread about the common mean
    within = (vectors - centres[labels]).square().sum()
    assert within < 0.8 * (vectors - vectors.mean(0)).square().sum()


def test_clusters_are_fewer_where_rows_are_and_refused_below_one():
    rows = torch.eye(3).repeat(4, 1)
    assert same_partition(kmeans(rows, 9, seeded()), torch.arange(3).repeat(4))
    assert len(kmeans(torch.zeros(0, 3), 4, seeded())) == 0
    with pytest.raises(ValueError, match="at least 1, not 0 and 10240"):
        kmeans(rows, 0, seeded())


@pytest.mark.parametrize("n", [1, 40, 1100])
def test_redundancy_is_the_largest_cosine_with_an_earlier_row(n: int):
    vectors = torch.randn(n, 8, generator=seeded(n))
    alike = F.cosine_similarity(vectors[:, None], vectors[None], dim=2).double()
    expected = alike.masked_fill(torch.ones(n, n).triu().bool(), -1.0).amax(1)
    torch.testing.assert_close(redundancy(vectors).double(), expected, rtol=0, atol=1e-5)


def test_one_of_each_group_of_duplicates_is_kept():
    distinct = torch.randn(20, 32, generator=seeded(1))
    number = torch.tensor([*range(20), *[i % 20 for i in range(0, 60, 3)], *range(10)])
    order = torch.randperm(len(number), generator=seeded(2))
    number = number[order]
    kept = deduplicate(3 * distinct[number], 20)
    assert sorted(number[kept].tolist()) == list(range(20))
    first = [int((number == i).nonzero()[0]) for i in range(20)]
    assert kept.tolist() == sorted(first), "the later of two equal ones goes"
    assert deduplicate(distinct, 50).tolist() == list(range(20))


def test_the_entropy_of_counts():
    assert shannon(torch.full((50,), 3)) == pytest.approx(math.log2(50))
    assert shannon(torch.tensor([0, 7, 0])) == 0
    assert shannon(torch.zeros(4)) == 0
    assert shannon(torch.tensor([1, 1, 2])) == pytest.approx(1.5)


def test_the_entropy_of_scores():
    # standardised, evenly spread scores reach from -√3 to √3 of the 8 that the bins cover
    even = torch.linspace(5, 6, 100_001)
    assert score_entropy(even) == pytest.approx(math.log2(2 * math.sqrt(3) / 8 * 50), abs=0.05)
    normal = torch.randn(100_000, generator=seeded()).double()
    expected = math.log2(math.sqrt(2 * math.pi * math.e) * 50 / 8)
    assert score_entropy(normal) == pytest.approx(expected, abs=0.01)
    # neither scale nor place matters, which is where the published code differs
    assert score_entropy(1e-3 * normal + 7) == pytest.approx(score_entropy(normal), abs=1e-3)
    for constant in (torch.full((9,), 0.1), torch.zeros(5), torch.tensor([3.0])):
        assert score_entropy(constant) == 0


def test_the_selector_is_the_one_of_largest_entropy():
    n = 400
    two_values = torch.arange(n).remainder(2).double()
    outlier = torch.zeros(n).double().index_fill(0, torch.tensor([0]), 1.0)
    scores = {"outlier": outlier, "even": torch.linspace(0, 1, n).double(), "two": two_values}
    assert sharpest(scores) == "even"
    assert sharpest({name: scores[name] for name in ("outlier", "two")}) == "two"
    assert sharpest({"flat": torch.zeros(n), "other": torch.ones(n)}) == "flat", "the first of equals"
    holed = scores["even"].clone()
    holed[3] = torch.nan
    assert sharpest({"holed": holed, "two": two_values}) == "two"
    with pytest.raises(ValueError, match="none of the scores holed is defined"):
        sharpest({"holed": holed})


@pytest.mark.parametrize(("n", "count"), [(1000, 200), (1000, 880), (97, 30), (1000, 7)])
def test_coverage_is_even_over_the_range_of_scores(n: int, count: int):
    # few high ones: drawing at random would hardly see them
    scores = torch.randn(n, generator=seeded(4)).exp()
    drawn = coverage_sample(scores, count, seeded())
    assert len(drawn) == count == len(drawn.unique())
    low, high = scores.sort().values[int(0.05 * n)], scores.sort().values[n - 1 - int(0.05 * n)]
    assert scores[drawn].min() >= low
    assert scores[drawn].max() <= high
    inside = scores[(scores >= low) & (scores <= high)]

    def per_bin(values: Tensor) -> list[int]:
        return torch.histc(values, 50, float(low), float(high)).int().tolist()

    taken, there = per_bin(scores[drawn]), per_bin(inside)
    level = max(taken)
    assert all(a >= level - 1 or a == b for a, b in zip(taken, there, strict=True))


def test_coverage_gives_all_that_is_asked_whatever_the_scores():
    flat = torch.ones(40)
    assert len(coverage_sample(flat, 15, seeded()).unique()) == 15
    scores = torch.arange(20.0)
    # 5 % at either end is one; where nineteen of twenty are wanted there is no room to leave both out
    assert len(coverage_sample(scores, 19, seeded())) == 19
    assert coverage_sample(scores, 18, seeded()).tolist() == list(range(1, 19))
    assert coverage_sample(scores, 99, seeded()).tolist() == list(range(20))
    assert coverage_sample(scores, 0, seeded()).tolist() == []
    assert coverage_sample(torch.zeros(0), 4, seeded()).tolist() == []


def test_random_samples_have_no_repeats():
    drawn = random_sample(torch.zeros(30), 20, seeded())
    assert len(drawn.unique()) == 20
    assert len(random_sample(torch.zeros(30), 99, seeded())) == 30


def test_the_same_seed_gives_the_same():
    vectors, _ = blobs([30, 8, 50, 12], seed=5)
    scores = vectors[:, 0]
    for draw in (lambda g: kmeans(vectors, 6, g, 16), lambda g: coverage_sample(scores, 20, g)):
        assert torch.equal(draw(seeded(1)), draw(seeded(1)))
        assert not torch.equal(draw(seeded(1)), draw(seeded(2)))
    assert torch.equal(random_projection(vectors, 9, 3), random_projection(vectors, 9, 3))
    assert not torch.equal(random_projection(vectors, 9, 3), random_projection(vectors, 9, 4))


def test_projections_keep_norms_in_expectation():
    vectors = F.normalize(torch.randn(6, 1200, generator=seeded(1)), dim=1)
    width, seeds = 128, 60
    norms = torch.stack([random_projection(vectors, width, seed).square().sum(1) for seed in range(seeds)])
    spread = math.sqrt(2 / width)
    # the mean of 360 within four of its standard deviations, and single ones spread as they should
    assert norms.mean().item() == pytest.approx(1, abs=4 * spread / math.sqrt(norms.numel()))
    assert norms.std().item() == pytest.approx(spread, rel=0.2)
    # R is of signs: a unit vector's projection shows a row of it
    row = random_projection(torch.eye(1, 700), 64, 0) * 8
    assert torch.equal(row.abs(), torch.ones(1, 64))


def test_a_gradient_from_losses_alone():
    slope = torch.linspace(-1, 1, 6, dtype=torch.float64)
    parameters = [torch.full((2, 2), 0.3, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)]
    before = [parameter.clone() for parameter in parameters]

    def loss() -> Tensor:
        return slope @ torch.cat([parameter.flatten() for parameter in parameters])

    probes = 5_000
    found = zero_order_gradient(loss, parameters, seeded(), probes=probes)
    assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))
    error = torch.cat([part.flatten() for part in found]) - slope
    # relative squared error (d + 1) / probes in expectation; four times that is out of reach by chance
    assert error.square().sum() < 4 * 7 / probes * slope.square().sum()
    single = torch.cat([part.flatten() for part in zero_order_gradient(loss, parameters, seeded(1))])
    assert (single - slope).norm() > 0.1 * slope.norm(), "one direction is no gradient"
    two = zero_order_gradient(lambda: torch.stack([loss(), 3 * loss()]), parameters, seeded(1))
    found = torch.cat([part.flatten(1) for part in two], dim=1)
    torch.testing.assert_close(found, torch.stack([single, 3 * single]))


def brute_force(pool: Tensor, shots: Tensor, count: int, threshold: float) -> list[int]:
    """Algorithm 2 of Rocket, pair by pair."""
    score = [max(float(F.cosine_similarity(x, s, dim=0)) for s in shots) for x in pool]
    nearest = sorted(range(len(pool)), key=lambda i: -score[i])[:count]
    dropped = {
        min(i, j, key=lambda k: score[k])
        for i, j in itertools.combinations(nearest, 2)
        if float(F.cosine_similarity(pool[i], pool[j], dim=0)) > threshold
    }
    return [i for i in nearest if i not in dropped]


@pytest.mark.parametrize("threshold", [0.5, 0.8, 1.0])
def test_near_rows_without_repetitions_are_those_of_the_algorithm(threshold: float):
    pool, _ = blobs([12, 9, 15], width=4)
    shots = torch.randn(3, 4, generator=seeded(5))
    found = near_and_diverse(pool, shots, 20, threshold=threshold)
    assert found.tolist() == brute_force(pool, shots, 20, threshold)
    assert len(found) == 20 or threshold < 1


@pytest.mark.parametrize("scorer", ["max-cosine", "centroid", "hull"])
def test_near_rows_do_not_depend_on_the_order_of_the_pool_and_differ(scorer: str):
    pool, shots = torch.randn(80, 5, generator=seeded(1)), torch.randn(4, 5, generator=seeded(2))
    pool = torch.cat([pool, 3 * pool[:10]])
    order = torch.randperm(len(pool), generator=seeded(3))
    options = {"scorer": scorer, "threshold": 0.85}
    found = F.normalize(pool, dim=1)[near_and_diverse(pool, shots, 40, **options)]
    again = F.normalize(pool[order], dim=1)[near_and_diverse(pool[order], shots, 40, **options)]
    torch.testing.assert_close(again, found, rtol=0, atol=1e-6)
    assert 0 < len(found) <= 40
    # a cosine of five products of float32 numbers below 1
    assert (found @ found.mT).triu(1).max() <= 0.85 + 1e-6


@pytest.mark.parametrize("scorer", ["max-cosine", "centroid", "hull"])
def test_what_is_looked_for_is_nearest(scorer: str):
    shots = F.normalize(torch.randn(3, 6, generator=seeded(4)), dim=1)
    sought = shots[:1] if scorer == "max-cosine" else shots.mean(0, keepdim=True)
    pool = torch.cat([torch.randn(30, 6, generator=seeded(5)), sought])
    assert int(near_and_diverse(pool, shots, 5, scorer=scorer)[0]) == 30


def test_distance_to_a_hull_is_that_of_plane_geometry():
    square = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    points = torch.tensor([[0.3, 0.6], [1.0, 1.0], [3.0, 0.5], [4.0, 5.0], [-2.0, -1.0]], dtype=torch.float64)
    expected = torch.tensor([0.0, 0.0, 2.0, 5.0, 5.0**0.5], dtype=torch.float64)
    # the objective's error after 300 steps: 2 * 3 / 300**2, of a squared distance twice that
    torch.testing.assert_close(hull_distance(points, square).square(), expected.square(), rtol=0, atol=2e-4)
    assert torch.equal(nearness(points, square, "hull"), -hull_distance(points, square))


def test_rows_are_drawn_in_proportion_to_their_density():
    shots, pool = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    h = 1.0
    expected = torch.tensor([1.0, math.exp(-1), math.exp(-2)])
    torch.testing.assert_close(nearness(pool, shots, "density", h).exp(), expected)
    generator, times = seeded(), 2000
    options = {"scorer": "density", "bandwidth": h, "generator": generator}
    first = torch.cat([near_and_diverse(pool, shots, 1, **options) for _ in range(times)]).bincount(minlength=3)
    share = expected / expected.sum()
    # four standard deviations of a share of 2,000 draws
    assert ((first / times - share).abs() < 4 * (share * (1 - share) / times).sqrt()).all()


def test_nearness_refuses_what_it_does_not_know():
    x = torch.eye(2)
    with pytest.raises(ValueError, match="one of max-cosine, centroid, hull, density, not 'l1'"):
        nearness(x, x, "l1")
    with pytest.raises(ValueError, match="bandwidth must be above 0"):
        nearness(x, x, "density", 0.0)
    with pytest.raises(ValueError, match="give a generator"):
        near_and_diverse(x, x, 1, scorer="density")
