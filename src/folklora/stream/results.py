"""Results of a run as they are read from results.json: checked, and complete where an older version left things out."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from folklora.stream.files import read_json
from folklora.stream.plots import COSTS, SCORES, STORED, read_matrix, read_number, read_scores


def read_results(run: str | Path) -> dict[str, Any]:
    """Read and check RUN/results.json.

    Args:
        run: The folder of a run.

    Returns:
        The results, with NaN and infinity turned to None and each matrix made of T rows of T cells.

    Raises:
        FileNotFoundError: There is no such folder, or it holds no results.json.
        ValueError: The file is not JSON, or something in it is missing or wrong; every problem has its line.
    """
    run = Path(run)
    if not run.is_dir():
        raise FileNotFoundError(f"{run}: there is no such folder")
    path = run / "results.json"
    if not path.is_file():
        raise FileNotFoundError(f"{run}: not the folder of a run, as it holds no results.json")
    return check_results(read_json(path), str(path))


def check_results(results: Any, where: str = "results") -> dict[str, Any]:
    """Check the shape of results and fill in what may be left out.

    Args:
        results: What results.json holds.
        where: What an error calls it.

    Returns:
        A copy with NaN and infinity turned to None and each matrix made of T rows of T cells.

    Raises:
        ValueError: Something is missing or wrong; every problem has its line.
    """
    results = _finite(results)
    problems = _head_problems(results)
    methods: dict[str, Any] = {}
    if not problems:
        for name, entry in results["methods"].items():
            methods[name], found = _check_method(entry, results["tasks"])
            problems += [f"methods.{name}: {problem}" for problem in found]
    if problems:
        raise ValueError("\n".join(f"{where}: {problem}" for problem in problems))
    return {**results, "methods": methods}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)


def _head_problems(results: Any) -> list[str]:
    if not isinstance(results, dict):
        return [f"must hold one JSON object, found {type(results).__name__}"]
    problems = []
    for key in ("model", "metric"):
        if not isinstance(results.get(key), str):
            problems.append(f"'{key}' must be a text" if key in results else f"'{key}' is missing")
    if not isinstance(results.get("seed"), (int, type(None))):
        problems.append("'seed' must be a whole number")
    if not _is_names(results.get("tasks")):
        problems.append("'tasks' must be a list of task names, at least one")
    if not isinstance(results.get("methods"), dict) or not results["methods"]:
        problems.append("'methods' must map each method's name to its results, at least one")
    return problems


def _check_method(entry: Any, tasks: list[str]) -> tuple[dict[str, Any], list[str]]:
    if not isinstance(entry, dict):
        return {}, [f"must be an object, found {type(entry).__name__}"]
    numbers = [key for key, *_ in SCORES] + [key for key, *_ in COSTS]
    later = dict.fromkeys(key for key in (*STORED, *(f"{key}_by_task" for key in STORED)) if key != "stored_parameters")
    problems = [f"'{key}' is missing" for key in ["matrix", *numbers] if key not in {**entry, **later}]
    entry = {**later, "start": None, "settings": {}, "losses": [], "attention": None, "measures_by_task": [], **entry}
    checks = {
        "matrix": lambda value: read_matrix(value, len(tasks)),
        "start": lambda value: read_scores(value, len(tasks), "the scores before training"),
        "seed": _must_be((int, type(None)), "a whole number"),
        "settings": _must_be((dict,), "an object"),
        "losses": lambda value: _check_losses(value, len(tasks)),
        "attention": _check_attention,
        "measures_by_task": lambda value: _check_measures(value, len(tasks)),
        **dict.fromkeys((*numbers, "stored_examples"), read_number),
        **dict.fromkeys((f"{key}_by_task" for key in STORED), lambda value: _read_by_stage(value, len(tasks))),
    }
    for key, check in checks.items():
        if key in entry:
            try:
                entry[key] = check(entry[key])
            except ValueError as error:
                problems.append(f"'{key}': {error}")
    return entry, problems


def _must_be(kinds: tuple[type, ...], words: str) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if not isinstance(value, kinds):
            raise ValueError(f"must be {words}, found {type(value).__name__}")
        return value

    return check


def _read_by_stage(values: Any, count: int) -> list[float | None]:
    """A number after each task; where all tasks are one stage, after the last."""
    values = _must_be((list, type(None)), "a list")(values) or []
    if len(values) > count:
        raise ValueError(f"must hold {count} numbers at most, one a task")
    return [None] * (count - len(values)) + [read_number(value) for value in values]


def _check_losses(losses: Any, count: int) -> list[dict[str, Any]]:
    for i, record in enumerate(_must_be((list,), "a list")(losses)):
        if not isinstance(record, dict) or {"task", "step", "loss"} - record.keys():
            raise ValueError(f"record {i} must have 'task', 'step' and 'loss'")
        if record["task"] not in range(count) or read_number(record["step"]) is None:
            raise ValueError(f"record {i} must have a task from 0 to {count - 1} and a step that is a number")
        read_number(record["loss"])
    return losses


def _check_measures(measures: Any, count: int) -> list[dict[str, float | None]]:
    if len(_must_be((list,), "a list")(measures)) > count:
        raise ValueError(f"must hold {count} objects at most, one a task")
    of_numbers = _must_be((dict,), "a list of objects")
    return [{name: read_number(value) for name, value in of_numbers(found).items()} for found in measures]


def _check_attention(attention: Any) -> dict[str, Any] | None:
    if attention is None:
        return None
    if not isinstance(attention, dict) or not all(
        _is_names(attention.get(key)) for key in ("tasks", "layers", "slots")
    ):
        raise ValueError("must be null or hold the names of 'tasks', 'layers' and 'slots', and their 'mean'")
    tasks, layers, slots = (len(attention[key]) for key in ("tasks", "layers", "slots"))
    mean = attention.get("mean")
    shaped = isinstance(mean, list) and len(mean) == tasks
    shaped = shaped and all(isinstance(rows, list) and len(rows) == layers for rows in mean)
    if not shaped or not all(isinstance(row, list) and len(row) == slots for rows in mean for row in rows):
        raise ValueError(f"'mean' must be {tasks} tasks of {layers} layers of {slots} slots")
    return {**attention, "mean": [[[read_number(cell) for cell in row] for row in rows] for rows in mean]}
