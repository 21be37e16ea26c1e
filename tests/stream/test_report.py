"""The page of a run: what stands on it, that it is whole and harmless, and what is said of broken results."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from folklora.stream.plots import accuracy_so_far, plain, read_matrix, verdict
from folklora.stream.report import write_report
from folklora.stream.results import check_results, read_results
from folklora.stream.scales import ticks

TASKS = ["news", "reviews", "questions"]
KEEP = {"seq-lora": 0.6, "replay": 0.9, "multi-task": 1.0, "am-lora": 0.97}
VOID = {"meta", "br", "hr", "img", "input", "link"}


def entry(name: str, count: int, generator: np.random.Generator) -> dict:
    top = generator.uniform(70, 95, count)
    matrix = [
        [
            float(top[j] * KEEP.get(name, 0.8) ** (i - j)) if j <= i else float(generator.uniform(5, 30))
            for j in range(count)
        ]
        for i in range(count)
    ]
    if name == "multi-task":
        matrix = [[None] * count for _ in range(count - 1)] + matrix[-1:]
    last, learned = matrix[-1], [matrix[j][j] for j in range(count)]
    whole = None not in learned and count > 1
    backward = float(np.sum(np.subtract(last, learned)) / (count - 1)) if whole else None
    losses = [{"task": t, "step": s, "loss": 2.0 / (1 + s)} for t in range(count) for s in range(5, 35, 5)]
    return {
        "matrix": matrix,
        "start": [10.0] * count,
        "average_accuracy": float(np.mean(last)),
        "backward_transfer": backward,
        "forgetting": None if backward is None else -backward,
        "forward_transfer": None,
        "learning_accuracy": float(np.mean(learned)) if whole else None,
        "average_incremental_accuracy": None,
        "trainable_parameters": 36864,
        "stored_parameters": 110592,
        "seconds": 12.5,
        "seconds_by_task": [4.0] * count,
        "seed": 0,
        "settings": {"rank": 8, "target_modules": ["q_proj", "v_proj"], "prompt": "{text}\nAnswer:"},
        "losses": losses,
        "attention": None,
    }


def attention(tasks: list[str], layers: int, generator: np.random.Generator) -> dict:
    weights = np.exp(generator.normal(size=(len(tasks), layers, len(tasks) + 1)))
    weights /= weights.sum(-1, keepdims=True)
    names = [f"layers.{i}.q_proj" for i in range(layers)]
    return {"layers": names, "slots": ["none", *tasks], "tasks": tasks, "mean": weights.tolist()}


def make_results(tasks: list[str] = TASKS, methods: tuple[str, ...] = tuple(KEEP), layers: int = 4) -> dict:
    generator = np.random.default_rng(0)
    entries = {name: entry(name, len(tasks), generator) for name in methods}
    if "am-lora" in entries:
        entries["am-lora"]["attention"] = attention(tasks, layers, generator)
    head = {"folklora": "0.1.0", "model": "some/model", "tasks": tasks, "metric": "auto", "seed": 0}
    return {**head, "methods": entries}


class Page(HTMLParser):
    """Collects the tags, the texts and the attributes of a page, and checks that every tag is closed in order."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.texts)

    def cells(self, kind: str) -> int:
        return sum(1 for name, value in self.attributes if name == "class" and value == kind)


def report(results: dict, folder: Path) -> tuple[str, Page]:
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    path = write_report(folder)
    assert path == folder / "report.html"
    source = path.read_text(encoding="utf-8")
    return source, Page(source)


def test_page_is_whole_and_names_everything(tmp_path: Path) -> None:
    results = make_results()
    _, page = report(results, tmp_path)
    for name in [*TASKS, *KEEP, "some/model", "layers.3.q_proj", "target_modules"]:
        assert any(name in text for text in page.texts), name
    # One chart of the average, one a task, one loss curve a method, and two legends with a swatch a method.
    assert page.tags.count("svg") == 1 + len(TASKS) + len(KEEP) + 2 * len(KEEP)
    # Three methods tested after each of 3 tasks, multi-task only at the end (where two tasks are older).
    assert page.cells("now") == 3 * 3 + 1
    assert page.cells("later") == 3 * 3
    attention_cells = (3 + 4 * 3) * 4
    assert page.cells("seen") == 3 * 3 + 2 + attention_cells
    assert page.cells("none") == 2 * 3


