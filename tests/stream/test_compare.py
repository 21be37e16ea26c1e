"""Runs side by side: means and deviations over seeds and orders, tables, pages, and the image of a run."""

from __future__ import annotations

import json
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from folklora.stream.compare import compare_runs, markdown_table, matrix_table, plot_stream, render_table

ORDER = ["a", "b", "c"]
OTHER = ["c", "a", "b"]


def make_results(
    scores: dict[str, float | None], tasks: list[str] = ORDER, seed: int | None = 0, rank: int = 8
) -> dict:
    methods = {}
    count = len(tasks)
    for name, score in scores.items():
        matrix = [[score if j <= i else None for j in range(count)] for i in range(count)]
        if name == "multi-task":
            matrix = [[None] * count] * (count - 1) + [[score] * count]
        numbers = dict.fromkeys(("backward_transfer", "forgetting", "forward_transfer", "learning_accuracy"), 0.0)
        methods[name] = {
            "matrix": matrix,
            "average_accuracy": score,
            **numbers,
            "forward_transfer": None,
            "average_incremental_accuracy": score,
            "trainable_parameters": 1024,
            "stored_parameters": 2048,
            "seconds": 3.0,
            "seed": seed,
            "settings": {"rank": rank, "train": {"seed": seed, "learning_rate": 1e-3}},
        }
    return {"model": "some/model", "tasks": tasks, "metric": "rank", "seed": seed, "methods": methods}


