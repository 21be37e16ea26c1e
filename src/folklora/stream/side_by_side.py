"""Rows of several runs in words and pictures: the cells of their table, and the page that draws them together."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from folklora.stream.charts import (
    WIDE,
    Line,
    growth_chart,
    legend,
    line_chart,
    point_chart,
    row_chart,
    tasks_axis,
)
from folklora.stream.plots import (
    BOUNDS,
    COSTS,
    MISSING,
    SCORES,
    bytes_text,
    escape,
    glossary,
    number_text,
    page,
    plain,
    text_table,
    verdict,
)
from folklora.stream.scales import Axis

HEADINGS = {key: heading for key, heading, *_ in (*SCORES, *COSTS)}
Rows = Sequence[dict[str, Any]]
# more tasks than this would push the other charts out of sight
_UNFOLDED = 30


def cells_of(rows: Rows, keys: Iterable[str]) -> tuple[list[str], list[list[str]], int]:
    """Headings, cells, and how many columns at the left are text: model, metric and order only where they differ."""
    texts = {"Method": [row["method"] for row in rows]}
    for key in ("model", "metric"):
        if len({row[key] for row in rows}) > 1:
            texts[key.capitalize()] = [row[key] for row in rows]
    orders = orders_of(rows)
    if len(orders) > 1:
        numbers = {order: str(i) for i, order in enumerate(orders, start=1)}
        texts["Order"] = ["mean" if row["over"] == "orders" else numbers[tuple(row["tasks"])] for row in rows]
    if any(notes := _setting_notes(rows)):
        texts["Settings"] = notes
    width = len(texts)
    if any(len(row["seeds"]) > 1 for row in rows):
        texts["Seeds"] = [str(len(row["seeds"])) for row in rows]
    for key in keys:
        texts[HEADINGS[key]] = [_with_deviation(key, row) for row in rows]
    return list(texts), [[plain(cell) for cell in cells] for cells in zip(*texts.values(), strict=True)], width


def orders_of(rows: Rows) -> list[tuple[str, ...]]:
    """The different orders of tasks."""
    return list(dict.fromkeys(tuple(row["tasks"]) for row in rows if row["over"] == "seeds"))


def notes_of(rows: Rows) -> list[str]:
    """What stands below a table: the orders of the tasks, and what ± is."""
    orders = orders_of(rows)
    names = [f"order {i}" for i in range(1, len(orders) + 1)] if len(orders) > 1 else ["tasks"]
    notes = [plain(f"{name}: {' → '.join(order)}") for name, order in zip(names, orders, strict=True)]
    if any(row["count"] > 1 for row in rows):
        notes.append("mean ± sample standard deviation over seeds; in a mean over orders, over these")
    return notes


def _with_deviation(key: str, row: dict[str, Any]) -> str:
    text, deviation = number_text(key, row["mean"][key]), row["std"][key]
    return text if deviation is None or "stored" in key or key.endswith("_parameters") else f"{text} ± {deviation:.1f}"


def _setting_notes(rows: Rows) -> list[str]:
    """For each row, the settings in which rows of its method differ; those of some adapters alone, among these."""
    notes = []
    for row in rows:
        others = [other["settings"] for other in rows if other["method"] == row["method"]]
        alike = [settings for settings in others if settings.get("adapter") == row["settings"].get("adapter")]
        keys = {key: others if all(key in s for s in others) else alike for settings in alike for key in settings}
        differing = [k for k, group in keys.items() if len({json.dumps(s.get(k), sort_keys=True) for s in group}) > 1]
        notes.append(", ".join(f"{key}={json.dumps(row['settings'].get(key))}" for key in differing))
    return notes


def _streams(rows: Rows) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """The rows over seeds by stream, in words, each with its method's name and the settings that tell it apart."""
    streams: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        if row["over"] == "seeds":
            streams.setdefault((tuple(row["tasks"]), row["model"], row["metric"]), []).append(row)
    orders = orders_of(rows)
    numbers = {order: f"Order {i}: " if len(orders) > 1 else "" for i, order in enumerate(orders, start=1)}
    named = {}
    for (tasks, model, metric), group in streams.items():
        title = f"{numbers[tasks]}{' → '.join(tasks)} (model {model}, metric {metric})"
        notes = _setting_notes(group)
        names = [f"{row['method']} ({note})" if note else row["method"] for row, note in zip(group, notes, strict=True)]
        named[title] = list(zip(names, group, strict=True))
    return named


def _verdicts(rows: Rows) -> str:
    parts = []
    for title, group in _streams(rows).items():
        ends: tuple[list[Any], list[Any]] = [], []
        for name, row in group:
            ends[row["method"] in BOUNDS].append((name, row["mean"]["average_accuracy"]))
        parts.append(f"<h3>{escape(title)}</h3><p>{escape(verdict(*ends))}</p>")
    return "\n".join(parts)


