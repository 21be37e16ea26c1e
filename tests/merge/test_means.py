"""Averages and arcs, by closed forms: means, SLERP, NuSLERP, Karcher, Model Stock, NearSwap, RAM, Fisher, RegMean."""

from __future__ import annotations

import math

import pytest
import torch

from folklora.merge import average, fisher, karcher, model_stock, nearswap, nuslerp, passthrough, ram, regmean, slerp
from folklora.merge.deltas import gram

EXACT = {"rtol": 0, "atol": 1e-12}


def test_average_is_the_weighted_mean_or_sum(normal, around):
    models = around(normal(6, 5, dtype=torch.float64), 3, scale=1.0)
    weights = [2.0, 0.5, -1.0]
    total = sum(w * model for w, model in zip(weights, models, strict=True))
    torch.testing.assert_close(average(models, weight=weights), total / 1.5, **EXACT)
    torch.testing.assert_close(average(models, weight=weights, normalize=False), total, **EXACT)
    # equal copies have themselves as their mean, whatever the weights
    assert torch.equal(average([models[0]] * 2, weight=[0.1, 1.0]), models[0])


def test_weights_are_not_rounded_to_the_models_dtype():
    models = [torch.zeros(8).bfloat16(), torch.ones(8).bfloat16()]
    torch.testing.assert_close(average(models, weight=[0.999, 0.001]), torch.full((8,), 0.001), rtol=1e-6, atol=0)


def test_slerp_ends_at_its_ends_and_keeps_the_length(normal):
    a, b = normal(6, 5, dtype=torch.float64), normal(6, 5, seed=1, dtype=torch.float64)
    assert torch.equal(slerp([a, b], t=0.0), a)
    assert torch.equal(slerp([a, b], t=1.0), b)
    assert torch.equal(slerp([b], a, t=0.25), slerp([a, b], t=0.25))
    b = b * a.norm() / b.norm()
    for t in (0.1, 0.5, 0.9):
        point = slerp([a, b], t=t)
        torch.testing.assert_close(point.norm(), a.norm(), **EXACT)
        whole = torch.acos((a * b).sum() / a.norm() ** 2)
        part = torch.acos((a * point).sum() / a.norm() ** 2)
        torch.testing.assert_close(part, t * whole, rtol=1e-7, atol=0)
    assert torch.equal(slerp([a, 3 * a], t=0.5), a + 0.5 * (3 * a - a))
    assert torch.equal(slerp([a, 0 * a], t=0.5), 0.5 * a)


def test_slerps_length_lies_between_those_of_its_ends(normal):
    a, b = normal(40), 3 * normal(40, seed=1)
    lengths = [float(slerp([a, b], t=t).norm()) for t in torch.linspace(0, 1, 11).tolist()]
    assert all(lengths[0] - 1e-4 <= length <= lengths[-1] + 1e-4 for length in lengths)


def test_nuslerp_is_slerp_of_the_task_vectors(normal, around):
    base = normal(6, 5, dtype=torch.float64)
    models = around(base, 2)
    changes = [model - base for model in models]
    torch.testing.assert_close(nuslerp(models, base, weight=[1.0, 3.0]), base + slerp(changes, t=0.75), **EXACT)
    torch.testing.assert_close(nuslerp(models, weight=[1.0, -1.0]), nuslerp(models), **EXACT)
    rows = nuslerp(models, base, nuslerp_flatten=False)
    expected = torch.stack([slerp([changes[0][i], changes[1][i]], t=0.5) for i in range(6)])
    torch.testing.assert_close(rows - base, expected, **EXACT)
    columns = nuslerp(models, base, nuslerp_flatten=False, nuslerp_row_wise=True)
    expected = torch.stack([slerp([changes[0][:, j], changes[1][:, j]], t=0.5) for j in range(5)], 1)
    torch.testing.assert_close(columns - base, expected, **EXACT)


def test_a_row_that_one_model_left_alone_is_interpolated_straight(normal, around):
    base = normal(3, 4)
    models = around(base, 2)
    models[0][1] = base[1]
    result = nuslerp(models, base, nuslerp_flatten=False)
    torch.testing.assert_close(result[1], (base[1] + models[1][1]) / 2, rtol=0, atol=1e-6)
    assert torch.isfinite(result).all()


def test_karcher_of_two_is_slerp(normal):
    a, b = normal(6, 5, dtype=torch.float64), normal(6, 5, seed=1, dtype=torch.float64)
    b = b * a.norm() / b.norm()
    torch.testing.assert_close(karcher([a, b], tol=1e-12), slerp([a, b], t=0.5), **EXACT)
    result = karcher([a, b], weight=[1.0, 3.0], tol=1e-14, max_iter=200)
    torch.testing.assert_close(result, slerp([a, b], t=0.75), rtol=0, atol=1e-7)


def test_karchers_point_has_no_pull_left_and_the_mean_length(normal):
    models = [(1 + i) * normal(50, seed=i, dtype=torch.float64) for i in range(4)]
    result = karcher(models, tol=1e-13, max_iter=100)
    u = result / result.norm()
    pull = torch.zeros_like(u)
    for model in models:
        v = model / model.norm()
        angle = torch.acos(u @ v)
        pull += angle / angle.sin() * (v - (u @ v) * u)
    assert pull.norm() < 1e-10
    torch.testing.assert_close(result.norm(), sum(model.norm() for model in models) / 4, **EXACT)


def test_karcher_passes_over_what_is_zero(normal):
    a = normal(10)
    torch.testing.assert_close(karcher([a, torch.zeros(10)]), a / 2, rtol=0, atol=1e-6)
    assert not karcher([torch.zeros(10)] * 2).any()
    # opposite models have no barycentre: it stays at the first
    torch.testing.assert_close(karcher([a, -a]), a, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="weights of 0 and more"):
        karcher([a, a], weight=[1.0, -1.0])


