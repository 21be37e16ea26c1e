from __future__ import annotations

import json
import pickle
import sys
from collections import Counter
from dataclasses import replace

import datasets
import pytest

from folklora.stream.tasks import Example, Task, TaskError, hold_out, load_task, load_tasks

TRAIN = [
    {"text": "good", "label": "positive"},
    {"text": "bad", "label": "negative"},
    {"text": "fine", "label": "positive"},
]
TEST = [{"text": "awful", "label": "negative"}]
COMPLETED = [{"prompt": "2 + 2 =", "completion": " 4"}, {"prompt": "3 + 3 = ", "completion": "6"}]


def _lines(rows):
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n"


def _folder(path, train=TRAIN, test=TEST, settings=None):
    path.mkdir()
    (path / "train.jsonl").write_text(_lines(train))
    (path / "test.jsonl").write_text(_lines(test))
    if settings is not None:
        (path / "task.json").write_text(json.dumps(settings))
    return path


def _problems(*sources, **given):
    with pytest.raises(TaskError) as caught:
        load_tasks(sources, **given)
    return caught.value.problems


def test_a_folder_of_texts_and_labels(tmp_path):
    task = load_task(_folder(tmp_path / "sentiment"))
    assert task.name == "sentiment"
    assert task.train[0] == Example("good\nAnswer:", " positive")
    assert [example.completion for example in task.train] == [" positive", " negative", " positive"]
    assert task.test == (Example("awful\nAnswer:", " negative"),)
    assert task.labels == (" negative", " positive")
    assert task.validation == ()


def test_the_templates_only_replace_their_field(tmp_path):
    rows = [{"text": "{label} {0} %s {text}", "label": "a{text}", "task": "ignored"}]
    folder = _folder(tmp_path / "t", rows, rows)
    assert load_task(folder, "{{{text}}} = ").train == (Example("{{{label} {0} %s {text}}} =", " a{text}"),)


def test_task_json_says_name_labels_prompt_and_completion(tmp_path):
    settings = {
        "name": "mood",
        "labels": ["positive", "negative", "mixed"],
        "prompt": "Q {text}?",
        "completion": ">{label}<",
    }
    task = load_task(_folder(tmp_path / "t", settings=settings), "unused {text}")
    assert task.name == "mood"
    assert task.labels == (">positive<", ">negative<", ">mixed<")
    assert task.train[0] == Example("Q good?", ">positive<")


def test_declared_labels_need_no_training_row(tmp_path):
    settings = {"labels": ["negative", "positive"]}
    task = load_task(_folder(tmp_path / "t", TRAIN[:1], TEST, settings))
    assert task.labels == (" negative", " positive")


def test_labels_null_mean_free_text(tmp_path):
    test = [{"text": "what?", "label": "something new"}]
    task = load_task(_folder(tmp_path / "t", test=test, settings={"labels": None}))
    assert task.labels is None
    assert task.test[0].completion == " something new"


def test_prompts_and_completions(tmp_path):
    task = load_task(_folder(tmp_path / "sums", COMPLETED, COMPLETED[:1]))
    assert task.train == (Example("2 + 2 =", " 4"), Example("3 + 3 =", " 6"))
    assert task.labels is None
    labelled = load_task(_folder(tmp_path / "t", COMPLETED, COMPLETED, {"labels": [" 6", " 4"]}))
    assert labelled.labels == (" 6", " 4")
    assert '" 4"' in _problems(_folder(tmp_path / "u", COMPLETED, COMPLETED, {"labels": [" 6"]}))[0]


def test_two_files_by_name(tmp_path):
    folder = _folder(tmp_path / "x=y")
    task = load_task(f"mood={folder}/train.jsonl,{folder}/test.jsonl")
    assert task.name == "mood"
    assert task == replace(load_task(folder), name="mood")
    assert load_task(folder).name == "x=y"


def test_whole_numbers_are_labels_and_spaces_around_labels_go(tmp_path):
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": "0 "}]
    assert load_task(_folder(tmp_path / "t", rows, rows)).labels == (" 0", " 1")


def test_byte_order_marks_blank_lines_and_crlf(tmp_path):
    folder = _folder(tmp_path / "t", settings={"name": "über"})
    for name in ("train.jsonl", "task.json"):
        path = folder / name
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\r\n"))
    task = load_task(folder)
    assert task.name == "über"
    assert len(task.train) == 3