def test_matrix_and_scores_are_on_the_page(tmp_path: Path) -> None:
    results = make_results()
    _, page = report(results, tmp_path)
    for name, method in results["methods"].items():
        for row in method["matrix"]:
            for value in row:
                assert value is None or f"{value:.1f}" in page.texts, (name, value)
        assert f"{method['average_accuracy']:.1f}" in page.texts
    change = results["methods"]["seq-lora"]["backward_transfer"]
    assert change < 0
    assert f"\u2212{-change:.1f}" in page.texts
    assert "36\u202f864" in page.texts


def test_names_are_escaped_and_nothing_is_fetched(tmp_path: Path) -> None:
    results = make_results(["<script>alert(1)</script>", "a\"b' onload=x", "c&d\x1b[31m"], ("am-lora", "<img src=x>"))
    results["model"] = "</title><script>"
    results["methods"]["am-lora"]["settings"] = {"<b>": "<script>alert(2)</script>"}
    source, page = report(results, tmp_path)
    assert "<script" not in source.lower()
    assert "\x1b" not in source
    assert not {"script", "link", "img", "iframe", "object", "b"} & set(page.tags)
    assert not {"src", "href", "onload", "xlink:href"} & {name for name, _ in page.attributes}
    assert "http" not in source.replace("http-equiv", "")
    assert "url(" not in source
    assert "@import" not in source
    for name in ["<script>alert(1)</script>", "a\"b' onload=x", "<img src=x>", "</title><script>", "alert(2)"]:
        assert name in page.text


def test_one_task_and_no_attention(tmp_path: Path) -> None:
    _, page = report(make_results(["only"], ("seq-lora",)), tmp_path)
    assert page.cells("now") == 1
    assert page.cells("seen") == page.cells("later") == 0
    assert "What answers each task" not in page.texts
    assert "seq-lora ends with an average accuracy of" in page.text


def test_not_a_number_is_a_gap(tmp_path: Path) -> None:
    results = make_results(TASKS, ("replay",))
    method = results["methods"]["replay"]
    method["matrix"][1][0] = float("nan")
    method["matrix"][2] = None
    method["average_accuracy"] = float("nan")
    method["start"] = None
    method["losses"][3]["loss"] = float("nan")
    source, page = report(results, tmp_path)
    assert "nan" not in source.lower()
    assert page.cells("none") == 1 + 3
    assert "there is no average accuracy to compare" in page.text
    assert read_results(tmp_path)["methods"]["replay"]["matrix"][2] == [None] * 3


def test_no_losses_no_settings(tmp_path: Path) -> None:
    results = make_results(TASKS, ("replay",))
    for key in ("losses", "settings", "start", "attention", "seed"):
        del results["methods"]["replay"][key]
    _, page = report(results, tmp_path)
    assert "Losses in training" not in page.texts
    assert "None recorded." in page.texts


def test_loss_steps_may_count_on_or_anew(tmp_path: Path) -> None:
    anew = make_results(TASKS, ("replay",))
    on = make_results(TASKS, ("replay",))
    for record in on["methods"]["replay"]["losses"]:
        record["step"] += 30 * record["task"]
    assert report(anew, tmp_path)[0] == report(on, tmp_path)[0]
    assert Page(report(on, tmp_path)[0]).cells("mark") == len(TASKS) - 1


