"""Twin-Merging's split, of tensors and of adapters' factors; and the routers that weigh what it gives."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call

from folklora.factored import Factors
from folklora.merge import average, factors, task_arithmetic, ties, twin_merging
from folklora.merge.routers import Router, fit_router
from folklora.merge.twin_merging import MERGES
from folklora.tiny import TwoLayers

# a few roundings of entries near 1 in float32
CLOSE = {"rtol": 0, "atol": 1e-6}


@pytest.fixture
def three(normal, around):
    base = normal(12, 8)
    return base, around(base, 3)


@pytest.mark.parametrize("shared", MERGES)
def test_with_all_ranks_each_task_is_its_model_whatever_is_shared(three, shared):
    base, models = three
    merged = twin_merging(models, base, shared=shared, mask_rate=0.0)
    for task, model in enumerate(models):
        torch.testing.assert_close(merged.for_task(task), model, **CLOSE)
    torch.testing.assert_close(merged.base + sum(map(merged.delta, range(3))) / 3, average(models), **CLOSE)


def test_the_shared_model_is_the_named_merge(three):
    base, models = three
    assert torch.equal(twin_merging(models, base).base, task_arithmetic(models, base, lambda_=0.3))
    assert torch.equal(twin_merging(models, base, lambda_=0.7).base, task_arithmetic(models, base, lambda_=0.7))
    assert torch.equal(twin_merging(models, base, shared="ties").base, ties(models, base))


def test_without_directions_each_task_is_the_shared_model(three):
    base, models = three
    for options in ({"mask_rate": 1.0}, {"rank": 0}):
        merged = twin_merging(models, base, **options)
        assert all(torch.equal(merged.for_task(task), merged.base) for task in range(3))


def test_one_model_taken_whole_leaves_nothing_beyond(three):
    base, models = three
    merged = twin_merging(models[:1], base, lambda_=1.0, mask_rate=0.0)
    # base + (model - base) is the model to a rounding
    torch.testing.assert_close(merged.base, models[0], **CLOSE)
    torch.testing.assert_close(merged.delta(0), torch.zeros(12, 8), **CLOSE)


@pytest.mark.parametrize(("options", "kept"), [({"mask_rate": 0.5}, 4), ({"mask_rate": 0.9}, 0), ({"rank": 99}, 8)])
def test_what_is_kept_is_the_best_of_its_rank(three, options, kept):
    base, models = (three[0].double(), [model.double() for model in three[1]])
    merged = twin_merging(models, base, **options)
    assert merged.S.shape == (3, kept)
    for task, model in enumerate(models):
        change = model - merged.base
        left = torch.linalg.svdvals(change)[kept:].square().sum()
        torch.testing.assert_close((change - merged.delta(task)).square().sum(), left, rtol=1e-9, atol=1e-12)


def test_a_tenth_of_ten_directions_is_one(normal, around):
    base = normal(10, 10)
    assert twin_merging(around(base, 2), base).S.shape == (2, 1)


def test_what_is_no_matrix_is_not_compressed(normal, around):
    base = normal(7)
    models = around(base, 2)
    merged = twin_merging(models, base, mask_rate=1.0)
    assert torch.equal(merged.delta(1), models[1] - merged.base)


def test_factors_by_row_are_the_assembled_weight(normal):
    network = TwoLayers()
    base = {name: value.detach() for name, value in network.named_parameters()}
    models = [{k: v + 0.1 * normal(*v.shape, seed=t) for k, v in base.items()} for t in range(3)]
    split = {k: twin_merging([model[k] for model in models], v, rank=3) for k, v in base.items()}
    x, gates = normal(4, 32), normal(4, 3).softmax(-1)

    def layer(name, x):
        weight, bias = split[f"{name}.weight"], split[f"{name}.bias"].base
        y = x @ weight.base.T + bias
        for task in range(3):
            part = weight.factors(task)
            y = y + (gates[:, [task]] * part.s * (x @ part.A.T)) @ part.B.T
        return y

    found = layer("v", torch.tanh(layer("q", x)))
    for row, gate in enumerate(gates):
        whole = {
            k: p.base + (sum(g * p.delta(t) for t, g in enumerate(gate)) if "weight" in k else 0)
            for k, p in split.items()
        }
        torch.testing.assert_close(found[row], functional_call(network, whole, (x[row],)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shared", factors.MERGES)
@pytest.mark.parametrize("rank", [2, 50])
def test_adapters_are_split_as_their_dense_updates_are(normal, shared, rank):
    parts = [Factors(normal(r, 30, seed=r), 0.5, normal(40, r, seed=9 + r)) for r in (3, 4)]
    # an adapter that is not on this layer
    parts.append(Factors(parts[0].A[:0], 1.0, parts[0].B[:, :0]))
    parts = [Factors(part.A.double(), part.s, part.B.double()) for part in parts]
    merged, beyond = factors.twin_merging(parts, shared=shared, rank=rank)
    base = torch.zeros(40, 30, dtype=torch.float64)
    expected = twin_merging([part.dense() for part in parts], base, shared=shared, rank=rank)
    torch.testing.assert_close(merged.dense(), expected.base, rtol=0, atol=1e-9)
    for task, (part, own) in enumerate(zip(parts, beyond, strict=True)):
        assert own.rank == min(rank, 7)
        if rank == 50:
            torch.testing.assert_close(own.dense(), expected.delta(task), rtol=0, atol=1e-9)
        # Iso-C's singular values are equal, so that of a lower rank there are several best
        left = [part.dense() - expected.base - kept for kept in (own.dense(), expected.delta(task))]
        torch.testing.assert_close(left[0].norm(), left[1].norm(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda b, m: twin_merging(m, b, mask_rate=1.5), "mask_rate must lie between 0 and 1, not 1.5"),
        (lambda b, m: twin_merging(m, b, rank=-1), "rank must be at least 0"),
        (lambda b, m: twin_merging(m, b, shared="average", lambda_=0.3), "'average' has no scale"),
        (lambda b, m: factors.twin_merging([Factors(b, 1.0, b.T)], shared="ties"), "as factors by .*, not by 'ties'"),
        (lambda b, m: factors.twin_merging([Factors(b, 1.0, b.T)], rank=0), "the rank must be at least 1"),
        (lambda b, m: Router("forest", 4, 2), "a router is mlp, linear, nearest, not 'forest'"),
        (lambda b, m: fit_router(Router("mlp", 8, 2), b, torch.zeros(12).long()), "task 1 has 0"),
        (lambda b, m: fit_router(Router("mlp", 8, 2), b, torch.zeros(12).long(), epochs=0), "epochs >= 1"),
    ],
)
def test_what_cannot_be_is_refused(three, call, expected):
    with pytest.raises(ValueError, match=expected):
        call(*three)


@pytest.fixture
def clusters(normal):
    """Features of three tasks around different points, and their tasks."""
    labels = torch.arange(90) % 3
    return 4 * normal(3, 16, seed=3)[labels] + normal(90, 16), labels


@pytest.mark.parametrize("kind", ["mlp", "linear", "nearest"])
def test_a_router_tells_tasks_apart_and_reads_rows_by_themselves(clusters, kind):
    features, labels = clusters
    before = torch.get_rng_state()
    routers = [Router(kind, 16, 3) for _ in range(2)]
    torch.set_rng_state(before)
    found = [fit_router(router, features, labels, learning_rate=1e-2, batch_size=16, epochs=20) for router in routers]
    assert torch.equal(torch.get_rng_state(), before)
    assert found == [1.0, 1.0]
    assert routers[0].accuracy(features, labels) == 1.0
    weights = routers[0].weights(features)
    assert torch.equal(weights, routers[1].weights(features))
    torch.testing.assert_close(weights.sum(-1), torch.ones(90), **CLOSE)
    torch.testing.assert_close(routers[0].train().weights(features[4:5]), weights[4:5], **CLOSE)
    assert not any(parameter.requires_grad for parameter in routers[0].parameters())


def test_the_nearest_mean_takes_all_and_is_the_mean(clusters):
    features, labels = clusters
    router = Router("nearest", 16, 3)
    assert fit_router(router, features, labels, held_out=0.0) is None
    torch.testing.assert_close(router.means[1], features[labels == 1].mean(0), **CLOSE)
    assert set(router.weights(features).flatten().tolist()) == {0.0, 1.0}
