"""Methods side by side: several runs in one table, over seeds and task orders, and one image of a run."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from folklora.stream.files import write_json, write_text
from folklora.stream.plots import (
    BOUNDS,
    COLOURS,
    COSTS,
    MARKERS,
    MISSING,
    SCORES,
    accuracy_so_far,
    escape,
    glossary,
    number_text,
    page,
    plain,
    read_matrix,
    text_table,
    ticks,
    verdict,
)
from folklora.stream.report import check_results, read_results

if TYPE_CHECKING:
    from rich.table import Table

_HEADINGS = {key: heading for key, heading, *_ in (*SCORES, *COSTS)}
# What a terminal or a README has room for; the page shows everything.
_BRIEF = ("average_accuracy", "backward_transfer", "forward_transfer", "learning_accuracy", "stored_parameters")


def compare_runs(runs: Sequence[str | Path], out: str | Path | None = None) -> list[dict[str, Any]]:
    """Set the methods of several runs side by side, with means over seeds and over task orders.

    Runs of one method that share model, metric, settings and tasks in the same order, and differ in their seed, make
    one row: the mean over seeds and the sample standard deviation, sqrt(sum (x - mean)^2 / (n - 1)). Runs of one seed
    are averaged first. The same tasks in another order make another row; after them follows the mean over orders, of
    the means over seeds, with the sample standard deviation over the orders.

    Args:
        runs: Folders of runs, each with a results.json.
        out: A folder for compare.html and compare.json; made if it is not there. None: nothing is written.

    Returns:
        Rows, each with "method", "model", "metric", "tasks" (in order; sorted where "over" is "orders"), "settings",
        "over" ("seeds" or "orders"), "seeds", "count" (of seeds, or of orders), "mean" and "std" (by score and cost;
        None where any run has none, or where one value has no deviation) and "runs" (folder, seed, scores, costs).

    Raises:
        ValueError: No run is given, one is given twice, or some are not runs; every problem has its line.
    """
    entries = _read_entries(runs)
    families: dict[str, dict[tuple[str, ...], list[dict[str, Any]]]] = {}
    for entry in entries:
        family = json.dumps([entry[key] for key in ("model", "metric", "method", "settings")], sort_keys=True)
        family += json.dumps(sorted(entry["tasks"]))
        families.setdefault(family, {}).setdefault(tuple(entry["tasks"]), []).append(entry)
    rows = []
    for orders in families.values():
        over_seeds = [_over_seeds(group) for group in orders.values()]
        rows += over_seeds
        if len(over_seeds) > 1:
            rows.append(_over_orders(over_seeds))
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        write_json(Path(out) / "compare.json", rows)
        write_text(Path(out) / "compare.html", _compare_page(rows))
    return rows


def _read_entries(runs: Sequence[str | Path]) -> list[dict[str, Any]]:
    if not runs:
        raise ValueError("there is nothing to compare: give the folder of at least one run")
    entries, problems, seen = [], [], set()
    for run in runs:
        if Path(run).resolve() in seen:
            problems.append(f"{run}: given twice")
            continue
        seen.add(Path(run).resolve())
        try:
            results = read_results(run)
        except (FileNotFoundError, ValueError) as error:
            problems.append(str(error))
            continue
        for method, entry in results["methods"].items():
            shared = {key: results[key] for key in ("model", "metric", "tasks")}
            settings = _without_seed(entry["settings"])
            seed = entry.get("seed", results.get("seed"))
            numbers = {key: entry[key] for key in _HEADINGS}
            entries.append({"method": method, **shared, "settings": settings, "run": str(run), "seed": seed, **numbers})
    if problems:
        raise ValueError("\n".join(problems))
    return entries


def _without_seed(settings: Any) -> Any:
    if isinstance(settings, dict):
        return {key: _without_seed(value) for key, value in settings.items() if key != "seed"}
    return settings


def _over_seeds(entries: list[dict[str, Any]]) -> dict[str, Any]:
    by_seed: dict[Any, list[dict[str, Any]]] = {}
    for entry in entries:
        by_seed.setdefault(entry["seed"], []).append(entry)
    means = [{key: _mean(run[key] for run in group) for key in _HEADINGS} for group in by_seed.values()]
    row = {key: entries[0][key] for key in ("method", "model", "metric", "tasks", "settings")}
    runs = [{key: entry[key] for key in ("run", "seed", *_HEADINGS)} for entry in entries]
    return {**row, "over": "seeds", "seeds": list(by_seed), **_spread(means), "runs": runs}


def _over_orders(rows: list[dict[str, Any]]) -> dict[str, Any]:
    seeds = list(dict.fromkeys(seed for row in rows for seed in row["seeds"]))
    shared = {key: rows[0][key] for key in ("method", "model", "metric", "settings")}
    runs = [run for row in rows for run in row["runs"]]
    spread = {"over": "orders", "seeds": seeds, **_spread([row["mean"] for row in rows]), "runs": runs}
    return {**shared, "tasks": sorted(rows[0]["tasks"]), **spread}


def _spread(groups: list[dict[str, float | None]]) -> dict[str, Any]:
    mean = {key: _mean(group[key] for group in groups) for key in _HEADINGS}
    deviation = {key: _deviation([group[key] for group in groups]) for key in _HEADINGS}
    return {"count": len(groups), "mean": mean, "std": deviation}


def _mean(values: Iterable[float | None]) -> float | None:
    known = list(values)
    return None if None in known else statistics.fmean(known)


def _deviation(values: Sequence[float | None]) -> float | None:
    return None if None in values or len(values) < 2 else statistics.stdev(values)


def _cells(rows: Sequence[dict[str, Any]], keys: Iterable[str]) -> tuple[list[str], list[list[str]], int]:
    """Headings, cells, and how many columns at the left are text: model, metric and order only where they differ."""
    texts = {"Method": [row["method"] for row in rows]}
    for key in ("model", "metric"):
        if len({row[key] for row in rows}) > 1:
            texts[key.capitalize()] = [row[key] for row in rows]
    orders = _orders(rows)
    if len(orders) > 1:
        numbers = {order: str(i) for i, order in enumerate(orders, start=1)}
        texts["Order"] = ["mean" if row["over"] == "orders" else numbers[tuple(row["tasks"])] for row in rows]
    if any(notes := _setting_notes(rows)):
        texts["Settings"] = notes
    width = len(texts)
    if any(len(row["seeds"]) > 1 for row in rows):
        texts["Seeds"] = [str(len(row["seeds"])) for row in rows]
    for key in keys:
        texts[_HEADINGS[key]] = [_with_deviation(key, row) for row in rows]
    return list(texts), [[plain(cell) for cell in cells] for cells in zip(*texts.values(), strict=True)], width


def _orders(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    return list(dict.fromkeys(tuple(row["tasks"]) for row in rows if row["over"] == "seeds"))


def _notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What stands below a table: the orders of the tasks, and what ± is."""
    orders = _orders(rows)
    names = [f"order {i}" for i in range(1, len(orders) + 1)] if len(orders) > 1 else ["tasks"]
    notes = [plain(f"{name}: {' → '.join(order)}") for name, order in zip(names, orders, strict=True)]
    if any(row["count"] > 1 for row in rows):
        notes.append("mean ± sample standard deviation over seeds; in a mean over orders, over these")
    return notes