def test_every_problem_is_told(tmp_path: Path) -> None:
    results = make_results(TASKS, ("replay", "seq-lora", "am-lora"))
    results["methods"]["replay"]["matrix"][1] = [1.0, 2.0]
    del results["methods"]["replay"]["forgetting"]
    results["methods"]["seq-lora"]["matrix"][2][1] = 130
    results["methods"]["seq-lora"]["losses"] = [{"task": 7, "step": 1, "loss": 0.5}]
    results["methods"]["am-lora"]["attention"]["mean"].pop()
    results["methods"]["am-lora"]["measures_by_task"] = [{"overlap": "much"}]
    (tmp_path / "results.json").write_text(json.dumps(results), encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        write_report(tmp_path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 6
    assert all(line.startswith(str(tmp_path / "results.json")) for line in lines)
    for words in (
        "methods.replay: 'forgetting' is missing",
        "row 2 of the matrix must hold 3 numbers",
        "row 3 of the matrix, column 2: 130 is no percentage",
        "record 0 must have a task from 0 to 2",
        "'mean' must be 3 tasks of 4 layers of 4 slots",
        "methods.am-lora: 'measures_by_task':",
    ):
        assert sum(words in line for line in lines) == 1, words
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tasks": []}, "'tasks' must be a list of task names"),
        ({"methods": {}}, "at least one"),
        ({"model": None}, "'model' must be a text"),
        ({"seed": "zero"}, "'seed' must be a whole number"),
        ({"methods": {"x": 3}}, "methods.x: must be an object"),
    ],
)
def test_wrong_heads(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_results({**make_results(), **change})


def test_what_is_stored_is_shown_where_it_is_known(tmp_path: Path) -> None:
    results = make_results(TASKS, ("replay", "seq-lora", "multi-task"))
    old, _ = report(results, tmp_path)
    assert "What is stored along the stream" not in old
    found = {"stored_bytes": 3_000, "stored_examples": 7, "stored_bytes_by_task": [1_000, 1_500, 3_000]}
    results["methods"]["replay"] |= {**found, "stored_parameters_by_task": [1, 2, 3]}
    results["methods"]["multi-task"] |= {"stored_bytes": 500, "stored_bytes_by_task": [500]}
    source, page = report(results, tmp_path)
    table = source.split("What is stored along the stream")[1].split("</table>")[0]
    cells = [row.split("</td><td>") for row in table.split('<tr><th scope="row">')[1:]]
    assert [row[0].rpartition("<td>")[2] for row in cells] == ["1 kB", "–", "500 B"]
    assert [row[1:3] for row in cells] == [["3 kB", "1 kB"], ["–", "–"], ["500 B", "–"]]
    assert [row[-1].partition("</td>")[0] for row in cells] == ["7", "–", "–"]
    assert "multi-task at 3: 500 B" in page.text
    results["methods"]["replay"]["stored_bytes_by_task"] = [1] * 4
    with pytest.raises(ValueError, match="'stored_bytes_by_task': must hold 3 numbers at most, one a task"):
        check_results(results)


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_results(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no results\.json"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match="must hold one JSON object"):
        read_results(tmp_path)


def test_verdict_gives_the_gaps() -> None:
    text = verdict([("a", 50.04), ("b", 71.3), ("c", None), ("d", 71.32)], [("multi-task", 80.0)])
    assert text.startswith(
        "References aside, b has the highest average accuracy, 71.3 %. Below it: d is level with it, a by 21.3 points."
    )
    assert text.endswith("For reference: multi-task 80.0 %.")
    assert verdict([], [("multi-task", 80.0)]) == "multi-task ends with an average accuracy of 80.0 %."


def test_accuracy_so_far_is_the_mean_of_the_seen_part() -> None:
    matrix = np.random.default_rng(1).uniform(0, 100, (5, 5))
    expected = [matrix[k, : k + 1].mean() for k in range(5)]
    np.testing.assert_allclose(accuracy_so_far(read_matrix(matrix.tolist(), 5)), expected, rtol=1e-12)
    assert accuracy_so_far([[None, 1.0], [1.0, None]]) == [None, None]


@pytest.mark.parametrize("top", [0.03, 1, 2.6, 4, 15, 100, 799, 12345])
def test_ticks_are_few_round_and_even(top: float) -> None:
    found = ticks(top)
    assert 3 <= len(found) <= 7
    assert found[0] == 0
    assert found[-1] <= top * (1 + 1e-9)
    np.testing.assert_allclose(np.diff(found), found[1], rtol=1e-9)


def test_plain_text_keeps_words_and_drops_controls() -> None:
    assert plain("Größe → 3\n\x1b[0m") == "Größe → 3 \ufffd[0m"


def test_best_values_leave_references_out(tmp_path: Path) -> None:
    results = make_results()
    scores = {"seq-lora": 40.0, "replay": 60.0, "multi-task": 90.0, "am-lora": 50.0}
    for name, score in scores.items():
        for key in ("average_accuracy", "backward_transfer", "forgetting", "learning_accuracy"):
            results["methods"][name][key] = score
    source, page = report(results, tmp_path)
    # Of the four columns, forgetting is the one in which less is better.
    assert source.count('<td class="best">') == 4
    assert source.count('<td class="best">60.0</td>') == 2
    assert source.count('<td class="best">+60.0</td>') == 1
    assert source.count('<td class="best">40.0</td>') == 1
    assert "References aside, replay has the highest average accuracy, 60.0 %." in page.text