def test_unicode_line_separators_do_not_end_a_line(tmp_path):
    folder = _folder(tmp_path / "t")
    (folder / "train.jsonl").write_text('{"text": "a\u2028b\x85c", "label": "negative"}\n', encoding="utf-8")
    assert load_task(folder).train[0].prompt == "a\u2028b\x85c\nAnswer:"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "x", "label"', "not valid JSON"),
        ("[1, 2]", "expected an object"),
        ("{}", "are needed; there is neither"),
        ({"text": "x", "labels": "positive"}, 'are needed; there is "text", "labels"'),
        ({"text": " ", "label": "positive"}, '"text" is empty'),
        ({"text": "x", "label": ""}, '"label" is empty'),
        ({"text": "x", "label": None}, '"label" is empty'),
        ({"text": "x", "label": 0.5}, '"label" must be a text, not float'),
        ({"text": "x", "label": True}, '"label" must be a text, not bool'),
        ({"text": 3, "label": "positive"}, '"text" must be a text, not int'),
        (COMPLETED[0], '"prompt", "completion", but'),
        ({"prompt": [{"role": "user"}], "completion": "x"}, '"prompt" must be a text, not list'),
    ],
)
def test_a_bad_line_is_named_with_its_place(tmp_path, line, words):
    folder = _folder(tmp_path / "t", [*TRAIN, line, TRAIN[0]])
    problems = _problems(folder)
    assert len(problems) == 1
    assert problems[0].startswith(f"{folder}/train.jsonl:4: ")
    assert words in problems[0]


def test_a_line_that_is_not_utf8_is_named(tmp_path):
    folder = _folder(tmp_path / "t")
    (folder / "test.jsonl").write_bytes(_lines(TEST).encode() + '{"text": "é", "label": "negative"}'.encode("latin-1"))
    assert _problems(folder) == [f"{folder}/test.jsonl:2: not UTF-8 (byte 11 is 0xe9)"]


def test_a_label_that_training_never_shows(tmp_path):
    folder = _folder(tmp_path / "t", test=[*TEST, {"text": "hm", "label": "mixed"}])
    assert _problems(folder) == [
        f'{folder}/test.jsonl:2: unknown label "mixed"; in training there are "negative", "positive"'
    ]


def test_a_label_that_is_not_declared(tmp_path):
    folder = _folder(tmp_path / "t", settings={"labels": ["positive"]})
    assert [problem.split(";")[0] for problem in _problems(folder)] == [
        f'{folder}/train.jsonl:2: unknown label "negative"',
        f'{folder}/test.jsonl:1: unknown label "negative"',
    ]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"label": ["a"]}, 'unknown "label"; valid are "name", "labels", "prompt", "completion"'),
        ({"labels": "positive"}, '"labels" must be a list of texts, or null'),
        ({"labels": []}, '"labels" must be a list'),
        ({"labels": ["positive", ["negative"]]}, '"labels" must be a list'),
        ({"labels": ["positive", "negative", "positive "]}, '"labels" repeats "positive"'),
        ({"prompt": "no field"}, '"prompt" must be a text with {text}'),
        ({"completion": 3}, '"completion" must be a text with {label}, not 3'),
        ({"name": " "}, '"name" must be a text'),
        (["name"], "expected an object"),
    ],
)
def test_a_bad_task_json(tmp_path, settings, words):
    folder = _folder(tmp_path / "t", settings=settings)
    problems = _problems(folder)
    assert len(problems) == 1
    assert problems[0].startswith(f"{folder}/task.json: ")
    assert words in problems[0]


def test_task_json_that_is_not_json(tmp_path):
    folder = _folder(tmp_path / "t")
    (folder / "task.json").write_text("{")
    assert "not valid JSON" in _problems(folder)[0]


def test_all_problems_of_all_tasks_come_at_once(tmp_path):
    empty = _folder(tmp_path / "empty", test=[])
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "train.jsonl").write_text(_lines(TRAIN))
    problems = _problems(
        tmp_path / "nowhere",
        empty,
        tmp_path / "half",
        f"=x.jsonl,{tmp_path}/y.jsonl",
        f"a={tmp_path}/x.jsonl",
        f"b={tmp_path}/x.jsonl,{tmp_path}/half",
        prompt="no field",
    )
    expected = [
        "prompt template",
        "nowhere: there is no such folder",
        "empty/test.jsonl: the file is empty",
        "half/test.jsonl: cannot be read: No such file",
        "a name and exactly two files",
        "a name and exactly two files",
        "x.jsonl: cannot be read: No such file",
        "half: cannot be read: Is a directory",
    ]
    assert len(problems) == len(expected)
    for problem, words in zip(problems, expected, strict=True):
        assert words in problem


def test_no_tasks_at_all():
    assert "no task" in _problems()[0]


def test_equal_names_are_refused(tmp_path):
    one, two = _folder(tmp_path / "a"), _folder(tmp_path / "b", settings={"name": "a"})
    (problem,) = _problems(one, two)
    assert problem.startswith(f"{two}: the name 'a' is taken by {one}")
    assert [task.name for task in load_tasks([one, f"b={two}/train.jsonl,{two}/test.jsonl"])] == ["a", "b"]


def test_a_long_report_is_cut_but_kept_whole(tmp_path):
    folder = _folder(tmp_path / "t", ["{"] * 100)
    with pytest.raises(TaskError) as caught:
        load_task(folder)
    assert len(caught.value.problems) == 100
    assert len(str(caught.value).splitlines()) == 21
    assert str(caught.value).endswith("80 more problems")
    assert pickle.loads(pickle.dumps(caught.value)).problems == caught.value.problems


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return tmp_path