def _with_deviation(key: str, row: dict[str, Any]) -> str:
    text, deviation = number_text(key, row["mean"][key]), row["std"][key]
    return text if deviation is None or key.endswith("_parameters") else f"{text} ± {deviation:.1f}"


def _setting_notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """For each row, the settings in which rows of its method differ; those of some adapters alone, among these."""
    notes = []
    for row in rows:
        others = [other["settings"] for other in rows if other["method"] == row["method"]]
        alike = [settings for settings in others if settings.get("adapter") == row["settings"].get("adapter")]
        keys = {key: others if all(key in s for s in others) else alike for settings in alike for key in settings}
        differing = [k for k, group in keys.items() if len({json.dumps(s.get(k), sort_keys=True) for s in group}) > 1]
        notes.append(", ".join(f"{key}={json.dumps(row['settings'].get(key))}" for key in differing))
    return notes


def render_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows of `compare_runs` as a table for the terminal.

    Raises:
        ImportError: rich is missing.
    """
    headings, cells, width = _cells(rows, _BRIEF)
    table = _table(None, "\n".join(_notes(rows)))
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i < width else "right", overflow="fold")
    for row, texts in zip(rows, cells, strict=True):
        table.add_row(*_texts([t.replace(" ± ", "±") for t in texts]), style="bold" if row["over"] == "orders" else "")
    return table


def matrix_table(name: str, entry: dict[str, Any], tasks: Sequence[str]) -> Table:
    """The accuracy matrix of one method as a table for the terminal.

    Args:
        name: The method's name.
        entry: Its part of results.json; "matrix" is used.
        tasks: The names of the tasks, in order.

    Returns:
        A table with a row after each task and a column for each task tested; the task just trained is bold, tasks
        not yet seen are dim.

    Raises:
        ImportError: rich is missing.
        ValueError: The matrix does not fit the tasks.
    """
    matrix = read_matrix(entry.get("matrix"), len(tasks))
    table = _table(f"{plain(name)}: accuracy (%) after each task")
    table.add_column("after ↓ tested on →")
    for heading in _texts(tasks):
        table.add_column(heading, justify="right")
    for i, (task, row) in enumerate(zip(tasks, matrix, strict=True)):
        cells = [number_text("accuracy", value) for value in row]
        styles = ["bold" if j == i else "dim" if j > i else "" for j in range(len(row))]
        table.add_row(*_texts([task]), *_texts(cells, styles))
    return table


def _table(title: str | None, caption: str | None = None) -> Table:
    try:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text
    except ImportError as error:
        raise ImportError("tables for the terminal need rich: pip install 'folklora[cli]'") from error
    words = [text and Text(text) for text in (title, caption)]
    narrow = {"box": SIMPLE_HEAD, "show_edge": False, "pad_edge": False, "collapse_padding": True}
    return Table(title=words[0], caption=words[1], title_justify="left", caption_justify="left", **narrow)


def _texts(cells: Sequence[str], styles: Sequence[str] | None = None) -> list[Any]:
    # As Text, not str: a name such as "[red]" is a name and no markup.
    from rich.text import Text

    return [Text(plain(cell), style=style) for cell, style in zip(cells, styles or [""] * len(cells), strict=True)]


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of `compare_runs` as a Markdown table, and what it needs to be read below it."""
    headings, cells, width = _cells(rows, _BRIEF)
    lines = [headings, ["---"] * width + ["---:"] * (len(headings) - width), *cells]
    table = "".join(f"| {' | '.join(_markdown(cell) for cell in line)} |\n" for line in lines)
    return table + "".join(f"\n{_markdown(line)}\n" for line in _notes(rows))


