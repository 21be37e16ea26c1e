"""What the pages are made of: numbers read and put in words, tables, heat maps, and the page around them."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

# Okabe and Ito's colours, which colour-blind readers tell apart; yellow is left out, as white paper swallows it.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")
DARK_COLOURS = ("#3D9BE0", "#F2793A", "#1DBF92", "#E39AC4", "#F0B429", "#9ADBFF", "#C9C9C4")
MISSING = "–"

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
    ("trainable_parameters", "Trainable parameters", "numbers that training changes while one task is learned"),
    ("stored_parameters", "Stored parameters", "numbers kept at the end beside the base model"),
    (
        "stored_bytes",
        "Stored bytes",
        "what those numbers and the old examples that are kept for later tasks take at the end (1 kB is 1,000 bytes)",
    ),
    ("seconds", "Seconds", "time that the method took"),
)
# Of what a method keeps, the keys in results.json; each has a list beside it, KEY_by_task, of the same after each task.
STORED = ("stored_parameters", "stored_bytes", "stored_examples")
# Methods that show what is possible rather than learn task after task without being told the task.
BOUNDS = {
    "multi-task": "multi-task trains on all the tasks at once",
    "per-task": "per-task keeps one adapter for each task and is told which task is asked",
}
_SIGNED = ("backward_transfer", "forward_transfer")

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
td{white-space:nowrap} th{font-weight:600;vertical-align:bottom} td.text,th.text,tbody th{text-align:left}
tbody th{white-space:nowrap;vertical-align:middle}
td.best{font-weight:700} tr.mean>*{border-top:2px solid var(--muted);font-weight:600}
.heat{border-collapse:separate;border-spacing:2px}
.heat th{font-weight:500;font-size:.8rem;border:0;padding:.15rem .4rem;max-width:11rem;overflow-wrap:break-word}
.heat thead th{max-width:6.5rem;text-align:center} .heat thead th:first-child{text-align:left;color:var(--muted);
white-space:nowrap;max-width:none} .heat tbody th{white-space:normal}
.heat td{min-width:3.2rem;border:1.5px solid transparent;text-align:center;border-radius:3px;
background:rgb(var(--heat)/calc(var(--v)*var(--strength)))}
.heat td.now{border-color:var(--fg);font-weight:600}
.heat td.later{border:1.5px dashed var(--muted);font-style:italic;background:none;color:var(--muted)}
.heat td.none{background:none;color:var(--muted)}
.key{display:inline-block;padding:0 .4rem;border-radius:3px;border:1.5px solid var(--fg);font-size:.85em;
color:var(--fg)}
.key.later{border:1.5px dashed var(--muted);font-style:italic;color:var(--muted)}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,19rem),1fr));gap:1.2rem 1.4rem;margin:.8rem 0}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:1.6rem 2rem;margin:1rem 0}
.flow{display:flex;flex-wrap:wrap;gap:1.2rem 2.2rem;margin:.8rem 0} .flow>*{max-width:100%;margin:0}
figure{margin:0;min-width:0} figure.wide{max-width:38rem} h4{font-size:.95rem;margin:0} figure p{margin:.1rem 0 .5rem}
svg{display:block;width:100%;height:auto} svg text{fill:var(--muted);font:11px system-ui,sans-serif}
.axis{stroke:var(--rule);stroke-width:1} .mark{stroke:var(--muted);stroke-width:1;stroke-dasharray:3 3}
.shade{fill:var(--shade)} .line{fill:none;stroke:var(--c);stroke-width:1.8;stroke-linejoin:round}
.second{stroke-dasharray:5 3} .third{stroke-dasharray:1.5 3} .dot{fill:var(--c);stroke:var(--bg);stroke-width:.8}
.band{fill:var(--c);opacity:.15} .whisker{stroke:var(--c);stroke-width:1.3} .leader{stroke:var(--muted);stroke-width:.6}
.zero{stroke:var(--muted);stroke-width:1} svg text.name{fill:var(--fg)}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;padding:0;font-size:.9rem;max-width:none}
.legend li{display:flex;align-items:center;gap:.45rem} .legend svg{width:30px;flex:none}
details{margin:.5rem 0} summary{cursor:pointer;font-weight:600} td.text{white-space:pre-wrap}
"""


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
        raise ValueError(f"{what} must hold {count} numbers, one a task")
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


