"""TSV-M, TSV-C, Iso-C, WUDI, R-TSVM: spectra, orthogonality, closed forms, an independent computation in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from folklora.merge import average, iso_c, r_tsvm, task_arithmetic, tsv_c, tsv_m, wudi, wudi_closed_form
from folklora.merge.r_tsvm import layer_rank, sparsity, task_weights
from folklora.merge.singular import interference, leading, orthogonalised

SHAPES = [(24, 16), (16, 24), (16, 16)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
EXACT = {"rtol": 0, "atol": 1e-11}
OFF = {"outlier_mode": "off", "rank_gamma": 0.0}


@pytest.fixture
def tasks(normal, around):
    """`tasks(*shape)`: a base and three models in float64."""

    def draw(*shape: int, count: int = 3) -> tuple[Tensor, list[Tensor]]:
        base = normal(*shape, dtype=torch.float64)
        return base, around(base, count, scale=1.0)

    return draw


def by_numpy(changes: list[Tensor], count: int) -> Tensor:
    """TSV-M from NumPy's decomposition, and the whitening form U (UᵀU)^(-1/2) of the polar factor."""
    parts = [np.linalg.svd(change.numpy(), full_matrices=False) for change in changes]
    U = np.concatenate([u[:, :count] for u, _, _ in parts], 1)
    V = np.concatenate([vt[:count] for _, _, vt in parts]).T
    S = np.concatenate([s[:count] for _, s, _ in parts])

    def white(X: np.ndarray) -> np.ndarray:
        values, vectors = np.linalg.eigh(X.T @ X)
        return X @ vectors / np.sqrt(values) @ vectors.T

    return torch.from_numpy(white(U) * S @ white(V).T)


@shapes
def test_tsv_m_is_what_numpy_makes_of_the_formula(tasks, shape):
    base, models = tasks(*shape)
    expected = by_numpy([model - base for model in models], 5)
    torch.testing.assert_close(tsv_m(models, base) - base, expected, rtol=0, atol=1e-9)


@shapes
def test_tsv_ms_singular_values_are_those_that_were_kept(tasks, shape):
    base, models = tasks(*shape)
    kept = torch.cat([torch.linalg.svdvals(model - base)[:5] for model in models]).sort(descending=True).values
    change = tsv_m(models, base, lambda_=2.0) - base
    torch.testing.assert_close(torch.linalg.svdvals(change)[:15] / 2, kept, **EXACT)
    torch.testing.assert_close((change / 2).square().sum(), kept.square().sum(), **EXACT)


@shapes
def test_orthogonalised_directions_are_orthonormal(tasks, shape):
    base, models = tasks(*shape)
    parts = [leading(model - base, 5) for model in models]
    merged = orthogonalised(parts)
    identity = torch.eye(15, dtype=torch.float64)
    torch.testing.assert_close(merged.U.T @ merged.U, identity, **EXACT)
    torch.testing.assert_close(merged.V.T @ merged.V, identity, **EXACT)
    assert interference(parts) > 1
    separate = [type(merged)(merged.U[:, i : i + 5], merged.S[i : i + 5], merged.V[:, i : i + 5]) for i in (0, 5, 10)]
    assert interference(separate) < 1e-9


def test_orthogonal_tasks_are_added_up(normal):
    U, V = (torch.linalg.qr(normal(24, 15, seed=seed, dtype=torch.float64)).Q for seed in (1, 2))
    S = torch.linspace(3, 1, 5, dtype=torch.float64)
    changes = [(U[:, i : i + 5] * S) @ V[:, i : i + 5].T for i in (0, 5, 10)]
    base = torch.zeros(24, 24, dtype=torch.float64)
    torch.testing.assert_close(tsv_m(changes, base), sum(changes), **EXACT)


def test_the_scale_and_the_signs_of_pairs_do_not_matter(tasks):
    base, models = tasks(24, 16)
    zero = torch.zeros_like(base)
    changes = [model - base for model in models]
    merged = tsv_m(changes, zero)
    torch.testing.assert_close(tsv_m([1e-3 * change for change in changes], zero), 1e-3 * merged, **EXACT)
    torch.testing.assert_close(tsv_m([-change for change in changes], zero), -merged, **EXACT)