def _markdown(cell: str) -> str:
    for sign in "\\|`*_[]":
        cell = cell.replace(sign, f"\\{sign}")
    return cell.replace("&", "&amp;").replace("<", "&lt;")


def _verdicts(rows: Sequence[dict[str, Any]]) -> str:
    streams: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        if row["over"] == "seeds":
            streams.setdefault((tuple(row["tasks"]), row["model"], row["metric"]), []).append(row)
    orders = _orders(rows)
    numbers = {order: f"Order {i}: " if len(orders) > 1 else "" for i, order in enumerate(orders, start=1)}
    parts = []
    for (tasks, model, metric), group in streams.items():
        ends: tuple[list[Any], list[Any]] = [], []
        for row, note in zip(group, _setting_notes(group), strict=True):
            name = f"{row['method']} ({note})" if note else row["method"]
            ends[row["method"] in BOUNDS].append((name, row["mean"]["average_accuracy"]))
        title = f"{numbers[tasks]}{' → '.join(tasks)} (model {model}, metric {metric})"
        parts.append(f"<h3>{escape(title)}</h3><p>{escape(verdict(*ends))}</p>")
    return "\n".join(parts)


def _compare_page(rows: Sequence[dict[str, Any]]) -> str:
    runs = [
        [row["method"], run["run"], str(run["seed"]), *(number_text(key, run[key]) for key in _HEADINGS)]
        for row in rows
        if row["over"] == "seeds"
        for run in row["runs"]
    ]
    headings = ["Method", "Run", "Seed", *_HEADINGS.values()]
    body = (
        "<h1>Runs side by side</h1>\n"
        f"{_verdicts(rows)}\n"
        "<p>Means over seeds ± the sample standard deviation; a number without ± comes from one seed. The same tasks "
        "in another order stand in another row; a mean over orders (below a line) averages those rows, ± the deviation "
        f"over orders. {MISSING}: not measured in every run. Differences smaller than the deviations may be chance, "
        "and rows of different models, metrics or tasks are not comparable.</p>\n"
        f"{text_table(*_cells(rows, _HEADINGS), [row['over'] == 'orders' for row in rows])}\n"
        f"{glossary()}\n"
        f"<details><summary>Every run</summary>{text_table(headings, runs, 2)}</details>"
    )
    return page("Folklora: runs side by side", body)


