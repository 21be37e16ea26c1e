"""Figures of a run: heat maps and line charts for the pages (HTML, inline SVG), and one image of a stream."""

from __future__ import annotations

import html
import io
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from folklora.stream.files import write_text

# Okabe and Ito's colours, which colour-blind readers tell apart; yellow is left out, as white paper swallows it.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")
DARK_COLOURS = ("#3D9BE0", "#F2793A", "#1DBF92", "#E39AC4", "#F0B429", "#9ADBFF", "#C9C9C4")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MARKER_PATHS = (
    "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0 -6 0z",
    "M-3 -3h6v6h-6z",
    "M0 -4L3.7 3H-3.7z",
    "M0 -4L4 0L0 4L-4 0z",
    "M0 4L3.7 -3H-3.7z",
    "M-1.3 -4h2.6v2.7h2.7v2.6h-2.7v2.7h-2.6v-2.7h-2.7v-2.6h2.7z",
    "M-3.5 -3.5L-1.5 -3.5L0 -1.5L1.5 -3.5L3.5 -3.5L1.2 0L3.5 3.5L1.5 3.5L0 1.5L-1.5 3.5L-3.5 3.5L-1.2 0z",
)
MISSING = "–"

_WIDTH, _HEIGHT = 340, 205
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 12, 12, 40

_STYLE = """
:root{color-scheme:light dark;--bg:#fbfbf9;--fg:#1c1c1a;--muted:#5c5b56;--rule:#dbdad4;--shade:#efeee9;
--heat:37 110 205;--strength:.62;LIGHT}
@media (prefers-color-scheme:dark){:root{--bg:#171716;--fg:#ecebe6;--muted:#a9a8a1;--rule:#3b3a37;--shade:#252523;
--heat:58 132 232;--strength:.66;DARK}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.2rem 1rem 4rem;max-width:70rem;background:var(--bg);color:var(--fg);
font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.6rem;line-height:1.2;margin:.4rem 0 .8rem}
h2{font-size:1.2rem;margin:2.6rem 0 .3rem;padding-top:.6rem;border-top:1px solid var(--rule)}
h3{font-size:1rem;margin:0 0 .3rem}
p,dl,ul{max-width:46rem;margin:.4rem 0}
.note,dl{color:var(--muted);font-size:.92rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1rem}
dt{font-weight:600;color:var(--fg)} dd{margin:0}
dl.terms{display:block} dl.terms dd{margin:0 0 .3rem}
.scroll{overflow-x:auto;margin:.7rem 0}
table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums;overflow-wrap:normal}
caption{text-align:left;font-weight:600;padding:0 0 .3rem}
th,td{padding:.3rem .6rem;text-align:right;border-bottom:1px solid var(--rule)}
th{font-weight:600;vertical-align:bottom} td.text,th.text,tbody th{text-align:left}
td.best{font-weight:700} tr.mean>*{border-top:2px solid var(--muted);font-weight:600}
.heat{border-collapse:separate;border-spacing:2px}
.heat th{font-weight:500;font-size:.8rem;border:0;padding:.15rem .4rem;max-width:11rem;overflow-wrap:anywhere}
.heat thead th{max-width:6.5rem;text-align:center} .heat thead th:first-child{text-align:left;color:var(--muted)}
.heat td{min-width:3.2rem;border:1.5px solid transparent;text-align:center;border-radius:3px;
background:rgb(var(--heat)/calc(var(--v)*var(--strength)))}
.heat td.now{border-color:var(--fg);font-weight:600}
.heat td.later{border:1.5px dashed var(--muted);font-style:italic;background:none;color:var(--muted)}
.heat td.none{background:none;color:var(--muted)}
.key{display:inline-block;padding:0 .4rem;border-radius:3px;border:1.5px solid var(--fg);font-size:.85em;color:var(--fg)}
.key.later{border:1.5px dashed var(--muted);font-style:italic;color:var(--muted)}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,19rem),1fr));gap:1.2rem 1.4rem;margin:.8rem 0}
.flow{display:flex;flex-wrap:wrap;gap:1.2rem 2.2rem;margin:.8rem 0} .flow>*{max-width:100%;margin:0}
figure{margin:0;min-width:0} figure.wide{max-width:36rem}
svg{display:block;width:100%;height:auto} svg text{fill:var(--muted);font:11px system-ui,sans-serif}
.axis{stroke:var(--rule);stroke-width:1} .mark{stroke:var(--muted);stroke-width:1;stroke-dasharray:3 3}
.shade{fill:var(--shade)} .line{fill:none;stroke:var(--c);stroke-width:1.8;stroke-linejoin:round}
.second{stroke-dasharray:5 3} .third{stroke-dasharray:1.5 2.5} .dot{fill:var(--c);stroke:var(--bg);stroke-width:.8}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;padding:0;font-size:.9rem;max-width:none}
.legend li{display:flex;align-items:center;gap:.45rem} .legend svg{width:30px;flex:none}
details{margin:.5rem 0} summary{cursor:pointer;font-weight:600} td.text{white-space:pre-wrap}
"""


