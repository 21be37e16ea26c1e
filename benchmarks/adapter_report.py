"""The table and the two plots of benchmarks/adapters.py, from the records of its jobs."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs import records

GENERATED = ("e2e", "math")  # the tasks whose loss is worth a column
# too many lines hide each other: those that begin with the weight's own spectrum, and what they are compared with
CURVES = ("full-finetuning", "peft-lora", "kasa", "pissa", "sorsa", "corda", "lora-xs", "osft")
SMOOTHED = 5  # neighbouring points of a curve that are averaged


def write_report(out: Path, tasks: Sequence[str], methods: Sequence[str], rates: Sequence[float]) -> None:
    """Write table.md, scores.svg and losses.svg into the folder, and print the table."""
    runs = [record for record in records(out, "run") if "refused" not in record]
    tuned = records(out, "tune")
    shown = [method for method in methods if any(run["method"] == method for run in runs)]
    text = "\n".join([*_table(runs, tasks, shown, rates), "", *_notes(runs, tuned)])
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    if runs:
        _plot(out / "scores.svg", runs, tasks, shown, _draw_scores)
        curves = [method for method in CURVES if method in shown] or shown[: len(CURVES)]
        low = sorted(rates)[min(1, len(rates) - 1)]
        alike = [run for run in tuned if "refused" not in run and run["rate"] == low]
        _plot(out / "losses.svg", runs, tasks, curves, _draw_losses)
        _plot(out / "losses-at-one-rate.svg", alike, tasks, curves, _draw_losses)


def _table(runs: list[dict], tasks: Sequence[str], methods: Sequence[str], rates: Sequence[float]) -> list[str]:
    losses = [task for task in tasks if task in GENERATED]
    heads = ["method", "trained", *tasks, *(f"loss {task}" for task in losses), "learning rates", "s a run"]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for method in methods:
        own = {task: [r for r in runs if (r["method"], r["task"]) == (method, task)] for task in tasks}
        every = list(itertools.chain(*own.values()))
        # a method may choose its ranks by the data
        trained = sorted({run["trained"] for run in every})
        counts = f"{trained[0]:,}" if len(trained) == 1 else f"{trained[0]:,}–{trained[-1]:,}"
        cells = [_spread([run["score"] for run in own[task]], 1) for task in tasks]
        cells += [_spread([run["loss"] for run in own[task]], 3) for task in losses]
        chosen = [_rate(own[task], rates) for task in tasks]
        seconds = statistics.mean(run["start_seconds"] + run["seconds"] for run in every)
        lines.append("| " + " | ".join([method, counts, *cells, ", ".join(chosen), f"{seconds:.1f}"]) + " |")
    return lines


def _rate(own: list[dict], rates: Sequence[float]) -> str:
    if not own:
        return "–"
    rate = own[0]["rate"]
    return f"{rate:g}{'*' if len(rates) > 1 and rate in (min(rates), max(rates)) else ''}"


def _spread(values: list[float], digits: int) -> str:
    if not values:
        return "–"
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def _notes(runs: list[dict], tuned: list[dict]) -> list[str]:
    measures = {run["task"]: run["measure"] for run in runs}
    lines = [
        "; ".join(f"{task}: {measure}, %" for task, measure in measures.items()),
        f"Seeds {sorted({run['seed'] for run in runs})}, mean ± sample standard deviation; steps "
        f"{sorted({run['steps'] for run in runs})}; {'; '.join(sorted({run['machine'] for run in runs}))}. "
        "* the best rate is at an end of the grid. Trained parameters without a classification's head.",
    ]
    refused = {record["method"]: record["refused"] for record in tuned if "refused" in record}
    return lines + [f"Not trained: {method}: {' '.join(reason.split())}" for method, reason in sorted(refused.items())]


def _plot(path: Path, runs: list[dict], tasks: Sequence[str], methods: Sequence[str], draw: Any) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # the same drawing makes the same file
    matplotlib.rcParams.update({"svg.hashsalt": "folklora", "svg.fonttype": "none", "font.size": 9})
    figure, panels = pyplot.subplots(1, len(tasks), figsize=(3.2 * len(tasks), 4.6), squeeze=False)
    for task, axes in zip(tasks, panels[0], strict=True):
        axes.set_title(task)
        axes.grid(alpha=0.25)
        for i, method in enumerate(methods):
            own = [run for run in runs if (run["method"], run["task"]) == (method, task)]
            if own:
                # strong colours first, pale ones for the second ten
                look = {"color": pyplot.get_cmap("tab20")(2 * i % 20 + i // 10 % 2), "label": method}
                draw(axes, own, look, "osD^vP"[i % 6], ("-", "--", ":")[i // 20 % 3])
    handles = {label: h for axes in panels[0] for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.tight_layout(rect=(0, 0.06 + 0.05 * (len(handles) // 9), 1, 1))
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=min(9, len(handles)), frameon=False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _draw_scores(axes: Any, own: list[dict], look: dict, marker: str, line: str) -> None:
    scores = [run["score"] for run in own]
    error = statistics.stdev(scores) if len(scores) > 1 else 0
    count = statistics.mean(run["trained"] for run in own)
    axes.errorbar(count, statistics.mean(scores), yerr=error, fmt=marker, capsize=2, markersize=5, **look)
    axes.set(xscale="log", xlabel="trained parameters", ylabel=f"{own[0]['measure']} (%)")


def _draw_losses(axes: Any, own: list[dict], look: dict, marker: str, line: str) -> None:
    curves = [dict(map(tuple, run["losses"])) for run in own]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    means = [statistics.mean(curve[step] for curve in curves) for step in steps]
    smooth = [statistics.mean(means[max(0, i + 1 - SMOOTHED) : i + 1]) for i in range(len(means))]
    axes.plot(steps, smooth, line, linewidth=1.2, **look)
    axes.set(xlabel="step", ylabel="training loss", yscale="log")