def plot_stream(results: dict[str, Any], path: str | Path) -> None:
    """Draw a run as one image: average accuracy over the tasks seen so far, and beside it each task's retention.

    Left, AA_k = (1/k) sum_{j<=k} R[k][j] after each task k; right, one small panel a task with R[.][j] of each
    method, shaded before the task was learned.

    Args:
        results: What results.json holds.
        path: The image to write, .svg or .png.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: The path has another suffix, or something in the results is missing or wrong.
    """
    path = Path(path)
    if path.suffix not in (".svg", ".png"):
        raise ValueError(f"{path}: a plot is written as .svg or .png, not {path.suffix or 'without a suffix'}")
    results = check_results(results)
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plotting needs matplotlib: pip install 'folklora[report]'") from error
    tasks = [plain(task) for task in results["tasks"]]
    matrices = [entry["matrix"] for entry in results["methods"].values()]
    columns = min(len(tasks), max(2, math.ceil(math.sqrt(len(tasks)))), 5)
    rows = math.ceil(len(tasks) / columns)
    with matplotlib.rc_context({"text.parse_math": False, "svg.hashsalt": "folklora", "font.size": 9}):
        figure = Figure(figsize=(5 + 1.6 * max(columns, 2), max(3.6, 1.45 * rows + 0.9)), layout="constrained", dpi=160)
        left, right = figure.subfigures(1, 2, width_ratios=(4.4, 1.75 * max(columns, 2)))
        lines = _draw_average(left.subplots(), matrices, len(tasks))
        _draw_retention(right.subplots(rows, columns, sharex=True, sharey=True, squeeze=False), matrices, tasks)
        right.suptitle("Each task (shaded until it was trained)", x=0.01, ha="left", fontweight="bold", fontsize=10.8)
        names = [plain(name) for name in results["methods"]]
        figure.legend(lines, names, loc="outside lower center", ncols=min(len(names), 7), frameon=False)
        _save(figure, path)


def _look(index: int, size: float) -> dict[str, Any]:
    place, dashes = index % len(COLOURS), "-" if index < len(COLOURS) else "--"
    return {"color": COLOURS[place], "marker": MARKERS[place], "linestyle": dashes, "markersize": size, "mew": 0}


def _dress(axes: Any, count: int) -> None:
    axes.set(xlim=(0.7, count + 0.3), ylim=(-2, 102))
    axes.set_xticks([int(tick) for tick in ticks(count, whole=True) if tick])
    axes.grid(axis="y", color="#e4e4e0")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_average(axes: Any, matrices: Sequence[list[list[float | None]]], count: int) -> list[Any]:
    _dress(axes, count)
    axes.set(xlabel="tasks trained", ylabel="accuracy (%)")
    axes.set_title("Average over the tasks seen so far", loc="left", fontweight="bold")
    lines = []
    for index, matrix in enumerate(matrices):
        means = [math.nan if mean is None else mean for mean in accuracy_so_far(matrix)]
        lines += axes.plot(range(1, count + 1), means, linewidth=1.8, **_look(index, 5))
        # A method tested only at the end has a lone mark, which others may cover: a dotted level makes it visible.
        if count > 1 and sum(map(math.isfinite, means)) == 1:
            axes.axhline(max(means, key=math.isfinite), color=lines[-1].get_color(), linewidth=1, linestyle=":")
    return lines


def _draw_retention(panels: Any, matrices: Sequence[list[list[float | None]]], tasks: Sequence[str]) -> None:
    for j, axes in enumerate(panels.flat):
        if j >= len(tasks):
            axes.set_visible(False)
            continue
        _dress(axes, len(tasks))
        axes.axvspan(0.7, j + 1, color="#efeee9", linewidth=0, zorder=0)
        for index, matrix in enumerate(matrices):
            column = [math.nan if row[j] is None else row[j] for row in matrix]
            axes.plot(range(1, len(tasks) + 1), column, linewidth=1.2, **_look(index, 3))
        name = tasks[j] if len(tasks[j]) <= 16 else tasks[j][:15] + "…"
        axes.set_title(f"{j + 1} {name}", loc="left", fontsize=8.5)
        axes.tick_params(labelsize=7.5, length=2)


def _save(figure: Any, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # A date would make every redrawing a change.
        figure.savefig(temporary, format=path.suffix[1:], metadata={"Date": None} if path.suffix == ".svg" else None)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