def test_copies_of_a_task_merge_into_it(normal):
    base, low = torch.zeros(24, 16), normal(24, 4) @ normal(4, 16, seed=1)
    torch.testing.assert_close(tsv_m([low] * 4, base), low, rtol=0, atol=1e-5)
    near = [low + 1e-3 * normal(24, 16, seed=seed) for seed in range(4)]
    assert torch.isfinite(tsv_m(near, base)).all()


def test_what_is_no_matrix_or_too_small_is_averaged(normal, around):
    for shape in [(7,), (3, 4, 2), (2, 9), (1, 1)]:
        base = normal(*shape)
        models = around(base, 3)
        for method in (tsv_m, iso_c, wudi, wudi_closed_form, r_tsvm):
            if len(shape) == 2 and method not in (tsv_m, r_tsvm):
                continue
            torch.testing.assert_close(method(models, base), average(models), rtol=0, atol=1e-6)


@shapes
def test_tsv_c_serves_each_task_its_best_approximation(tasks, shape):
    base, models = tasks(*shape)
    merged = tsv_c(models, base)
    again = type(merged).of_state(base, merged.state())
    for i, model in enumerate(models):
        u, s, vh = torch.linalg.svd(model - base, full_matrices=False)
        expected = base + (u[:, :5] * s[:5]) @ vh[:5]
        torch.testing.assert_close(merged.for_task(i), expected, **EXACT)
        assert torch.equal(again.for_task(i), merged.for_task(i))
        torch.testing.assert_close(merged.factors(i).dense(), expected - base, **EXACT)
    torch.testing.assert_close(tsv_c(models, base, rank=99).for_task(0), models[0], **EXACT)


def test_tsv_c_keeps_vectors_and_tiny_matrices(normal, around):
    for shape, rank in [((7,), None), ((2, 9), 2)]:
        base = normal(*shape)
        models = around(base, 3)
        merged = tsv_c(models, base, rank=rank)
        torch.testing.assert_close(merged.for_task(2), models[2], rtol=0, atol=1e-6)
        assert torch.equal(type(merged).of_state(base, merged.state()).for_task(1), merged.for_task(1))
    with pytest.raises(ValueError, match="has no factors"):
        tsv_c([normal(7)], normal(7)).factors(0)


@shapes
def test_iso_c_evens_the_spectrum_and_keeps_its_sum(tasks, shape):
    base, models = tasks(*shape)
    total = task_arithmetic(models, base, weight=[1.0, 2.0, 1.0]) - base
    change = iso_c(models, base, weight=[1.0, 2.0, 1.0], lambda_=1.5) - base
    values = torch.linalg.svdvals(change) / 1.5
    torch.testing.assert_close(values, torch.linalg.svdvals(total).mean().expand(16), **EXACT)
    # the directions are those of the sum: Uᵀ D V is diagonal and positive
    u, _, vh = torch.linalg.svd(total, full_matrices=False)
    torch.testing.assert_close(u.T @ change @ vh.T, torch.diag((u.T @ change @ vh.T).diagonal()), **EXACT)
    assert ((u.T @ change @ vh.T).diagonal() > 0).all()


def test_iso_c_leaves_directions_that_nobody_used_at_zero(normal):
    low = normal(24, 3) @ normal(3, 16, seed=1)
    values = torch.linalg.svdvals(iso_c([low], torch.zeros(24, 16)))
    torch.testing.assert_close(values[:3], torch.linalg.svdvals(low)[:3].mean().expand(3), rtol=1e-5, atol=0)
    assert values[3] < 1e-4


def objective(M: Tensor, changes: list[Tensor]) -> Tensor:
    return sum(((M - change) @ change.T).square().sum() / change.square().sum() for change in changes)


@shapes
def test_wudis_closed_form_has_no_gradient_and_the_least_norm(tasks, shape):
    base, models = tasks(*shape)
    changes = [model - base for model in models]
    solved = wudi_closed_form(models, base) - base
    M = solved.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(M, changes), M)
    # entries of the two sums that cancel are about 10
    assert gradient.abs().max() < 1e-11
    rows = torch.linalg.svd(torch.cat(changes), full_matrices=False).Vh
    torch.testing.assert_close(solved @ rows.T @ rows, solved, **EXACT)