@dataclass(frozen=True)
class Line:
    """One line of a chart: its name, its place in the order of colours, and its points (None is a gap)."""

    name: str
    colour: int
    points: Sequence[tuple[float, float | None]]


def plain(value: Any) -> str:
    """Text in one line without control characters, which could steer a terminal or break a file."""
    return "".join(sign if sign.isprintable() else " " if sign.isspace() else "\ufffd" for sign in str(value))


def escape(value: Any) -> str:
    """Text made safe to stand in HTML, both between tags and in a quoted attribute."""
    return html.escape(plain(value), quote=True)


def read_number(value: Any) -> float | None:
    """A finite number, or None for what was not measured (None, NaN, infinity).

    Raises:
        ValueError: The value is no number.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{plain(value)[:40]!r} is no number")
    return float(value) if math.isfinite(value) else None


def read_scores(values: Any, count: int, what: str) -> list[float | None]:
    """One score in percent for each task; a row that is None altogether was not measured.

    Args:
        values: A sequence of `count` numbers from 0 to 100 (NaN or None: not measured), or None.
        count: The number of tasks.
        what: How an error names the values ("row 3 of the matrix").

    Raises:
        ValueError: Another length, or a value that is no percentage.
    """
    if values is None:
        return [None] * count
    if not isinstance(values, (list, tuple)) or len(values) != count:
        found = f"{len(values)} values" if isinstance(values, (list, tuple)) else repr(plain(values)[:40])
        raise ValueError(f"{what} must hold {count} numbers, one a task, found {found}")
    scores = []
    for column, value in enumerate(values, start=1):
        try:
            score = read_number(value)
        except ValueError as error:
            raise ValueError(f"{what}, column {column}: {error}") from None
        if score is not None and not -1e-6 <= score <= 100 + 1e-6:
            raise ValueError(f"{what}, column {column}: {score:g} is no percentage from 0 to 100")
        scores.append(score)
    return scores


def read_matrix(matrix: Any, count: int) -> list[list[float | None]]:
    """The accuracy matrix as `count` rows of `count` floats or None.

    Args:
        matrix: matrix[i][j] is the score in percent on task j after training task i.
        count: The number of tasks.

    Raises:
        ValueError: The matrix is not square of that size, or a cell is no percentage.
    """
    if not isinstance(matrix, (list, tuple)) or len(matrix) != count:
        found = f"{len(matrix)} rows" if isinstance(matrix, (list, tuple)) else repr(plain(matrix)[:40])
        raise ValueError(f"matrix must have {count} rows, one a task, found {found}")
    return [read_scores(row, count, f"row {i} of the matrix") for i, row in enumerate(matrix, start=1)]


def accuracy_so_far(matrix: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Average accuracy over the tasks seen: AA_k = (1/k) sum_{j<=k} R[k][j]; None where a cell is missing."""
    means: list[float | None] = []
    for i, row in enumerate(matrix):
        seen = [value for value in row[: i + 1] if value is not None]
        means.append(sum(seen) / len(seen) if len(seen) == i + 1 else None)
    return means


def page(title: str, body: str) -> str:
    """A whole HTML page around a body: no script, nothing fetched, light and dark."""
    names = [f"--c{i}:{{}}" for i in range(len(COLOURS))]
    light = ";".join(names).format(*COLOURS)
    dark = ";".join(names).format(*DARK_COLOURS)
    style = _STYLE.strip().replace("LIGHT", light).replace("DARK", dark)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; style-src \'unsafe-inline\'">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}\n</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def heat_map(
    caption: str,
    corner: str,
    columns: Sequence[str],
    rows: Sequence[tuple[str, Sequence[float | None]]],
    *,
    top: float = 100.0,
    digits: int = 1,
    kind: Callable[[int, int], str] = lambda i, j: "seen",
) -> str:
    """A table whose cells carry their number and a colour of that strength.

    Args:
        caption: What stands above it.
        corner: What rows and columns are.
        columns: The heading of each column.
        rows: The heading of each row, and its values (None: not measured).
        top: The value of the strongest colour; 0 has none.
        digits: Digits after the point.
        kind: The CSS class of the cell in row i, column j.
    """
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    lines = []
    for i, (name, values) in enumerate(rows):
        cells = [f'<th scope="row">{escape(name)}</th>']
        for j, value in enumerate(values):
            if value is None:
                cells.append(f'<td class="none">{MISSING}</td>')
            else:
                share = min(max(value / top, 0.0), 1.0)
                cells.append(f'<td class="{kind(i, j)}" style="--v:{share:.3f}">{value:.{digits}f}</td>')
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll"><table class="heat"><caption>{escape(caption)}</caption>'
        f'<thead><tr><th scope="col">{escape(corner)}</th>{head}</tr></thead>\n'
        "<tbody>" + "\n".join(lines) + "</tbody></table></div>"
    )


