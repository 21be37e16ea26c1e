"""The report of a run: one HTML page that explains what each method learned and what it kept."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from folklora.stream.charts import WIDE, Line, growth_chart, legend, line_chart, tasks_axis
from folklora.stream.files import write_text
from folklora.stream.plots import (
    BOUNDS,
    COSTS,
    MISSING,
    SCORES,
    accuracy_so_far,
    bytes_text,
    escape,
    glossary,
    heat_map,
    number_text,
    page,
    text_table,
    verdict,
)
from folklora.stream.results import read_results
from folklora.stream.scales import Axis

_METRICS = {
    "auto": "the label with the highest likelihood; exact match where a task has no labels",
    "rank": "the label with the highest likelihood",
    "exact": "exact match of the generated answer, after lower-casing and removing punctuation",
}


def write_report(run: str | Path) -> Path:
    """Write RUN/report.html from RUN/results.json: one page that needs no other file and no network.

    Args:
        run: The folder of a run.

    Returns:
        The page's path.

    Raises:
        FileNotFoundError: There is no such folder, or it holds no results.json.
        ValueError: See `read_results`.
    """
    results = read_results(run)
    methods, tasks = results["methods"], results["tasks"]
    parts = [_heading(results), _summary(results), _average_section(methods, len(tasks))]
    parts += [_retention(methods, tasks), _matrices(methods, tasks), _memory(methods, len(tasks))]
    parts += [_losses(methods, tasks), _attention(methods), _measures(methods, tasks)]
    parts.append(_settings(methods))
    path = Path(run) / "report.html"
    write_text(path, page(f"Folklora: {results['model']}, {len(tasks)} tasks", "\n".join(filter(None, parts))))
    return path


def _heading(results: dict[str, Any]) -> str:
    metric = results["metric"]
    facts = {
        "Model": results["model"],
        "Tasks, in order": " → ".join(results["tasks"]),
        "Metric": f"{metric}: {_METRICS[metric]}" if metric in _METRICS else metric,
        "Seed": results.get("seed", MISSING),
        "Made with": f"Folklora {results.get('folklora', MISSING)}, {results.get('machine', 'machine not recorded')}",
    }
    rows = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return f"<h1>What each method learned, and what it kept</h1>\n<dl>{rows}</dl>"


def _summary(results: dict[str, Any]) -> str:
    methods = results["methods"]
    columns = [(key, heading, better) for key, heading, better, _ in SCORES]
    columns += [(key, heading, 0) for key, heading, _ in COSTS]
    judged = [name for name in methods if name not in BOUNDS]
    best = {}
    for key, _, better in columns:
        values = [methods[name][key] * better for name in judged if better and methods[name][key] is not None]
        best[key] = max(values) * better if len(set(values)) > 1 else None
    rows = []
    for name, entry in methods.items():
        cells = "".join(
            f'<td class="best">{number_text(key, entry[key])}</td>'
            if name in judged and best[key] is not None and entry[key] == best[key]
            else f"<td>{number_text(key, entry[key])}</td>"
            for key, *_ in columns
        )
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    head = "".join(f'<th scope="col">{heading}</th>' for _, heading, _ in columns)
    bounds = "; ".join(text for name, text in BOUNDS.items() if name in methods)
    ends = {name: entry["average_accuracy"] for name, entry in methods.items()}
    words = verdict([(n, ends[n]) for n in judged], [(n, ends[n]) for n in methods if n not in judged])
    return (
        "<h2>The methods</h2>\n"
        f"<p>{escape(words)}</p>\n"
        + (f'<p class="note">The references: {bounds}.</p>\n' if bounds else "")
        + '<p class="note">This is one run with one seed. Small differences may be chance; repeat the run with '
        "other seeds and task orders, and compare the means. In bold: each column's best, references aside.</p>\n"
        f'<div class="scroll"><table><thead><tr><th class="text" scope="col">Method</th>{head}</tr></thead>\n'
        f"<tbody>{''.join(rows)}</tbody></table></div>\n{glossary()}"
    )


def _average_section(methods: dict[str, Any], count: int) -> str:
    lines = [
        Line(name, i, list(enumerate(accuracy_so_far(entry["matrix"]), start=1)))
        for i, (name, entry) in enumerate(methods.items())
    ]
    chart = line_chart(
        lines,
        "Average accuracy over the tasks seen so far, by method",
        tasks_axis(count),
        Axis("accuracy (%)", 100),
        size=WIDE,
        names=True,
    )
    return (
        "<h2>Average accuracy along the stream</h2>\n"
        "<p>After each task: the mean accuracy (percent) over the tasks trained so far. A line that falls shows tasks "
        "being forgotten, or harder tasks arriving; a mark alone is a method tested only at that point.</p>\n"
        f'{legend(list(methods))}\n<figure class="wide">{chart}</figure>'
    )


def _retention(methods: dict[str, Any], tasks: Sequence[str]) -> str:
    charts = []
    for j, task in enumerate(tasks):
        lines = []
        for i, (name, entry) in enumerate(methods.items()):
            before = (entry["start"] or [None] * len(tasks))[j]
            column = [before, *(row[j] for row in entry["matrix"])]
            lines.append(Line(name, i, list(enumerate(column))))
        label = f"Accuracy on {task} after each task, by method"
        x, y = Axis("tasks trained", len(tasks), whole=True), Axis("accuracy (%)", 100)
        chart = line_chart(lines, label, x, y, shade_to=j + 1)
        charts.append(f"<figure><h3>{j + 1}. {escape(task)}</h3>{chart}</figure>")
    return (
        "<h2>Each task along the stream</h2>\n"
        "<p>One chart a task: its accuracy (percent) before any training (0) and after each task. The shade ends where "
        "the task itself was trained. A line that stays level to the right of the shade was kept; one that falls was "
        f'forgotten.</p>\n{legend(list(methods))}\n<div class="grid">{"".join(charts)}</div>'
    )


def _matrices(methods: dict[str, Any], tasks: Sequence[str]) -> str:
    def kind(i: int, j: int) -> str:
        return "now" if i == j else "seen" if j < i else "later"

    maps = [
        heat_map(name, "after ↓ tested on →", tasks, list(zip(tasks, entry["matrix"], strict=True)), kind=kind)
        for name, entry in methods.items()
    ]
    return (
        "<h2>Accuracy after each task, on each task</h2>\n"
        "<p>A row is the moment after training that task; a column is the task tested; the number is the accuracy in "
        'percent. <span class="key">Framed</span>: the task just trained. Left of it, tasks learned earlier: read down '
        'a column to see what was kept. <span class="key later">Dashed</span>: tasks not yet seen. '
        f'{MISSING}: not tested.</p>\n<div class="flow">{"".join(maps)}</div>'
    )


def _memory(methods: dict[str, Any], count: int) -> str:
    sizes = {name: entry["stored_bytes_by_task"] for name, entry in methods.items()}
    chart = growth_chart([Line(n, i, list(enumerate(sizes[n], start=1))) for i, n in enumerate(methods)], count)
    if not chart:
        return ""
    headings = ["Method", "First task", "Last task", "Growth a task", "Numbers", "Examples"]
    rows = []
    for name, entry in methods.items():
        known = [size for size in sizes[name] if size is not None]
        growth = bytes_text((known[-1] - known[0]) / (len(known) - 1)) if len(known) > 1 else MISSING
        ends = [bytes_text(known[i]) if known else MISSING for i in (0, -1)]
        kept = MISSING if entry["stored_examples"] is None else f"{entry['stored_examples']:,.0f}"
        rows.append([name, *ends, growth, number_text("stored_parameters", entry["stored_parameters"]), kept])
    return (
        "<h2>What is stored along the stream</h2>\n"
        "<p>After each task: what the method's adapters hold and what it carries on beside them for later tasks, such "
        "as importances, masks, keys or old examples; the base model is not counted. The scale is of ratios: a level "
        "line stores the same whatever the number of tasks. Numbers and examples are those after the last task.</p>\n"
        f'{legend(list(methods))}\n<figure class="wide">{chart}</figure>\n{text_table(headings, rows, 1)}'
    )


def _loss_line(records: Sequence[dict[str, Any]], most: int = 240) -> tuple[list[tuple[float, float]], list[float]]:
    # Steps may count from the first task or anew for each; a new task whose steps do not go on is set behind the last.
    points: list[tuple[float, float]] = []
    borders: list[float] = []
    offset = last = 0.0
    task = records[0]["task"]
    for record in records:
        if record["task"] != task:
            offset = last if record["step"] + offset <= last else offset
            borders.append(last)
            task = record["task"]
        last = offset + record["step"]
        if record["loss"] is not None:
            points.append((last, record["loss"]))
    size = math.ceil(len(points) / most) or 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups], borders


def _losses(methods: dict[str, Any], tasks: Sequence[str]) -> str:
    drawn = {}
    for i, (name, entry) in enumerate(methods.items()):
        points, borders = _loss_line(entry["losses"]) if entry["losses"] else ([], [])
        if points:
            drawn[name] = Line(name, i, points), borders
    if not drawn:
        return ""
    top = max(y for line, _ in drawn.values() for _, y in line.points)
    charts = []
    for name, (line, borders) in drawn.items():
        end = max(line.points[-1][0], 1.0)
        x, y = Axis("steps", end, whole=True), Axis("loss", top if top > 0 else 1.0)
        chart = line_chart([line], f"Training loss of {name}", x, y, dots=len(line.points) == 1, marks=borders)
        charts.append(f"<figure><h3>{escape(name)}</h3>{chart}</figure>")
    return (
        "<h2>Losses in training</h2>\n"
        "<p>The training loss by step, one chart a method on one scale; dashed lines stand where the next task begins. "
        "It jumps there because the new task is unknown, and should fall again. Long runs are averaged in groups of "
        f'steps. A low loss says nothing about earlier tasks.</p>\n<div class="grid">{"".join(charts)}</div>'
    )


def _attention(methods: dict[str, Any]) -> str:
    parts = []
    for name, entry in methods.items():
        found = entry["attention"]
        if found is None:
            continue
        rows = [(task, _mean_rows(layers)) for task, layers in zip(found["tasks"], found["mean"], strict=True)]
        shape = {"top": 1.0, "digits": 2}
        overall = heat_map(f"{name}: mean over the layers", "input from ↓ share of →", found["slots"], rows, **shape)
        by_layer = [
            heat_map(
                f"Input from {task}",
                "layer ↓ share of →",
                found["slots"],
                list(zip(found["layers"], layers, strict=True)),
                **shape,
            )
            for task, layers in zip(found["tasks"], found["mean"], strict=True)
        ]
        opened = " open" if len(found["layers"]) * len(found["tasks"]) <= 64 else ""
        parts.append(
            f"{overall}\n<details{opened}><summary>{escape(name)}: layer by layer</summary>"
            f'<div class="flow">{"".join(by_layer)}</div></details>'
        )
    if not parts:
        return ""
    return (
        "<h2>What answers each task</h2>\n"
        "<p>For inputs of one task (row), the mean share of each adapter or prompt (column): 0 is none, 1 all of it. A "
        "strong cell in a task's own column means that the method finds the right adapter without being told the task; "
        "strong cells elsewhere mean that tasks share adapters, or are confused. The column none, where there is one, "
        "is no adapter: the base model as it was. A pool's prompts belong to no task: where two are strong in one "
        "column, the later one was trained on top of the earlier.</p>\n" + "\n".join(parts)
    )


def _measures(methods: dict[str, Any], tasks: Sequence[str]) -> str:
    rows = []
    for method, entry in methods.items():
        found = entry["measures_by_task"]
        for name in dict.fromkeys(name for measures in found for name in measures):
            values = [measures.get(name) for measures in found] + [None] * (len(tasks) - len(found))
            cells = [MISSING if value is None else f"{value:.3g}" for value in values]
            rows.append([method, name.replace("_", " "), *cells])
    if not rows:
        return ""
    return (
        "<h2>What methods measured of themselves</h2>\n"
        "<p>Once each task (column) was learnt. Reading overlap: how much of what its adapter reads the adapters of "
        "earlier tasks read too, the mean squared cosine of the angles between their spaces; 0 is orthogonal, 1 the "
        f"same, and by chance is what random ones would have.</p>\n{text_table(['Method', 'Measure', *tasks], rows, 2)}"
    )


def _mean_rows(layers: Sequence[Sequence[float | None]]) -> list[float | None]:
    columns = [[value for value in column if value is not None] for column in zip(*layers, strict=True)]
    return [sum(column) / len(column) if column else None for column in columns]


def _settings(methods: dict[str, Any]) -> str:
    parts = []
    for name, entry in methods.items():
        settings = {"seed": entry["seed"], **entry["settings"]} if "seed" in entry else entry["settings"]
        rows = "".join(
            f'<tr><th scope="row">{escape(key)}</th><td class="text">'
            f"{escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))}</td></tr>"
            for key, value in settings.items()
        )
        table = f'<div class="scroll"><table><tbody>{rows}</tbody></table></div>' if rows else "<p>None recorded.</p>"
        parts.append(f"<details><summary>{escape(name)}</summary>{table}</details>")
    return "<h2>Settings</h2>\n<p>What each method was run with.</p>\n" + "\n".join(parts)