def test_wudi_goes_from_the_sum_to_the_closed_form(tasks):
    base, models = tasks(24, 16)
    changes = [model - base for model in models]
    solved = wudi_closed_form(models, base)
    torch.testing.assert_close(wudi(models, base, steps=0), base + sum(changes), **EXACT)
    first = objective(sum(changes), changes)
    near = objective(wudi(models, base) - base, changes)
    assert objective(solved - base, changes) < near < first
    # a step of Adam is of about the learning rate, so it ends within one of the answer, entries of which are about 1
    torch.testing.assert_close(wudi(models, base, steps=1500, learning_rate=1e-2), solved, rtol=0, atol=1e-2)


def test_wudi_takes_the_steps_that_adam_takes_on_the_objective(tasks):
    base, models = tasks(10, 6)
    changes = [model - base for model in models]
    M = sum(changes).clone().requires_grad_()
    optimizer = torch.optim.Adam([M], lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        objective(M, changes).backward()
        optimizer.step()
    found = wudi(models, base, steps=20, learning_rate=1e-2) - base
    torch.testing.assert_close(found, M.detach(), rtol=0, atol=1e-9)


def test_wudi_passes_over_a_model_that_is_the_base(tasks):
    base, models = tasks(10, 6)
    torch.testing.assert_close(wudi_closed_form([base, models[0]], base), models[0], **EXACT)


@shapes
def test_r_tsvm_without_its_parts_is_tsv_m_bit_for_bit(tasks, shape):
    base, models = tasks(*shape)
    assert torch.equal(r_tsvm(models, base, **OFF), tsv_m(models, base))
    assert torch.equal(r_tsvm(models, base, rank_rule="linear", **OFF), tsv_m(models, base))


def test_r_tsvms_weights_are_shares_of_the_outliers(normal):
    changes = [normal(20, 10, seed=seed) for seed in range(3)]
    changes[1][3, 4] = 30.0
    weights = task_weights(changes, 3.0, "matrix").flatten().tolist()
    assert abs(sum(weights) - 1) < 1e-12
    assert weights[1] == max(weights)
    assert task_weights([changes[i] for i in (2, 0, 1)], 3.0, "matrix").flatten().tolist() == [
        weights[i] for i in (2, 0, 1)
    ]
    sums = [float(task_sum(change)) for change in changes]
    assert weights == pytest.approx([value / sum(sums) for value in sums])
    flat = [torch.ones(4, 4), -torch.ones(4, 4)]
    assert task_weights(flat, 3.0, "matrix").flatten().tolist() == [0.5, 0.5]
    assert not torch.equal(task_weights(changes, 2.0, "row"), task_weights(changes, 2.0, "matrix"))


def test_r_tsvms_weights_by_share_do_not_depend_on_how_far_a_task_moved(normal):
    changes = [normal(20, 10, seed=seed) for seed in range(3)]
    scaled = [changes[0], 16 * changes[1], changes[2]]
    before, after = (task_weights(found, 2.0, "matrix", measure="share") for found in (changes, scaled))
    torch.testing.assert_close(after, before)
    totals = [change.abs().sum(dtype=torch.float64) for change in changes]
    sums = task_weights(changes, 2.0, "matrix").flatten() / torch.stack(totals)
    torch.testing.assert_close(before.flatten(), sums / sums.sum())
    assert task_weights(scaled, 2.0, "matrix").flatten()[1] > 0.8


def test_r_tsvms_weights_of_rows_are_shares_of_each_row(normal):
    changes = [normal(20, 10, seed=seed) for seed in range(3)]
    changes[2][7] = 0
    weights = task_weights(changes, 2.0, "row", of="row")
    assert weights.shape == (3, 20, 1)
    torch.testing.assert_close(weights.sum(0), torch.ones(20, 1, dtype=torch.float64))
    for row in range(20):
        expected = task_weights([change[row : row + 1] for change in changes], 2.0, "matrix").flatten()
        torch.testing.assert_close(weights[:, row].flatten(), expected)


def test_r_tsvm_weighs_against_outliers(normal):
    base = torch.zeros(20, 10, dtype=torch.float64)
    changes = [normal(20, 10, seed=seed, dtype=torch.float64) for seed in range(3)]
    weights = (1 / task_weights(changes, 2.0, "matrix")).flatten()
    factors = (3 * weights / weights.sum()).tolist()
    options = {"outlier_sigma": 2.0, "rank_gamma": 0.0, "weight_limit": 1e3}
    merged = r_tsvm(changes, base, outlier_mode="inverse", **options)
    expected = tsv_m([change * factor for change, factor in zip(changes, factors, strict=True)], base)
    torch.testing.assert_close(merged, expected, **EXACT)
    # the task that is spoilt by one entry, and no more the others
    changes[1][3, 4] = 1e3
    merged = r_tsvm(changes, base, outlier_mode="inverse", **{**options, "weight_limit": 2.0})
    assert torch.linalg.svdvals(merged)[0] < 0.51e3


def task_sum(change: Tensor) -> Tensor:
    magnitude = change.abs()
    return magnitude[magnitude > magnitude.mean() + 3 * magnitude.std(correction=0)].sum()


def test_r_tsvm_weighs_no_task_beyond_the_limit(normal):
    base = torch.zeros(20, 10, dtype=torch.float64)
    changes = [normal(20, 10, seed=seed, dtype=torch.float64) for seed in range(3)]
    changes[1][3, 4] = 1e3
    merged = r_tsvm(changes, base, rank_gamma=0.0, weight_limit=2.0)
    expected = tsv_m([changes[0] * 0.5, changes[1] * 2.0, changes[2] * 0.5], base)
    torch.testing.assert_close(merged, expected, **EXACT)


@pytest.mark.parametrize("rule", ["power", "linear"])
@pytest.mark.parametrize("gamma", [0.5, 1.0, 3.0])
def test_r_tsvms_rank_falls_with_sparsity_and_keeps_room(rule, gamma):
    ranks = [layer_rank(5, 16 / 3, share, gamma, rule) for share in torch.linspace(0, 1, 21).tolist()]
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[0] == 5
    assert ranks[-1] == (3 if rule == "linear" and gamma < 1 else 1)
    assert {layer_rank(5, 16 / 3, share, 0.0, rule) for share in (0.0, 0.5, 1.0)} == {5}


def test_more_zeros_leave_less_rank(tasks):
    base, models = tasks(24, 16)
    sparse = [base + (model - base) * (torch.arange(16) < 8) for model in models]
    assert sparsity([model - base for model in sparse], 1e-2, "relative") > 0.5
    ranks = [torch.linalg.matrix_rank(r_tsvm(m, base, outlier_mode="off") - base, rtol=1e-9) for m in (models, sparse)]
    assert ranks[1] < ranks[0] <= 15
    assert sparsity([torch.zeros(3, 3)], 1e-2, "relative") == 1
    assert sparsity([torch.tensor([1e-6, 1.0])], 1e-5, "absolute") == 0.5


def test_one_huge_entry_is_cut_or_dropped(normal):
    base = torch.zeros(24, 16, dtype=torch.float64)
    changes = [normal(24, 16, seed=seed, dtype=torch.float64) for seed in range(2)]
    spoilt = [changes[0], changes[1].clone()]
    spoilt[1][2, 3] = 1e4
    # mean + 3 standard deviations of 384 entries of which one is h: about 3 h / sqrt(384)
    for mode, bound in (("clip", 3 * 1e4 / 384**0.5 + 50), ("zero", 50.0)):
        change = r_tsvm(spoilt, base, outlier_mode=mode, rank_gamma=0.0)
        assert torch.linalg.svdvals(change)[0] < bound
    assert torch.linalg.svdvals(r_tsvm(spoilt, base, **OFF))[0] > 9e3


@pytest.mark.parametrize("mode", ["reweight", "clip", "zero"])
def test_r_tsvm_scales_with_the_deltas(tasks, mode):
    base, models = tasks(24, 16)
    zero = torch.zeros_like(base)
    changes = [model - base for model in models]
    small = r_tsvm([1e-3 * change for change in changes], zero, outlier_mode=mode, outlier_sigma=2.0)
    torch.testing.assert_close(small, 1e-3 * r_tsvm(changes, zero, outlier_mode=mode, outlier_sigma=2.0), **EXACT)