def legend(names: Sequence[str]) -> str:
    """The colours and marks of the lines, for all the charts of a section."""
    items = [
        f'<li><svg viewBox="0 0 30 12" aria-hidden="true"><path class="{_line_class(i)}" style="{_colour(i)}" '
        f'd="M1 6H29"/>{_dot(15, 6, i)}</svg>{escape(name)}</li>'
        for i, name in enumerate(names)
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def line_chart(
    lines: Sequence[Line],
    *,
    label: str,
    x_label: str,
    x_top: float,
    y_top: float,
    dots: bool = True,
    shade_to: float = 0.0,
    marks: Sequence[float] = (),
) -> str:
    """A line chart as inline SVG, its axes starting at 0.

    Args:
        lines: What to draw; a gap (None) interrupts a line, a lone point is a mark alone.
        label: The chart in words, for those who cannot see it.
        x_label: What the horizontal axis counts.
        x_top: Its end.
        y_top: The end of the vertical axis.
        dots: Whether each point carries its method's mark (with its value as tooltip).
        shade_to: The part before this x is shaded.
        marks: Where dashed vertical lines stand.
    """

    def across(x: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * x / x_top

    def up(y: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * y / y_top

    floor = _HEIGHT - _BOTTOM
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">']
    if shade_to > 0:
        width = across(shade_to) - _LEFT
        parts.append(f'<rect class="shade" x="{_LEFT}" y="{_TOP}" width="{width:.1f}" height="{floor - _TOP}"/>')
    for y in ticks(y_top):
        parts.append(f'<path class="axis" d="M{_LEFT} {up(y):.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{up(y) + 4:.1f}" text-anchor="end">{y:g}</text>')
    parts += [f'<path class="mark" d="M{across(x):.1f} {_TOP}V{floor}"/>' for x in marks]
    for x in ticks(x_top, whole=True):
        parts.append(f'<text x="{across(x):.1f}" y="{floor + 15}" text-anchor="middle">{x:g}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle:.1f}" y="{floor + 32}" text-anchor="middle">{escape(x_label)}</text>')
    for line in lines:
        placed = [(across(x), None if y is None else up(y)) for x, y in line.points]
        parts.append(f'<path class="{_line_class(line.colour)}" style="{_colour(line.colour)}" d="{_path(placed)}"/>')
        for (x, y), (px, py) in zip(line.points, placed, strict=True):
            if dots and y is not None and py is not None:
                parts.append(_dot(px, py, line.colour, f"{line.name} at {x:g}: {y:.1f}"))
    return "".join(parts) + "</svg>"


def ticks(top: float, *, whole: bool = False) -> list[float]:
    """At most seven round numbers from 0 to `top`, evenly spaced."""
    step = 10.0 ** math.floor(math.log10(top / 6)) if top > 0 else 1.0
    step = next(step * factor for factor in (1, 2, 5, 10) if top / (step * factor) <= 6 + 1e-9)
    if whole:
        step = max(step, 1.0)
    return [i * step for i in range(int(top / step + 1e-9) + 1)]


def _colour(index: int) -> str:
    return f"--c:var(--c{index % len(COLOURS)})"


def _line_class(index: int) -> str:
    return ("line", "line second", "line third")[min(index // len(COLOURS), 2)]


def _dot(x: float, y: float, index: int, title: str = "") -> str:
    shape = MARKER_PATHS[index % len(MARKER_PATHS)]
    inner = f"<title>{escape(title)}</title>" if title else ""
    place = f'transform="translate({x:.1f} {y:.1f})"'
    return f'<path class="dot" style="{_colour(index)}" {place} d="{shape}">{inner}</path>'


def _path(points: Sequence[tuple[float, float | None]]) -> str:
    steps, pen_down = [], False
    for x, y in points:
        if y is not None:
            steps.append(f"{'L' if pen_down else 'M'}{x:.1f} {y:.1f}")
        pen_down = y is not None
    return "".join(steps)


def plot_stream(results: dict[str, Any], path: str | Path) -> None:
    """Draw a run as one image: average accuracy over the tasks seen so far, and beside it each task's retention.

    Left, AA_k = (1/k) sum_{j<=k} R[k][j] after each task k; right, one small panel a task with R[.][j] of each
    method, shaded before the task was learned.

    Args:
        results: What results.json holds; "tasks" and each method's "matrix" are used.
        path: The image to write, .svg or .png.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: The path has another suffix, or the results lack tasks, methods or a whole matrix.
    """
    path = Path(path)
    if path.suffix not in (".svg", ".png"):
        raise ValueError(f"{path}: a plot is written as .svg or .png, not {path.suffix or 'without a suffix'}")
    tasks, matrices = _matrices(results)
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plotting needs matplotlib: pip install 'folklora[report]'") from error
    style = {
        "text.parse_math": False,
        "svg.hashsalt": "folklora",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "grid.color": "#e4e4e0",
        "axes.axisbelow": True,
    }
    with matplotlib.rc_context(style):
        columns = min(len(tasks), max(2, math.ceil(math.sqrt(len(tasks)))), 5)
        rows = math.ceil(len(tasks) / columns)
        figure = Figure(figsize=(5 + 1.6 * columns, max(3.6, 1.45 * rows + 0.9)), layout="constrained", dpi=160)
        left, right = figure.subfigures(1, 2, width_ratios=(4.4, 1.75 * columns))
        _draw_average(left.subplots(), matrices, len(tasks))
        panels = right.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        _draw_retention(panels, matrices, tasks)
        handles, names = left.axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 7), frameon=False)
        _save(figure, path)


def _matrices(results: dict[str, Any]) -> tuple[list[str], dict[str, list[list[float | None]]]]:
    tasks, methods = results.get("tasks"), results.get("methods")
    if not tasks or not methods:
        raise ValueError("results need a list of 'tasks' and at least one of 'methods' to be plotted")
    matrices = {}
    for name, entry in methods.items():
        try:
            matrices[plain(name)] = read_matrix(entry.get("matrix"), len(tasks))
        except ValueError as error:
            raise ValueError(f"methods.{name}: {error}") from error
    return [plain(task) for task in tasks], matrices


def _values(numbers: Sequence[float | None]) -> list[float]:
    return [math.nan if number is None else number for number in numbers]


def _look(index: int, size: float) -> dict[str, Any]:
    dashes = ("-", "--", ":")[min(index // len(COLOURS), 2)]
    place = index % len(COLOURS)
    return {"color": COLOURS[place], "marker": MARKERS[place], "linestyle": dashes, "markersize": size, "mew": 0}


def _draw_average(axes: Any, matrices: dict[str, list[list[float | None]]], count: int) -> None:
    after = range(1, count + 1)
    for index, (name, matrix) in enumerate(matrices.items()):
        axes.plot(after, _values(accuracy_so_far(matrix)), label=name, linewidth=1.8, **_look(index, 5))
    axes.set(ylim=(0, 102), xlabel="tasks trained", ylabel="accuracy (%)")
    axes.set_title("Average over the tasks seen so far", loc="left", fontweight="bold")
    axes.set_xticks([int(tick) for tick in ticks(count, whole=True) if tick])


def _draw_retention(panels: Any, matrices: dict[str, list[list[float | None]]], tasks: Sequence[str]) -> None:
    after = range(1, len(tasks) + 1)
    for j, axes in enumerate(panels.flat):
        if j >= len(tasks):
            axes.set_visible(False)
            continue
        for index, matrix in enumerate(matrices.values()):
            column = _values([row[j] for row in matrix])
            axes.plot(after, column, linewidth=1.2, **_look(index, 3))
        axes.axvspan(0.7, j + 1, color="#efeee9", linewidth=0, zorder=0)
        axes.set(xlim=(0.7, len(tasks) + 0.3), ylim=(-2, 102))
        axes.set_xticks([int(tick) for tick in ticks(len(tasks), whole=True) if tick])
        name = tasks[j] if len(tasks[j]) <= 16 else tasks[j][:15] + "…"
        axes.set_title(f"{j + 1} {name}", loc="left", fontsize=8.5)
        axes.tick_params(labelsize=7.5, length=2)


def _save(figure: Any, path: Path) -> None:
    image = io.BytesIO()
    if path.suffix == ".svg":
        figure.savefig(image, format="svg", metadata={"Date": None})
        write_text(path, image.getvalue().decode("utf-8"))
        return
    figure.savefig(image, format="png")
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(image.getvalue())
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
