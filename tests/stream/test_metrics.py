from __future__ import annotations

import json
import math
import random

import pytest

from folklora.stream.metrics import (
    IncompleteMatrixError,
    average_accuracy,
    average_incremental_accuracy,
    backward_transfer,
    forgetting,
    forgetting_by_task,
    forward_transfer,
    forward_transfer_individual,
    intransigence,
    learning_accuracy,
    micro_average,
    recovered_gap,
    summary,
)

EXACT = 1e-9  # percentages of double precision, a few dozen terms
R = [[90.0, 30.0, 20.0], [70.0, 80.0, 25.0], [75.0, 60.0, 50.0]]


def _random(T, seed):
    generator = random.Random(seed)
    return [[100 * generator.random() for _ in range(T)] for _ in range(T)]


def test_every_formula_by_hand():
    assert average_accuracy(R) == pytest.approx((75 + 60 + 50) / 3)
    assert average_incremental_accuracy(R) == pytest.approx((90 + 75 + 185 / 3) / 3)
    assert learning_accuracy(R) == pytest.approx((90 + 80 + 50) / 3)
    assert backward_transfer(R) == pytest.approx((-15 - 20) / 2)
    assert backward_transfer(R, divide_by="T") == pytest.approx((-15 - 20) / 3)
    assert forgetting(R) == pytest.approx((15 + 20) / 2)
    assert forgetting_by_task(R) == pytest.approx([15, 20])
    assert forward_transfer(R, [None, 10.0, 15.0]) == pytest.approx((20 + 10) / 2)
    assert forward_transfer_individual(R, [80.0, 70.0, 60.0]) == pytest.approx((10 + 10 - 10) / 3)
    assert intransigence(R, [80.0, 70.0, 60.0]) == pytest.approx((-10 - 10 + 10) / 3)
    assert micro_average(R, [1, 2, 3]) == pytest.approx((75 + 120 + 150) / 6)
    assert recovered_gap(70.0, 60.0, 80.0) == pytest.approx(0.5)


def test_forgetting_is_measured_from_the_best_before_the_end():
    matrix = [[50.0, None, None], [90.0, 40.0, None], [60.0, 70.0, 30.0]]
    assert forgetting(matrix) == pytest.approx((90 - 60 + 40 - 70) / 2)


@pytest.mark.parametrize("T", [2, 5, 15])
def test_all_learned_and_all_forgotten(T):
    matrix = [[float(i == j) for j in range(T)] for i in range(T)]
    assert average_accuracy(matrix) == pytest.approx(1 / T)
    assert backward_transfer(matrix) == -1
    assert forgetting(matrix) == 1


def test_a_constant_matrix_neither_forgets_nor_gains():
    matrix = [[42.0] * 4] * 4
    assert backward_transfer(matrix) == forgetting(matrix) == 0
    assert average_accuracy(matrix) == learning_accuracy(matrix) == average_incremental_accuracy(matrix) == 42


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("T", [2, 3, 8])
def test_identities_on_random_matrices(T, seed):
    matrix = _random(T, seed)
    transfer = backward_transfer(matrix)
    assert average_accuracy(matrix) == pytest.approx(learning_accuracy(matrix) + (T - 1) / T * transfer, abs=EXACT)
    assert backward_transfer(matrix, divide_by="T") == pytest.approx((T - 1) / T * transfer, abs=EXACT)
    assert forgetting(matrix) + transfer >= -EXACT
    assert micro_average(matrix, [7] * T) == pytest.approx(average_accuracy(matrix), abs=EXACT)


def test_models_trained_on_one_task_each_forget_nothing():
    single = [70.0, 80.0, 90.0]
    matrix = [single[: i + 1] + [None] * (2 - i) for i in range(3)]
    assert backward_transfer(matrix) == forgetting(matrix) == 0
    assert average_accuracy(matrix) == learning_accuracy(matrix)
    assert forward_transfer_individual(matrix, single) == pytest.approx(0, abs=EXACT)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ("order1_olora", (78.37, -1.18, 79.25, 1.18)),
        ("order1_seqft", (67.77, -14.50, 78.64, 14.50)),
        ("order1_icrlora", (68.62, -14.55, 79.53, 14.55)),
        ("long_olora", (72.17, -0.73, 72.86, 1.74)),
        ("long_seqlora", (32.04, -47.96, 76.81, 48.95)),
        ("long_icrlora", (58.44, -19.44, 76.58, 20.38)),
    ],
)
def test_published_logs(run, expected, shared_data):
    path = shared_data / "data" / "cl_benchmark" / "reference_olora_logs.json"
    if not path.is_file():
        pytest.skip(f"no real result matrices: {path} is absent")
    stored = json.loads(path.read_text())["runs"][run]
    got = summary(stored["R"])
    names = ("average_accuracy", "backward_transfer", "learning_accuracy", "forgetting")
    assert [got[name] for name in names] == pytest.approx(expected, abs=0.0051)  # two decimals are published
    stored_names = ("AA", "BWT", "LA", "F")
    assert [got[name] for name in names] == pytest.approx([stored["metrics"][name] for name in stored_names], abs=1e-4)
    assert got["forward_transfer"] is None


