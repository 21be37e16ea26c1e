"""Methods side by side: several runs in one table, over seeds and task orders, and one image of a run."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from folklora.stream.charts import DASHES, MARKERS, look_of
from folklora.stream.files import replacing, write_json, write_text
from folklora.stream.metrics import IncompleteMatrixError, forgetting_by_task
from folklora.stream.plots import COLOURS, STORED, accuracy_so_far, number_text, plain, read_matrix
from folklora.stream.results import check_results, read_results
from folklora.stream.scales import ticks
from folklora.stream.side_by_side import HEADINGS, cells_of, compare_page, notes_of

if TYPE_CHECKING:
    from rich.table import Table

# What a terminal or a README has room for; the page shows everything.
_BRIEF = ("average_accuracy", "backward_transfer", "forward_transfer", "learning_accuracy", *STORED[:2])
_CURVES = ("accuracy_so_far", "forgetting_by_task", "stored_parameters_by_task", "stored_bytes_by_task")


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
        Those over seeds have "curves": "mean" and "std" after each task of "accuracy_so_far", of
        "stored_parameters_by_task" and of "stored_bytes_by_task", and for each task of "forgetting_by_task".

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
        write_text(Path(out) / "compare.html", compare_page(rows))
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
            numbers = {key: entry[key] for key in HEADINGS} | _curves_of(entry)
            entries.append({"method": method, **shared, "settings": settings, "run": str(run), "seed": seed, **numbers})
    if problems:
        raise ValueError("\n".join(problems))
    return entries


def _curves_of(entry: dict[str, Any]) -> dict[str, list[float | None]]:
    matrix = entry["matrix"]
    try:
        forgotten: list[float | None] = [*forgetting_by_task(matrix)] if len(matrix) > 1 else []
    except IncompleteMatrixError:
        forgotten = [None] * (len(matrix) - 1)
    along = {key: entry[key] for key in _CURVES[2:]}
    return {"accuracy_so_far": accuracy_so_far(matrix), "forgetting_by_task": forgotten, **along}


def _without_seed(settings: Any) -> Any:
    if isinstance(settings, dict):
        return {key: _without_seed(value) for key, value in settings.items() if key != "seed"}
    return settings


def _over_seeds(entries: list[dict[str, Any]]) -> dict[str, Any]:
    by_seed: dict[Any, list[dict[str, Any]]] = {}
    for entry in entries:
        by_seed.setdefault(entry["seed"], []).append(entry)
    means = [{key: _mean(run[key] for run in group) for key in HEADINGS} for group in by_seed.values()]
    row = {key: entries[0][key] for key in ("method", "model", "metric", "tasks", "settings")}
    runs = [{key: entry[key] for key in ("run", "seed", *HEADINGS)} for entry in entries]
    curves = {key: _curve([[run[key] for run in group] for group in by_seed.values()]) for key in _CURVES}
    return {**row, "over": "seeds", "seeds": list(by_seed), **_spread(means), "curves": curves, "runs": runs}


def _curve(groups: list[list[list[float | None]]]) -> dict[str, list[float | None]]:
    """Mean and deviation over seeds at each place of a curve; `groups` has the curves of each seed."""
    by_seed = [[_mean(values) for values in zip(*curves, strict=True)] for curves in groups]
    places = list(zip(*by_seed, strict=True))
    return {"mean": [_mean(values) for values in places], "std": [_deviation(values) for values in places]}


def _over_orders(rows: list[dict[str, Any]]) -> dict[str, Any]:
    seeds = list(dict.fromkeys(seed for row in rows for seed in row["seeds"]))
    shared = {key: rows[0][key] for key in ("method", "model", "metric", "settings")}
    runs = [run for row in rows for run in row["runs"]]
    spread = {"over": "orders", "seeds": seeds, **_spread([row["mean"] for row in rows]), "runs": runs}
    return {**shared, "tasks": sorted(rows[0]["tasks"]), **spread}


def _spread(groups: list[dict[str, float | None]]) -> dict[str, Any]:
    mean = {key: _mean(group[key] for group in groups) for key in HEADINGS}
    deviation = {key: _deviation([group[key] for group in groups]) for key in HEADINGS}
    return {"count": len(groups), "mean": mean, "std": deviation}


def _mean(values: Iterable[float | None]) -> float | None:
    known = list(values)
    return None if None in known else statistics.fmean(known)


def _deviation(values: Sequence[float | None]) -> float | None:
    return None if None in values or len(values) < 2 else statistics.stdev(values)


def render_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows of `compare_runs` as a table for the terminal.

    Raises:
        ImportError: rich is missing.
    """
    headings, cells, width = cells_of(rows, _BRIEF)
    table = _table(None, "\n".join(notes_of(rows)))
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
    headings, cells, width = cells_of(rows, _BRIEF)
    lines = [headings, ["---"] * width + ["---:"] * (len(headings) - width), *cells]
    table = "".join(f"| {' | '.join(_markdown(cell) for cell in line)} |\n" for line in lines)
    return table + "".join(f"\n{_markdown(line)}\n" for line in notes_of(rows))


def _markdown(cell: str) -> str:
    for sign in "\\|`*_[]":
        cell = cell.replace(sign, f"\\{sign}")
    return cell.replace("&", "&amp;").replace("<", "&lt;")


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
    colour, marker, dashes = look_of(index)
    line = {"color": COLOURS[colour], "linestyle": DASHES[dashes]}
    return {**line, "marker": MARKERS[marker], "markersize": size, "mew": 0}


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
    with replacing(path) as temporary:
        # A date would make every redrawing a change.
        figure.savefig(temporary, format=path.suffix[1:], metadata={"Date": None} if path.suffix == ".svg" else None)
