"""The report of a run: one HTML page that explains what each method learned and what it kept."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from folklora.stream.files import read_json, write_text
from folklora.stream.plots import (
    MISSING,
    Line,
    accuracy_so_far,
    escape,
    heat_map,
    legend,
    line_chart,
    page,
    read_matrix,
    read_number,
    read_scores,
)

# key in results.json, heading, which end is better (1 high, -1 low, 0 neither), what it means
SCORES = (
    ("average_accuracy", "Average accuracy", 1, "the mean over all tasks after the last one was learned, in percent"),
    (
        "backward_transfer",
        "Backward transfer",
        1,
        "how much the earlier tasks changed between being learned and the end, in points; below zero is loss",
    ),
    ("forgetting", "Forgetting", -1, "how far the earlier tasks ended below the best they ever reached, in points"),
    (
        "forward_transfer",
        "Forward transfer",
        1,
        "how much a task gained, before it was trained, from the tasks before it, in points over the untouched model",
    ),
    ("learning_accuracy", "Learning accuracy", 1, "the mean over tasks, each just after it was learned, in percent"),
    (
        "average_incremental_accuracy",
        "Average incremental accuracy",
        1,
        "the average accuracy over the tasks seen so far, taken after each task, then averaged, in percent",
    ),
)
COSTS = (
    ("trainable_parameters", "Trainable parameters", "numbers that training changes at a time"),
    ("stored_parameters", "Stored parameters", "numbers kept at the end beside the base model"),
    ("seconds", "Seconds", "time for training and testing together"),
)
_SIGNED = ("backward_transfer", "forward_transfer")
_METRICS = {
    "auto": "the label with the highest likelihood; exact match where a task has no labels",
    "rank": "the label with the highest likelihood",
    "exact": "exact match of the generated answer, after lower-casing and removing punctuation",
}
_BOUNDS = {
    "multi-task": "multi-task trains on all the tasks at once",
    "per-task": "per-task keeps one adapter for each task and is told which task is asked",
}


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
    if not _is_names(results.get("tasks")):
        problems.append("'tasks' must be a list of task names, at least one")
    if not isinstance(results.get("methods"), dict) or not results["methods"]:
        problems.append("'methods' must map each method's name to its results, at least one")
    return problems


def _check_method(entry: Any, tasks: list[str]) -> tuple[dict[str, Any], list[str]]:
    if not isinstance(entry, dict):
        return {}, [f"must be an object, found {type(entry).__name__}"]
    numbers = [key for key, *_ in SCORES] + [key for key, *_ in COSTS]
    problems = [f"'{key}' is missing" for key in ["matrix", *numbers] if key not in entry]
    entry = {"start": None, "settings": {}, "losses": [], "attention": None, **entry}
    checks = {
        "matrix": lambda value: read_matrix(value, len(tasks)),
        "start": lambda value: read_scores(value, len(tasks), "the scores before training"),
        "settings": _check_settings,
        "losses": lambda value: _check_losses(value, len(tasks)),
        "attention": _check_attention,
        **dict.fromkeys(numbers, read_number),
    }
    for key, check in checks.items():
        if key in entry:
            try:
                entry[key] = check(entry[key])
            except ValueError as error:
                problems.append(f"'{key}': {error}")
    return entry, problems


def _check_settings(settings: Any) -> dict[str, Any]:
    if not isinstance(settings, dict):
        raise ValueError(f"must be an object, found {type(settings).__name__}")
    return settings


def _check_losses(losses: Any, count: int) -> list[dict[str, Any]]:
    if not isinstance(losses, list):
        raise ValueError(f"must be a list, found {type(losses).__name__}")
    for i, record in enumerate(losses):
        if not isinstance(record, dict) or {"task", "step", "loss"} - record.keys():
            raise ValueError(f"record {i} must have 'task', 'step' and 'loss'")
        if record["task"] not in range(count) or read_number(record["step"]) is None:
            raise ValueError(f"record {i} must have a task from 0 to {count - 1} and a step that is a number")
        read_number(record["loss"])
    return losses


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


def number_text(key: str, value: float | None) -> str:
    """A score or cost as the tables show it: one digit after the point, signs on transfers, thin spaces in counts."""
    if value is None:
        return MISSING
    if key.endswith("_parameters"):
        return f"{round(value):,}".replace(",", "\u202f")
    text = f"{value:+.1f}" if key in _SIGNED else f"{value:.1f}"
    return ("0.0" if float(text) == 0 else text).replace("-", "\u2212")


def verdict(scores: Sequence[tuple[str, float | None]]) -> str:
    """Which method has the highest average accuracy, and how far below it each other ends, as plain text."""
    ranked = sorted(((round(v, 1), name) for name, v in scores if v is not None), key=lambda pair: -pair[0])
    if not ranked:
        return "No method was tested on all tasks at the end, so there is no average accuracy to compare."
    best, leader = ranked[0]
    if len(ranked) == 1:
        return f"{leader} ends with an average accuracy of {best:.1f} %."
    gaps = [
        f"{name} by {best - value:.1f} points" if best > value else f"{name} is level" for value, name in ranked[1:]
    ]
    return f"{leader} has the highest average accuracy, {best:.1f} %. Below it: {', '.join(gaps)}."