def _drawings(rows: Rows) -> str:
    parts = [
        "<h2>Drawn together</h2>\n<p>Each method has its own mark and colour. A band, or a line through a mark, is one "
        "sample standard deviation over seeds to either side of the mean; one seed has none.</p>"
    ]
    for title, group in _streams(rows).items():
        tasks = group[0][1]["tasks"]
        figures = (_accuracy(group, len(tasks)), _forgetting(group, tasks), _cost(group), _growth(group, len(tasks)))
        shown = "".join(f"<figure>{figure}</figure>" for figure in figures if figure)
        parts.append(f'<h3>{escape(title)}</h3>{legend([name for name, _ in group])}<div class="pair">{shown}</div>')
    return "\n".join(parts)


Group = Sequence[tuple[str, dict[str, Any]]]


def _lines(group: Group, key: str, first: int) -> list[Line]:
    """One of the rows' curves, its points counted from `first`."""
    return [
        Line(name, i, list(enumerate(row["curves"][key]["mean"], start=first)), row["curves"][key]["std"])
        for i, (name, row) in enumerate(group)
    ]


def _known(lines: Sequence[Line]) -> list[tuple[float, float]]:
    """Every value with its spread."""
    return [(y, line.deviation(i)) for line in lines for i, (_, y) in enumerate(line.points) if y is not None]


def _accuracy(group: Group, count: int) -> str:
    lines, label = _lines(group, "accuracy_so_far", 1), "Average accuracy over the tasks seen so far, by method"
    chart = line_chart(lines, label, tasks_axis(count), Axis("accuracy (%)", 100), size=WIDE, names=True)
    return f"<h4>Accuracy over the stream</h4><p>The mean over the tasks seen so far, after each task.</p>{chart}"


def _forgetting(group: Group, tasks: Sequence[str]) -> str:
    lines = _lines(group, "forgetting_by_task", 0)
    known = _known(lines)
    if not known:
        return ""
    low, high = min(0.0, *(v - s for v, s in known)), max(1.0, *(v + s for v, s in known))
    margin = (high - low) / 25
    x = Axis("forgetting (points)", high + margin, low - margin)
    chart = row_chart(lines, "Forgetting of each task, by method", tasks[:-1], x)
    if len(tasks) > _UNFOLDED:
        chart = f"<details><summary>{len(tasks) - 1} tasks</summary>{chart}</details>"
    words = "How far each earlier task ended below the best it ever reached; left of the line it gained."
    return f"<h4>Forgetting by task</h4><p>{words} The last task has had no time to be forgotten.</p>{chart}"


def _cost(group: Group) -> str:
    # runs of older versions did not count bytes
    key = "stored_bytes" if any(row["mean"]["stored_bytes"] for _, row in group) else "stored_parameters"
    lines = [
        Line(name, i, [(row["mean"][key], row["mean"]["average_accuracy"])], [row["std"]["average_accuracy"]])
        for i, (name, row) in enumerate(group)
        if row["mean"][key] and row["mean"]["average_accuracy"] is not None
    ]
    if not lines:
        return ""
    sizes, known = [line.points[0][0] for line in lines], _known(lines)
    title, text = ("stored bytes", bytes_text) if key == "stored_bytes" else ("stored numbers", _count_text)
    x = Axis(title, max(sizes) * 2, min(sizes) / 2, log=True, text=text)
    low, high = (min(v - s for v, s in known) - 4, max(v + s for v, s in known) + 4)
    y = Axis("average accuracy (%)", min(high, 100.0), max(low, 0.0))
    chart = point_chart(lines, "Average accuracy against stored memory, by method", x, y)
    words = "At the end: average accuracy, and what is stored beside the base model. Up and to the left is better."
    absent = [name for name, row in group if not row["mean"][key]]
    words += f" Not known, or nothing stored: {escape(', '.join(absent))}." if absent else ""
    return f"<h4>Accuracy against stored memory</h4><p>{words}</p>{chart}"


def _count_text(count: float) -> str:
    return number_text("stored_parameters", count)


def _growth(group: Group, count: int) -> str:
    chart = growth_chart(_lines(group, "stored_bytes_by_task", 1), count)
    words = "After each task, on a scale of ratios: a level line stores the same whatever the number of tasks."
    return f"<h4>Stored memory over the stream</h4><p>{words}</p>{chart}" if chart else ""


def compare_page(rows: Rows) -> str:
    """The page of these rows, as `compare_runs` gives them: verdicts, a table, pictures, and every run."""
    runs = [
        [row["method"], run["run"], str(run["seed"]), *(number_text(key, run[key]) for key in HEADINGS)]
        for row in rows
        if row["over"] == "seeds"
        for run in row["runs"]
    ]
    headings = ["Method", "Run", "Seed", *HEADINGS.values()]
    body = (
        "<h1>Runs side by side</h1>\n"
        f"{_verdicts(rows)}\n"
        "<p>Means over seeds ± the sample standard deviation; a number without ± comes from one seed. The same tasks "
        "in another order stand in another row; a mean over orders (below a line) averages those rows, ± the deviation "
        f"over orders. {MISSING}: not measured in every run. Differences smaller than the deviations may be chance, "
        "and rows of different models, metrics or tasks are not comparable.</p>\n"
        f"{text_table(*cells_of(rows, HEADINGS), [row['over'] == 'orders' for row in rows])}\n"
        f"{glossary()}\n"
        f"{_drawings(rows)}\n"
        f"<details><summary>Every run</summary>{text_table(headings, runs, 2)}</details>"
    )
    return page("Folklora: runs side by side", body)