def test_model_stock_of_equal_orthogonal_and_opposite_models(normal):
    base, change = normal(8, 8, dtype=torch.float64), normal(8, 8, seed=1, dtype=torch.float64)
    torch.testing.assert_close(model_stock([base + change] * 3, base), base + change, **EXACT)
    basis = torch.linalg.qr(change).Q
    apart = [base + column.unsqueeze(1).expand(8, 8) for column in basis.T[:3]]
    torch.testing.assert_close(model_stock(apart, base), base, **EXACT)
    assert torch.equal(model_stock([base + change, base - change], base), base)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_model_stocks_ratio(count):
    base = torch.zeros(count, dtype=torch.float64)
    models = list(torch.eye(count, dtype=torch.float64) + 0.5)
    # rows of I + 1/2: inner products 1 + n/4 and lengths squared 2 + n/4
    c = (1 + count / 4) / (2 + count / 4)
    r = count * c / (1 + (count - 1) * c)
    torch.testing.assert_close(model_stock(models, base), r * sum(models) / count, **EXACT)
    if count == 2:
        assert math.isclose(r, 2 * c / (1 + c))


def test_model_stock_by_rows_has_each_rows_angle(normal, around):
    base = normal(4, 9, dtype=torch.float64)
    models = around(base, 3, scale=1.0)
    by_row = [model_stock([model[i] for model in models], base[i]) for i in range(4)]
    torch.testing.assert_close(model_stock(models, base, filter_wise=True), torch.stack(by_row), **EXACT)
    with pytest.raises(ValueError, match="two or more"):
        model_stock(models[:1], base)


def test_nearswap_is_the_weight_that_defines_it(normal, around):
    base = normal(30)
    other = around(base, 1)[0]
    difference = other - base
    weight = (0.05 / difference.abs()).clamp(max=1)
    torch.testing.assert_close(nearswap([other], base, t=0.05), base + weight * difference, rtol=0, atol=1e-6)


def test_passthrough_copies_bit_for_bit(normal):
    model = normal(5, 4).bfloat16()
    assert torch.equal(passthrough([model]).bfloat16(), model)
    assert torch.equal(passthrough([model], scale=[0.5]), model.float() / 2)


def test_ram_keeps_what_is_unique_and_averages_what_is_shared():
    models = [torch.tensor([1.0, 2.0, 1e-6, 0.0]), torch.tensor([3.0, 0.0, 0.0, 0.0])]
    assert ram(models, torch.zeros(4)).tolist() == [2.0, 2.0, 0.0, 0.0]


def test_inner_products_of_float32_are_as_sharp_as_its_products(normal):
    a = normal(256, 4096)
    b = a + 0.1 * normal(256, 4096, seed=1)
    exact = torch.stack([a.flatten().double(), b.flatten().double()])
    found, exact = gram([a, b]), exact @ exact.mT
    # the errors of rows that are summed as trees are independent: log2(4096) roundings in each of 256, 4 deviations
    error = 4 * 12**0.5 * torch.finfo(torch.float32).eps / 2 / 256**0.5
    assert ((found - exact).abs() <= error * exact.abs()).all()
    assert error < 1e-7, "a float32 sum from end to end is off by more"


def test_fisher_is_the_weighted_mean_by_entry(normal, around):
    models = around(normal(6, 5, dtype=torch.float64), 3)
    information = [normal(6, 5, seed=9 + i, dtype=torch.float64).square() for i in range(3)]
    weights = [1.0, 2.0, 0.0]
    shares = [w * f.clamp(min=1e-6) for w, f in zip(weights, information, strict=True)]
    expected = sum(s * m for s, m in zip(shares, models, strict=True)) / sum(shares)
    torch.testing.assert_close(fisher(models, fisher=information, weight=weights), expected, **EXACT)
    zeros = [torch.zeros(6, 5)] * 3
    torch.testing.assert_close(fisher(models, fisher=zeros), average(models), **EXACT)


def test_regmean_is_the_least_squares_answer(normal, around):
    models = around(normal(4, 6, dtype=torch.float64), 3, scale=1.0)
    inputs = [normal(20, 6, seed=9 + i, dtype=torch.float64) for i in range(3)]
    gram = [x.T @ x for x in inputs]
    X = torch.cat(inputs)
    Y = torch.cat([x @ model.T for x, model in zip(inputs, models, strict=True)])
    expected = torch.linalg.lstsq(X, Y).solution.T
    torch.testing.assert_close(regmean(models, gram=gram, off_diagonal=1.0), expected, rtol=0, atol=1e-10)
    diagonal = [torch.diag(g.diagonal()) for g in gram]
    expected = sum(m @ d for m, d in zip(models, diagonal, strict=True)) @ sum(diagonal).inverse()
    torch.testing.assert_close(regmean(models, gram=gram, off_diagonal=0.0), expected, rtol=0, atol=1e-10)


def test_regmean_takes_the_mean_for_inputs_that_nobody_used(normal, around):
    models = around(normal(4, 6, dtype=torch.float64), 2, scale=1.0)
    inputs = [normal(20, 6, seed=9 + i, dtype=torch.float64) for i in range(2)]
    for x in inputs:
        x[:, 2] = 0
    result = regmean(models, gram=[x.T @ x for x in inputs])
    torch.testing.assert_close(result[:, 2], average(models)[:, 2], rtol=0, atol=1e-10)
    assert torch.equal(regmean(models), average(models))
    with pytest.raises(ValueError, match=r"need.* Gram matrices of shape \[6, 6\]"):
        regmean(models, gram=[torch.eye(4)] * 2)
