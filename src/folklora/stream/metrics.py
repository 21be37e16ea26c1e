"""Metrics of continual learning: functions of the matrix of scores, and of nothing else.

Everywhere `matrix` is R, T rows of T scores in percent: R[i][j] is the score on the test set of task j after training
tasks 0..i (the formulas below count from 0 too). None and NaN mean "not evaluated"; a formula that needs such a cell
raises `IncompleteMatrixError`, so that nothing is averaged over fewer cells than it says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

Scores = Sequence[float | None]
Matrix = Sequence[Scores]


class IncompleteMatrixError(ValueError):
    """A metric needs scores that were not evaluated; the message names their cells, counted from 0."""


def average_accuracy(matrix: Matrix) -> float:
    """Average accuracy at the end of the stream, AA = (1/T) Σ_j R[T-1][j].

    Args:
        matrix: R, T rows of T scores; its last row is used.

    Returns:
        AA, in the unit of the scores (percent).

    Raises:
        IncompleteMatrixError: A cell of the last row is missing.
        ValueError: The matrix is empty or not square.
    """
    T = _size(matrix)
    return _mean(_cells(matrix, [(T - 1, j) for j in range(T)]))


def average_incremental_accuracy(matrix: Matrix) -> float:
    """Average of the average accuracies along the stream, (1/T) Σ_k (1/(k+1)) Σ_{j≤k} R[k][j].

    Args:
        matrix: R, T rows of T scores; the diagonal and what lies below are used.

    Returns:
        The average incremental accuracy (percent).

    Raises:
        IncompleteMatrixError: A cell on or below the diagonal is missing.
        ValueError: The matrix is empty or not square.
    """
    T = _size(matrix)
    _cells(matrix, [(k, j) for k in range(T) for j in range(k + 1)])
    return _mean([_mean(_cells(matrix, [(k, j) for j in range(k + 1)])) for k in range(T)])


def learning_accuracy(matrix: Matrix) -> float:
    """Accuracy on each task just after it was learned (plasticity), LA = (1/T) Σ_j R[j][j].

    Args:
        matrix: R, T rows of T scores; the diagonal is used.

    Returns:
        LA (percent).

    Raises:
        IncompleteMatrixError: A cell of the diagonal is missing.
        ValueError: The matrix is empty or not square.
    """
    return _mean(_cells(matrix, _diagonal(_size(matrix))))


def backward_transfer(matrix: Matrix, divide_by: Literal["T-1", "T"] = "T-1") -> float:
    """What learning the later tasks did to the earlier ones, BWT = (1/(T-1)) Σ_{j<T-1} (R[T-1][j] - R[j][j]).

    Negative values mean forgetting. With `divide_by="T-1"`, AA = LA + ((T-1)/T) BWT.

    Args:
        matrix: R, T rows of T scores; the diagonal and the last row are used.
        divide_by: "T-1" as in GEM (Lopez-Paz & Ranzato, 2017), or "T" as in SAPT's evaluation.

    Returns:
        BWT (percentage points).

    Raises:
        IncompleteMatrixError: A cell of the diagonal or the last row is missing.
        ValueError: There is a single task, or `divide_by` is neither.
    """
    T = _at_least_two(matrix, "backward transfer")
    if divide_by not in ("T-1", "T"):
        raise ValueError(f'divide_by must be "T-1" or "T", not {divide_by!r}')
    last, learned = [(T - 1, j) for j in range(T - 1)], _diagonal(T - 1)
    _cells(matrix, last + learned)
    return (math.fsum(_cells(matrix, last)) - math.fsum(_cells(matrix, learned))) / (T - 1 if divide_by == "T-1" else T)


def forgetting(matrix: Matrix) -> float:
    """How far the earlier tasks fell from their best, F = (1/(T-1)) Σ_{j<T-1} (max_{j≤l<T-1} R[l][j] - R[T-1][j]).

    It can be negative, and is never less than -BWT (Chaudhry et al., 2018).

    Args:
        matrix: R, T rows of T scores; all on and below the diagonal but R[T-1][T-1] is used.

    Returns:
        F (percentage points).

    Raises:
        IncompleteMatrixError: One of those cells is missing.
        ValueError: There is a single task.
    """
    return _mean(forgetting_by_task(matrix))


def forgetting_by_task(matrix: Matrix) -> list[float]:
    """How far each earlier task fell from its best, F_j = max_{j≤l<T-1} R[l][j] - R[T-1][j] for j < T-1.

    Args:
        matrix: R, T rows of T scores; all on and below the diagonal but R[T-1][T-1] is used.

    Returns:
        T-1 values (percentage points).

    Raises:
        IncompleteMatrixError: One of those cells is missing.
        ValueError: There is a single task.
    """
    T = _at_least_two(matrix, "forgetting")
    _cells(matrix, [(i, j) for j in range(T - 1) for i in range(j, T)])
    best = [max(_cells(matrix, [(i, j) for i in range(j, T - 1)])) for j in range(T - 1)]
    last = _cells(matrix, [(T - 1, j) for j in range(T - 1)])
    return [high - low for high, low in zip(best, last, strict=True)]


def forward_transfer(matrix: Matrix, start: Scores) -> float:
    """What the earlier tasks did for those not yet learned, FWT = (1/(T-1)) Σ_{j≥1} (R[j-1][j] - R0[j]).

    Args:
        matrix: R, T rows of T scores; the cells just right of the diagonal are used.
        start: R0, the T scores of the model before any training; the first is not used.

    Returns:
        FWT as in GEM (Lopez-Paz & Ranzato, 2017), in percentage points.

    Raises:
        IncompleteMatrixError: One of those cells or scores is missing.
        ValueError: There is a single task, or `start` has not T scores.
    """
    T = _at_least_two(matrix, "forward transfer")
    untrained = _vector(start, T, "start", range(1, T))
    return _mean(_cells(matrix, [(j - 1, j) for j in range(1, T)])) - _mean(untrained)


def forward_transfer_individual(matrix: Matrix, single: Scores) -> float:
    """What the stream did for learning each task, (1/T) Σ_j (R[j][j] - S[j]).

    Args:
        matrix: R, T rows of T scores; the diagonal is used.
        single: S, the T scores of models that were each trained on one task alone.

    Returns:
        The mean difference (percentage points).

    Raises:
        IncompleteMatrixError: A cell of the diagonal or a score of `single` is missing.
        ValueError: `single` has not T scores.
    """
    T = _size(matrix)
    return learning_accuracy(matrix) - _mean(_vector(single, T, "single", range(T)))


def intransigence(matrix: Matrix, joint: Scores) -> float:
    """How much worse than joint training the tasks were learned, (1/T) Σ_j (J[j] - R[j][j]).

    Args:
        matrix: R, T rows of T scores; the diagonal is used.
        joint: J, T scores: that of task j for a model trained on the tasks 0..j together.

    Returns:
        The mean difference (percentage points); negative where the stream did better.

    Raises:
        IncompleteMatrixError: A cell of the diagonal or a score of `joint` is missing.
        ValueError: `joint` has not T scores.
    """
    T = _size(matrix)
    return _mean(_vector(joint, T, "joint", range(T))) - learning_accuracy(matrix)


def micro_average(matrix: Matrix, counts: Sequence[int]) -> float:
    """Accuracy at the end of the stream over all test rows, Σ_j n_j R[T-1][j] / Σ_j n_j.

    Args:
        matrix: R, T rows of T scores; its last row is used.
        counts: n, the T numbers of test rows.

    Returns:
        The weighted mean (percent).

    Raises:
        IncompleteMatrixError: A cell of the last row is missing.
        ValueError: `counts` has not T numbers, or not all are positive.
    """
    T = _size(matrix)
    if len(counts) != T or min(counts) <= 0:
        raise ValueError(f"counts must be {T} positive numbers of test rows, one a task, not {list(counts)}")
    last = _cells(matrix, [(T - 1, j) for j in range(T)])
    return math.fsum(n * score for n, score in zip(counts, last, strict=True)) / sum(counts)


def recovered_gap(average: float, sequential: float, joint: float) -> float:
    """The part of the gap to joint training that a method closes, (AA - AA_seq) / (AA_joint - AA_seq).

    Args:
        average: AA of the method.
        sequential: AA of plain sequential training.
        joint: AA of training on all tasks together.

    Returns:
        A ratio: 0 is sequential training, 1 is joint training.

    Raises:
        ValueError: There is no gap, or a score is not a number.
    """
    if not all(math.isfinite(score) for score in (average, sequential, joint)):
        raise ValueError(f"the three average accuracies must be numbers, not {average}, {sequential}, {joint}")
    if joint == sequential:
        raise ValueError(f"joint and sequential training score the same ({joint}), so there is no gap to recover")
    return (average - sequential) / (joint - sequential)


def summary(matrix: Matrix, start: Scores | None = None) -> dict[str, float | None]:
    """Every metric that the matrix alone defines, by the name of its function.

    Args:
        matrix: R, T rows of T scores.
        start: R0, for `forward_transfer`; without it that is None.

    Returns:
        Values in percent; None where a cell is missing, or where a single task leaves the metric undefined.

    Raises:
        ValueError: The matrix is empty or not square, or `start` has not T scores.
    """
    T = _size(matrix)
    formulas: list[Callable[[Matrix], float]] = [average_accuracy, average_incremental_accuracy, learning_accuracy]
    values = {formula.__name__: _or_none(formula, matrix) for formula in formulas}
    for formula in (backward_transfer, forgetting):
        values[formula.__name__] = _or_none(formula, matrix) if T > 1 else None
    values["forward_transfer"] = None
    if start is not None:
        _vector(start, T, "start", [])
        values["forward_transfer"] = _or_none(forward_transfer, matrix, start) if T > 1 else None
    return values


def _or_none(formula: Callable[..., float], *arguments: Matrix | Scores) -> float | None:
    try:
        return formula(*arguments)
    except IncompleteMatrixError:
        return None


def _size(matrix: Matrix) -> int:
    T = len(matrix)
    if T == 0 or any(len(row) != T for row in matrix):
        raise ValueError(f"the score matrix must have T rows of T scores, not rows of {[len(row) for row in matrix]}")
    return T


def _at_least_two(matrix: Matrix, metric: str) -> int:
    T = _size(matrix)
    if T < 2:
        raise ValueError(f"{metric} is not defined for a single task")
    return T


def _diagonal(count: int) -> list[tuple[int, int]]:
    return [(j, j) for j in range(count)]


def _cells(matrix: Matrix, cells: Sequence[tuple[int, int]]) -> list[float]:
    missing = sorted({cell for cell in cells if _absent(matrix[cell[0]][cell[1]])})
    if missing:
        names = "; ".join(f"row {i}, column {j}" for i, j in missing)
        raise IncompleteMatrixError(f"scores that the metric needs were not evaluated (counted from 0): {names}")
    return [float(matrix[i][j]) for i, j in cells]


def _vector(scores: Scores, T: int, name: str, used: Iterable[int]) -> list[float]:
    if len(scores) != T:
        raise ValueError(f"{name} must have {T} scores, one a task, not {len(scores)}")
    used = list(used)
    if missing := [j for j in used if _absent(scores[j])]:
        names = "; ".join(f"{name}, column {j}" for j in missing)
        raise IncompleteMatrixError(f"scores that the metric needs were not evaluated (counted from 0): {names}")
    return [float(scores[j]) for j in used]


def _absent(score: float | None) -> bool:
    return score is None or not math.isfinite(score)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