def bytes_text(count: float) -> str:
    """Bytes in the unit that leaves three digits: 812 B, 37.6 kB, 1.13 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5 or unit == "GB":
            break
        count /= 1000
    digits = 0 if unit == "B" or abs(count) >= 99.95 else 1 if abs(count) >= 9.995 else 2
    text = f"{count:.{digits}f}"
    text = text.rstrip("0").rstrip(".") if digits else text
    return f"{text} {unit}".replace("-", "\u2212")


def number_text(key: str, value: float | None) -> str:
    """A score or cost as the tables show it: one digit after the point, signs on transfers, thin spaces in counts."""
    if value is None:
        return MISSING
    if key.endswith("_bytes"):
        return bytes_text(value)
    if key.endswith("_parameters"):
        return f"{round(value):,}".replace(",", "\u202f")
    text = f"{value:+.1f}" if key in _SIGNED else f"{value:.1f}"
    return ("0.0" if float(text) == 0 else text).replace("-", "\u2212")


def glossary() -> str:
    """What the columns of scores and costs mean, folded."""
    terms = [(heading, meaning) for _, heading, _, meaning in SCORES] + [cost[1:] for cost in COSTS]
    rows = "".join(f"<dt>{heading}</dt><dd>{meaning}</dd>" for heading, meaning in terms)
    return f'<details><summary>What the columns mean</summary><dl class="terms">{rows}</dl></details>'


def verdict(scores: Sequence[tuple[str, float | None]], references: Sequence[tuple[str, float | None]] = ()) -> str:
    """Which method has the highest average accuracy and how far below it the others end, as plain text.

    Args:
        scores: Each method's name and average accuracy in percent (None: not known).
        references: The same for methods that show what is possible (see BOUNDS); they take part only if no others do.
    """
    if not scores:
        scores, references = references, ()
    ranked = sorted(((name, round(v, 1)) for name, v in scores if v is not None), key=lambda pair: -pair[1])
    if not ranked:
        return "No method was tested on all tasks at the end, so there is no average accuracy to compare."
    (leader, best), rest = ranked[0], ranked[1:]
    text = f"{leader} ends with an average accuracy of {best:.1f} %."
    if rest:
        gaps = [f"{name} by {best - v:.1f} points" if best > v else f"{name} is level with it" for name, v in rest]
        text = f"{leader} has the highest average accuracy, {best:.1f} %. Below it: {', '.join(gaps)}."
    known = [f"{name} {value:.1f} %" for name, value in references if value is not None]
    return f"References aside, {text} For reference: {', '.join(known)}." if known else text


def page(title: str, body: str) -> str:
    """A whole HTML page around a body: no script, nothing fetched, light and dark."""
    names = [f"--c{i}:{{}}" for i in range(len(COLOURS))]
    light = ";".join(names).format(*COLOURS)
    dark = ";".join(names).format(*DARK_COLOURS)
    style = _STYLE.strip().replace("LIGHT", light).replace("DARK", dark)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
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


def text_table(headings: Sequence[str], rows: Sequence[Sequence[str]], texts: int, means: Sequence[bool] = ()) -> str:
    """A table of texts whose first column names the rows.

    Args:
        headings: The heading of each column.
        rows: The cells of each row.
        texts: How many columns at the left are words; the others are numbers, aligned at the right.
        means: Which rows are the mean of those above.
    """
    kinds = [' class="text"' if i < texts else "" for i in range(len(headings))]
    head = "".join(f'<th scope="col"{kind}>{escape(text)}</th>' for kind, text in zip(kinds, headings, strict=True))
    lines = []
    for i, cells in enumerate(rows):
        line = f'<th scope="row">{escape(cells[0])}</th>'
        line += "".join(f"<td{kind}>{escape(text)}</td>" for kind, text in zip(kinds[1:], cells[1:], strict=True))
        lines.append(f'<tr class="mean">{line}</tr>' if means and means[i] else f"<tr>{line}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{"".join(lines)}</tbody></table></div>'