def test_a_run_whose_row_was_lost_still_has_an_average(shared_data):
    path = shared_data / "data" / "cl_benchmark" / "reference_olora_logs.json"
    if not path.is_file():
        pytest.skip(f"no real result matrices: {path} is absent")
    got = summary(json.loads(path.read_text())["runs"]["order1_seqlora"]["R"])
    assert got["average_accuracy"] == pytest.approx(62.875)
    assert [name for name, value in got.items() if value is not None] == ["average_accuracy"]


@pytest.mark.parametrize("absent", [None, math.nan, math.inf])
@pytest.mark.parametrize(
    ("formula", "used", "unused"),
    [
        (average_accuracy, (2, 0), (1, 1)),
        (average_incremental_accuracy, (1, 0), (0, 1)),
        (learning_accuracy, (1, 1), (2, 0)),
        (backward_transfer, (0, 0), (1, 0)),
        (forgetting, (1, 0), (2, 2)),
        (lambda matrix: forward_transfer(matrix, [None, 1.0, 1.0]), (1, 2), (0, 2)),
        (lambda matrix: forward_transfer_individual(matrix, [1.0] * 3), (2, 2), (2, 1)),
        (lambda matrix: intransigence(matrix, [1.0] * 3), (0, 0), (2, 1)),
        (lambda matrix: micro_average(matrix, [1, 1, 1]), (2, 1), (1, 1)),
    ],
)
def test_a_missing_score_matters_exactly_where_it_is_used(formula, used, unused, absent):
    for (i, j), needed in ((used, True), (unused, False)):
        matrix = [list(row) for row in R]
        matrix[i][j] = absent
        if needed:
            with pytest.raises(IncompleteMatrixError, match=f"row {i}, column {j}$"):
                formula(matrix)
        else:
            assert math.isfinite(formula(matrix))


def test_every_missing_score_is_named():
    matrix = [[1.0, None], [None, math.nan]]
    with pytest.raises(IncompleteMatrixError, match="row 1, column 0; row 1, column 1"):
        average_accuracy(matrix)
    with pytest.raises(IncompleteMatrixError, match="start, column 1; start, column 2"):
        forward_transfer(R, [1.0, None, math.nan])


def test_summary():
    got = summary(R, [0.0, 10.0, 15.0])
    assert got == {
        "average_accuracy": average_accuracy(R),
        "average_incremental_accuracy": average_incremental_accuracy(R),
        "learning_accuracy": learning_accuracy(R),
        "backward_transfer": backward_transfer(R),
        "forgetting": forgetting(R),
        "forward_transfer": forward_transfer(R, [0.0, 10.0, 15.0]),
    }
    lower = [[90.0, None, None], [70.0, 80.0, None], [75.0, 60.0, 50.0]]
    assert summary(lower, [0.0, 10.0, 15.0]) == {**got, "forward_transfer": None}


def test_a_single_task_has_no_transfer():
    for formula in (backward_transfer, forgetting, lambda matrix: forward_transfer(matrix, [1.0])):
        with pytest.raises(ValueError, match="single task"):
            formula([[80.0]])
    got = summary([[80.0]], [10.0])
    assert [name for name, value in got.items() if value is None] == [
        "backward_transfer",
        "forgetting",
        "forward_transfer",
    ]
    assert got["average_accuracy"] == got["learning_accuracy"] == 80


@pytest.mark.parametrize("matrix", [[], [[1.0, 2.0]], [[1.0], [1.0, 2.0]]])
def test_a_matrix_that_is_not_square_is_an_error(matrix):
    for formula in (average_accuracy, forgetting, summary):
        with pytest.raises(ValueError, match="T rows of T scores"):
            formula(matrix)


def test_arguments_of_another_length_are_errors():
    for call in (
        lambda: summary(R, [1.0]),
        lambda: forward_transfer(R, [1.0]),
        lambda: forward_transfer_individual(R, [1.0]),
        lambda: intransigence(R, [1.0]),
    ):
        with pytest.raises(ValueError, match="3 scores"):
            call()
    for counts in ([1, 2], [1, 2, 0]):
        with pytest.raises(ValueError, match="3 positive"):
            micro_average(R, counts)
    with pytest.raises(ValueError, match="divide_by"):
        backward_transfer(R, divide_by="N")
    with pytest.raises(ValueError, match="no gap"):
        recovered_gap(1.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="must be numbers"):
        recovered_gap(math.nan, 1.0, 2.0)