def write_run(folder: Path, results: dict) -> Path:
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Five runs: three seeds of one order, two of another."""
    generator = np.random.default_rng(7)
    found = []
    for tasks, seeds in ((ORDER, (0, 1, 2)), (OTHER, (0, 1))):
        for seed in seeds:
            scores = {name: float(generator.uniform(20, 90)) for name in ("seq-lora", "am-lora")}
            found.append(write_run(tmp_path / f"{tasks[0]}{seed}", make_results(scores, tasks, seed)))
    return found


def values(runs: list[Path], method: str) -> np.ndarray:
    return np.array([json.loads((r / "results.json").read_text())["methods"][method]["average_accuracy"] for r in runs])


def test_means_over_seeds_then_over_orders(runs: list[Path]) -> None:
    rows = compare_runs(runs)
    assert [(row["method"], row["over"], row["count"]) for row in rows] == [
        ("seq-lora", "seeds", 3),
        ("seq-lora", "seeds", 2),
        ("seq-lora", "orders", 2),
        ("am-lora", "seeds", 3),
        ("am-lora", "seeds", 2),
        ("am-lora", "orders", 2),
    ]
    for method, first in (("seq-lora", 0), ("am-lora", 3)):
        found = values(runs, method)
        groups = [found[:3], found[3:]]
        for row, group in zip(rows[first : first + 2], groups, strict=True):
            assert row["mean"]["average_accuracy"] == pytest.approx(group.mean(), rel=1e-12)
            assert row["std"]["average_accuracy"] == pytest.approx(group.std(ddof=1), rel=1e-9)
            assert [run["average_accuracy"] for run in row["runs"]] == group.tolist()
        means = np.array([group.mean() for group in groups])
        assert means.mean() != pytest.approx(found.mean(), rel=1e-6)
        assert rows[first + 2]["mean"]["average_accuracy"] == pytest.approx(means.mean(), rel=1e-12)
        assert rows[first + 2]["std"]["average_accuracy"] == pytest.approx(means.std(ddof=1), rel=1e-9)
    assert rows[0]["tasks"] == ORDER
    assert rows[1]["tasks"] == OTHER
    assert rows[0]["mean"]["forward_transfer"] is None
    assert rows[0]["std"]["forward_transfer"] is None


def test_one_run_has_no_deviation(tmp_path: Path) -> None:
    (row,) = compare_runs([write_run(tmp_path / "r", make_results({"replay": 40.0}))])
    assert row["count"] == 1
    assert row["mean"]["average_accuracy"] == 40.0
    assert row["std"]["average_accuracy"] is None


def test_a_missing_score_leaves_no_mean(tmp_path: Path) -> None:
    first = write_run(tmp_path / "0", make_results({"replay": 40.0}, seed=0))
    second = write_run(tmp_path / "1", make_results({"replay": float("nan")}, seed=1))
    (row,) = compare_runs([first, second])
    assert row["mean"]["average_accuracy"] is None
    assert row["std"]["average_accuracy"] is None
    assert row["mean"]["seconds"] == 3.0


def test_runs_of_one_seed_count_once(tmp_path: Path) -> None:
    scores = ((0, 40.0), (0, 50.0), (1, 60.0))
    folders = [
        write_run(tmp_path / str(i), make_results({"replay": score}, seed=seed))
        for i, (seed, score) in enumerate(scores)
    ]
    (row,) = compare_runs(folders)
    assert row["seeds"] == [0, 1]
    assert row["count"] == 2
    assert row["mean"]["average_accuracy"] == pytest.approx(52.5)
    assert row["std"]["average_accuracy"] == pytest.approx(np.std([45.0, 60.0], ddof=1))
    assert len(row["runs"]) == 3


def test_other_settings_are_other_rows(tmp_path: Path) -> None:
    small = write_run(tmp_path / "small", make_results({"replay": 40.0}, rank=4, seed=0))
    large = write_run(tmp_path / "large", make_results({"replay": 50.0}, rank=16, seed=1))
    rows = compare_runs([small, large])
    assert [row["settings"]["rank"] for row in rows] == [4, 16]
    table = markdown_table(rows)
    assert "| replay | rank=4 | 40.0 |" in table
    assert "| replay | rank=16 | 50.0 |" in table
    assert "Seeds" not in table


def test_files_and_page(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    rows = compare_runs(runs, out)
    assert json.loads((out / "compare.json").read_text(encoding="utf-8")) == rows
    source = (out / "compare.html").read_text(encoding="utf-8")
    texts: list[str] = []
    tags: list[str] = []
    parser = HTMLParser()
    parser.handle_data = texts.append  # type: ignore[method-assign]
    parser.handle_starttag = lambda tag, attributes: tags.append(tag)  # type: ignore[method-assign]
    parser.feed(source)
    assert not {"script", "link", "img"} & set(tags)
    assert "http" not in source.replace("http-equiv", "")
    # The rows and their heading, and in the second table every method of every run.
    assert tags.count("tr") == (1 + len(rows)) + (1 + 2 * len(runs))
    found = values(runs, "am-lora")[:3]
    assert f"{found.mean():.1f} ± {found.std(ddof=1):.1f}" in texts
    assert any("has the highest average accuracy" in text for text in texts)
    assert "Order 2: c → a → b (model some/model, metric rank)" in texts


def with_memory(results: dict, sizes: dict[str, list[int]]) -> dict:
    """What a version that counts bytes writes."""
    for name, own in sizes.items():
        found = {"stored_bytes": own[-1], "stored_bytes_by_task": own, "stored_parameters_by_task": own}
        results["methods"][name] |= {**found, "stored_examples": 2, "stored_examples_by_task": [2] * len(own)}
    return results


def test_curves_are_means_over_seeds_at_each_task(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    matrices = generator.uniform(10, 90, (3, 4, 4))
    runs = []
    for seed, matrix in zip((0, 0, 1), matrices, strict=True):
        results = make_results({"replay": 50.0}, list("abcd"), seed)
        results["methods"]["replay"]["matrix"] = matrix.tolist()
        runs.append(write_run(tmp_path / str(len(runs)), with_memory(results, {"replay": [10, 20, 30, 40 + 2 * seed]})))
    (row,) = compare_runs(runs)
    so_far = np.array([[m[k, : k + 1].mean() for k in range(4)] for m in matrices])
    fell = np.array([[m[j:3, j].max() - m[3, j] for j in range(3)] for m in matrices])
    for key, values in (("accuracy_so_far", so_far), ("forgetting_by_task", fell)):
        by_seed = np.stack([values[:2].mean(0), values[2]])
        np.testing.assert_allclose(row["curves"][key]["mean"], by_seed.mean(0), rtol=1e-12)
        np.testing.assert_allclose(row["curves"][key]["std"], by_seed.std(0, ddof=1), rtol=1e-9)
    assert row["curves"]["stored_bytes_by_task"]["mean"] == [10, 20, 30, 41]
    assert row["mean"]["stored_bytes"] == 41


def headings(folder: Path) -> list[str]:
    source = (folder / "compare.html").read_text(encoding="utf-8")
    return [part.split("</h4>")[0] for part in source.split("<h4>")[1:]]


def test_runs_are_drawn_together(tmp_path: Path) -> None:
    scores = {"replay": 40.0, "multi-task": 80.0, "per-task": 70.0}
    sizes = {"replay": [100, 200, 300], "multi-task": [100], "per-task": [100, 200, 300]}
    run = write_run(tmp_path / "r", with_memory(make_results(scores), sizes))
    rows = compare_runs([run], tmp_path)
    assert headings(tmp_path) == [
        "Accuracy over the stream",
        "Forgetting by task",
        "Accuracy against stored memory",
        "Stored memory over the stream",
    ]
    assert rows[1]["curves"]["stored_bytes_by_task"]["mean"] == [None, None, 100]
    source = (tmp_path / "compare.html").read_text(encoding="utf-8")
    for tooltip in ("replay at 3: 40.0", "per-task, a: 0.0", "replay: 40.0 at 300 B", "multi-task at 3: 100 B"):
        assert f"<title>{tooltip}</title>" in source
    assert "<title>multi-task, " not in source, "where nothing is known of forgetting nothing is drawn"


def test_runs_of_older_versions_are_drawn_by_stored_numbers(tmp_path: Path) -> None:
    old = write_run(tmp_path / "old", make_results({"replay": 40.0}, seed=0))
    rows = compare_runs([old], tmp_path)
    assert rows[0]["mean"]["stored_bytes"] is None
    assert headings(tmp_path) == ["Accuracy over the stream", "Forgetting by task", "Accuracy against stored memory"]
    assert "<title>replay: 40.0 at 2 048</title>" in (tmp_path / "compare.html").read_text(encoding="utf-8")
    # beside one that counts bytes, they are named as not known
    sizes = {"replay": [100, 200, 300]}
    new = write_run(tmp_path / "new", with_memory(make_results({"replay": 50.0}, rank=4), sizes))
    compare_runs([old, new], tmp_path)
    source = (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert "Not known, or nothing stored: replay (rank=8)." in source
    assert "<title>replay (rank=4): 50.0 at 300 B</title>" in source
    assert "| 2 048 | – |" in markdown_table(rows)


def test_one_task_is_drawn_without_forgetting(tmp_path: Path) -> None:
    compare_runs([write_run(tmp_path / "r", make_results({"replay": 40.0}, ["only"]))], tmp_path)
    assert headings(tmp_path) == ["Accuracy over the stream", "Accuracy against stored memory"]


def test_names_are_harmless_everywhere(tmp_path: Path) -> None:
    evil = "<script>|[red]x_1\x1b[31m"
    run = write_run(tmp_path / "r", make_results({evil: 40.0}, [evil, "b"]))
    rows = compare_runs([run], tmp_path)
    source = (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert "<script" not in source
    assert "\x1b" not in source
    table = markdown_table(rows)
    assert "&lt;script>\\|\\[red\\]x\\_1" in table
    assert len({line.replace("\\|", "").count("|") for line in table.splitlines() if line.startswith("|")}) == 1
    shown = terminal(render_table(rows))
    assert "<script>|[red]x_1" in shown
    assert "\x1b" not in shown


def terminal(table: object) -> str:
    console = pytest.importorskip("rich.console").Console(width=160, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_tables_for_terminal_and_markdown(runs: list[Path]) -> None:
    rows = compare_runs(runs)
    table = render_table(rows)
    assert table.row_count == len(rows)
    found = values(runs, "am-lora")[:3]
    shown = terminal(table)
    assert f"{found.mean():.1f}±{found.std(ddof=1):.1f}" in shown
    assert "order 2: c → a → b" in shown
    lines = markdown_table(rows).splitlines()
    assert lines[0].startswith("| Method | Order | Seeds | Average accuracy |")
    assert lines[2].startswith(f"| seq-lora | 1 | 3 | {values(runs, 'seq-lora')[:3].mean():.1f} ± ")
    assert lines[4].startswith("| seq-lora | mean | 3 | ")


def test_matrix_table_shows_each_cell(tmp_path: Path) -> None:
    entry = {"matrix": [[81.25, None], [70.04, float("nan")]]}
    table = matrix_table("seq-lora", entry, ["first", "[bold]second"])
    shown = terminal(table)
    assert table.row_count == 2
    for text in ("seq-lora", "81.2", "70.0", "[bold]second"):
        assert text in shown
    assert shown.count("–") == 2
    with pytest.raises(ValueError, match="matrix must have 3 rows, one a task, found 2 rows"):
        matrix_table("seq-lora", entry, ORDER)


def test_problems_are_told_together(runs: list[Path], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError) as caught:
        compare_runs([runs[0], runs[0], tmp_path / "nowhere", empty], tmp_path / "out")
    lines = str(caught.value).splitlines()
    told = ("given twice", "no such folder", "holds no results.json")
    assert [words in line for words, line in zip(told, lines, strict=True)] == [True] * 3
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="nothing to compare"):
        compare_runs([])


@pytest.mark.parametrize("count", [1, 7])
def test_plot_of_a_stream(tmp_path: Path, count: int) -> None:
    pytest.importorskip("matplotlib")
    tasks = [f"task_{i} $x$" for i in range(count)]
    results = make_results({"seq-lora": 40.0, "multi-task": 80.0, "_own & <b>": 60.0}, tasks)
    plot_stream(results, tmp_path / "plot.svg")
    first = (tmp_path / "plot.svg").read_bytes()
    assert ElementTree.fromstring(first).tag.endswith("svg")
    for name in results["methods"]:
        assert f"<!-- {name.replace('&', '&amp;').replace('<', '&lt;').replace('>', '&gt;')} -->".encode() in first
    plot_stream(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plot.png", "plot.svg"]


def test_plot_refuses_other_suffixes_and_broken_results(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"written as \.svg or \.png"):
        plot_stream(make_results({"replay": 40.0}), tmp_path / "plot.pdf")
    with pytest.raises(ValueError, match="'tasks' must be"):
        plot_stream({**make_results({"replay": 40.0}), "tasks": []}, tmp_path / "plot.svg")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = compare_runs([write_run(tmp_path / "r", make_results({"replay": 40.0}))], tmp_path / "out")
    for module in ("rich.table", "matplotlib"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install 'folklora\[cli\]'"):
        render_table(rows)
    with pytest.raises(ImportError, match=r"pip install 'folklora\[report\]'"):
        plot_stream(make_results({"replay": 40.0}), tmp_path / "plot.svg")