def test_a_data_set_in_a_local_folder(hub):
    task = load_task(f"hub:{_folder(hub / 'mood')}")
    assert task == load_task(hub / "mood")


def test_classes_become_their_names_in_their_order(hub):
    (hub / "mood").mkdir()
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["pos", "neg"])})
    for split, label in (("train", 1), ("test", 0)):
        data = datasets.Dataset.from_dict({"text": [split], "label": [label]}, features=features)
        data.to_parquet(hub / "mood" / f"{split}.parquet")
    task = load_task(f"hub:{hub / 'mood'}")
    assert task.labels == (" pos", " neg")
    assert (task.train[0].completion, task.test[0].completion) == (" neg", " pos")


def test_hidden_classes_are_said(hub):
    (hub / "mood").mkdir()
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["pos", "neg"])})
    for split, label in (("train", 1), ("test", -1)):
        data = datasets.Dataset.from_dict({"text": [split], "label": [label]}, features=features)
        data.to_parquet(hub / "mood" / f"{split}.parquet")
    assert "test row 0: -1 is no label" in _problems(f"hub:{hub / 'mood'}")[0]


def test_a_configuration_is_chosen_and_named(hub):
    (hub / "many").mkdir()
    files = [{"split": "train", "path": "sums/train.jsonl"}, {"split": "test", "path": "sums/test.jsonl"}]
    configs = json.dumps([{"config_name": "sums", "data_files": files}])
    (hub / "many" / "README.md").write_text(f"---\nconfigs: {configs}\n---\n")
    _folder(hub / "many" / "sums", COMPLETED, COMPLETED)
    task = load_task(f"hub:{hub / 'many'}:sums")
    assert task.name == "many-sums"
    assert task.train[1] == Example("3 + 3 =", " 6")
    assert "cannot be loaded" in _problems(f"hub:{hub / 'many'}:other")[0]


def test_a_data_set_that_does_not_fit(hub):
    rows = [{"sentence": "x", "label": "y"}]
    _folder(hub / "a", rows, rows)
    assert [problem.split("; ")[1] for problem in _problems(f"hub:{hub / 'a'}")] == ['there is "sentence", "label"'] * 2
    _folder(hub / "c", rows, TEST)
    assert "cannot be loaded: " in _problems(f"hub:{hub / 'c'}")[0]
    assert "column" in _problems(f"hub:{hub / 'c'}")[0]
    (hub / "b").mkdir()
    (hub / "b" / "train.jsonl").write_text(_lines(TRAIN))
    assert 'there is no test split; there is "train"' in _problems(f"hub:{hub / 'b'}")[0]
    assert "cannot be loaded" in _problems(f"hub:{hub / 'nowhere'}")[0]


def test_without_the_datasets_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install folklora[train]" in _problems("hub:org/name")[0]


def _labelled(counts):
    examples = [Example(f"{label} {k}", label) for label, count in counts.items() for k in range(count)]
    return Task("t", tuple(examples), (), tuple(counts))


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.9])
def test_hold_out_moves_each_label_in_its_proportion(fraction):
    counts = {" a": 60, " b": 30, " c": 9, " d": 1}
    task = _labelled(counts)
    held = hold_out(task, fraction, seed=0)
    assert len(held.validation) == round(100 * fraction)
    assert sorted(held.train + held.validation, key=task.train.index) == list(task.train)
    assert list(held.train) == sorted(held.train, key=task.train.index)
    moved = Counter(example.completion for example in held.validation)
    for label, count in counts.items():
        assert abs(moved[label] - fraction * count) <= 1
        assert moved[label] < count


def test_hold_out_follows_its_seed():
    task = _labelled({" a": 50, " b": 50})
    assert hold_out(task, 0.2, seed=1) == hold_out(task, 0.2, seed=1)
    assert hold_out(task, 0.2, seed=1) != hold_out(task, 0.2, seed=2)


def test_hold_out_of_free_text_takes_any_example():
    examples = tuple(Example(str(k), f" {k}") for k in range(10))
    held = hold_out(Task("t", examples, (), None), 0.3, seed=0)
    assert len(held.validation) == 3
    twice = hold_out(held, 0.5, seed=0)
    assert twice.validation[:3] == held.validation
    assert len(twice.train) + len(twice.validation) == 10


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
def test_hold_out_refuses_all_or_nothing(fraction):
    with pytest.raises(ValueError, match="between 0 and 1"):
        hold_out(_labelled({" a": 5}), fraction, seed=0)


def test_hold_out_needs_two_examples_of_something():
    with pytest.raises(ValueError, match="too few"):
        hold_out(_labelled({" a": 1, " b": 1}), 0.5, seed=0)


def test_a_real_task(shared_data):
    folder = shared_data / "data" / "cl_benchmark" / "sst2"
    if not folder.is_dir():
        pytest.skip(f"no real task: {folder} is absent")
    task = load_task(folder)
    assert (len(task.train), len(task.test)) == (2000, 500)
    assert task.labels == (" Bad", " Good")
    assert all(example.prompt.endswith("\nAnswer:") for example in task.train)
