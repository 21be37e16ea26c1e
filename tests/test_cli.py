"""The command line: what it lists, writes and refuses; a refused request leaves nothing behind."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM

from folklora import cli, methods
from folklora.stream.learn import learn
from folklora.stream.run import Run

SETTINGS = {"r": 2, "dropout": 0.0, "learning_rate": 0.02, "batch_size": 8, "max_length": 48, "epochs": 2}
SETS = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]
LABELS = {"xx": (" yes", " no"), "yy": (" no", " yes")}


class Ended(NamedTuple):
    """How a command ended; line breaks and repeated spaces of a table or paragraph do not count."""

    code: int
    out: str
    err: str


Folklora = Callable[..., Ended]


@pytest.fixture
def folklora(monkeypatch, capsys) -> Folklora:
    """`folklora(word, ...)` runs the command line in this process."""

    def go(*words: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["folklora", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.run()
        read = capsys.readouterr()
        return Ended(ended.value.code or 0, " ".join(read.out.split()), " ".join(read.err.split()))

    monkeypatch.setattr(cli, "console", Console(width=400))
    levels = {name: logging.getLogger(name).level for name in ("accelerate", "datasets", "trl")}
    verbosity = transformers.logging.get_verbosity()
    with warnings.catch_warnings():
        yield go
    transformers.logging.set_verbosity(verbosity)
    transformers.utils.logging.enable_progress_bar()
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture(scope="module")
def model_folder(tiny_llama, tiny_tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(1).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def write_tasks(folder: Path) -> list[Path]:
    for name, labels in LABELS.items():
        (folder / name).mkdir(parents=True)
        for split, count in (("train", 24), ("test", 12)):
            rows = [{"prompt": f"{name}: {'abcd'[i % 4]}\nAnswer:", "completion": labels[i % 2]} for i in range(count)]
            (folder / name / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (folder / name / "task.json").write_text(json.dumps({"labels": list(labels)}))
    return [folder / name for name in LABELS]


@pytest.fixture
def tasks(tmp_path) -> list[Path]:
    return write_tasks(tmp_path / "tasks")


@pytest.fixture(scope="module")
def runs(model_folder, tmp_path_factory) -> list[Path]:
    """Two finished runs with different seeds."""
    folder = tmp_path_factory.mktemp("runs")
    sources = write_tasks(folder / "tasks")
    for seed in (0, 1):
        learn(model_folder, sources, ["seq-lora", "am-lora"], out=folder / f"run{seed}", options=SETTINGS, seed=seed)
    return [folder / "run0", folder / "run1"]


@pytest.fixture
def refused(folklora, model_folder, tasks, tmp_path) -> Callable[..., str]:
    """`refused(word, ...)` is what `learn` says on standard error; fails where it began or left anything."""

    def go(
        *words: object, sources: list[object] | None = None, method: str = "seq-lora", out: Path | None = None
    ) -> str:
        places = [word for task in (tasks if sources is None else sources) for word in ("--tasks", task)]
        out = out or tmp_path / "run"
        before = sorted(tmp_path.rglob("*"))
        start = ["learn", "--model", model_folder] if "--model" not in words else ["learn"]
        ended = folklora(*start, *places, "--method", method, "--out", out, *SETS, *words)
        assert ended.code == 1, ended
        assert ended.err.startswith("error: ")
        assert "Traceback" not in ended.err
        assert "learnt" not in ended.out
        assert "after task" not in ended.out
        assert not out.exists()
        assert sorted(tmp_path.rglob("*")) == before
        return ended.err

    return go


def test_methods_lists_every_method_with_its_room_and_paper(folklora):
    ended = folklora("methods")
    assert ended.code == 0
    for method in methods():
        row = " ".join(f"{method.name} {method.room} {method.trains} {method.paper}".split())
        assert row in ended.out
    assert len(methods()) > 8
    continual = folklora("methods", "--room", "continual").out
    assert "seq-lora" in continual
    assert "kasa" not in continual


def test_env_names_versions_and_devices(folklora):
    ended = folklora("env")
    assert ended.code == 0
    for name in ("folklora", "torch", "transformers", "peft", "safetensors"):
        assert f"{name} {importlib.metadata.version(name)}" in ended.out
    assert "devices" in ended.out


def test_learn_teaches_and_says_where_the_report_is(folklora, model_folder, tasks, tmp_path):
    places = [word for task in tasks for word in ("--tasks", task)]
    out = tmp_path / "run"
    ended = folklora("learn", "--model", model_folder, *places, "--method", "seq-lora", "--out", out, *SETS)
    assert ended.code == 0, ended.err
    assert "after task 2:" in ended.out
    assert f"report: {out / 'report.html'}" in ended.out
    assert len(Run.load(out).results["methods"]["seq-lora"]["matrix"]) == 2


def test_learn_without_what_it_needs_says_what(folklora, tmp_path):
    ended = folklora("learn", "--out", tmp_path / "run")
    assert ended.code == 1
    assert "learn needs --model, --tasks" in ended.err


def test_a_missing_task_is_named(refused, tasks, tmp_path):
    assert str(tmp_path / "nowhere") in refused(sources=[tasks[0], tmp_path / "nowhere"])
    (tasks[1] / "test.jsonl").unlink()
    assert "test.jsonl" in refused()


def test_a_bad_line_is_named_by_file_and_number(refused, tasks):
    file = tasks[1] / "train.jsonl"
    lines = file.read_text().splitlines()
    lines[4] = '{"prompt": "yy: a", "completion"'
    file.write_text("\n".join(lines))
    assert f"{file}:5" in refused()


def test_a_label_that_training_never_had_is_named(refused, tasks):
    (tasks[0] / "task.json").unlink()
    for split, labels in (("train", ("good", "bad")), ("test", ("good", "ugly"))):
        rows = [{"text": f"film {i}", "label": labels[i % 2]} for i in range(8)]
        (tasks[0] / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    said = refused()
    assert f"{tasks[0] / 'test.jsonl'}:2" in said
    assert all(word in said for word in ("ugly", "good", "bad"))


def test_every_problem_of_every_task_is_told_at_once(refused, tasks, tmp_path):
    (tasks[0] / "train.jsonl").write_text("no json")
    (tasks[1] / "test.jsonl").write_text("")
    said = refused()
    assert str(tasks[0] / "train.jsonl") in said
    assert str(tasks[1] / "test.jsonl") in said


def test_unknown_names_are_answered_with_the_nearest(refused):
    said = refused(method="seq-loar")
    assert "there is no method 'seq-loar'" in said
    assert "nearest are seq-lora" in said
    said = refused("--set", "learningrate=1")
    assert "there is no option 'learningrate'" in said
    assert "did you mean learning_rate" in said
    assert "'memry'" in refused("--set", "memry=3", method="replay")
    assert "'kasaa'" in refused("--set", "adapter=kasaa")


def test_an_adapter_given_as_method_is_answered_with_how_to_train_it(refused):
    said = refused(method="kasa")
    assert "--method seq-lora --set adapter=kasa" in said


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--set", "r"], "'r' is not of the form option=value"),
        (["--set", "r=many"], "r must be int"),
        (["--set", "epochs=0"], "epochs must be above 0"),
        (["--set", "learning_rate=-1"], "learning_rate must be above 0"),
        (["--set", "batch_size=9", "--set", "accumulation=2"], "choose a multiple of 2"),
        (["--set", "schedule=steep"], "schedule must be constant, linear or cosine"),
        (["--metric", "f1"], "metric must be auto, rank or exact, not 'f1'"),
        (["--validation", "1.5"], "to hold out must lie between 0 and 1, not 1.5"),
        (["--prompt", "no place for it"], "{text}"),
        (["--set", "max_length=2"], "max_length"),
    ],
)
def test_values_that_cannot_be_are_refused(refused, tasks, words, expected):
    rows = [json.dumps({"text": f"film {i}", "label": ("yes", "no")[i % 2]}) for i in range(24)]
    (tasks[0] / "train.jsonl").write_text("\n".join(rows))
    (tasks[0] / "test.jsonl").write_text("\n".join(rows))
    assert expected in refused(*words)


@pytest.mark.parametrize("value", ["query", '["q_proj", "query"]'])
def test_targets_that_match_nothing_are_answered_with_the_layers_there_are(refused, value):
    said = refused("--set", f"target_modules={value}")
    assert "query" in said
    assert "matches no layer" in said
    assert all(name in said for name in ("q_proj", "v_proj", "o_proj", "down_proj"))


@pytest.mark.parametrize("method", ["seq-lora", "am-lora"])
def test_a_rank_above_a_layers_size_names_the_layer(refused, method):
    said = refused("--set", "r=17", method=method)
    assert "layers.0.self_attn.v_proj" in said
    assert "17" in said
    assert "16" in said
    assert "q_proj" not in said, "32 × 32 has room for rank 17"


def test_a_run_that_cannot_be_written_is_refused(refused, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "cannot write to" in refused(out=tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "mine"
    if Path("/proc/self").is_dir():
        assert "cannot write to" in refused(out=Path("/proc/folklora-run"))


def test_a_model_that_is_not_there_is_named(refused, tmp_path):
    assert str(tmp_path / "none") in refused("--model", tmp_path / "none")


def test_options_can_come_from_a_file(folklora, model_folder, tasks, tmp_path):
    file = tmp_path / "run.yaml"
    places = "\n".join(f"  - {task}" for task in tasks)
    file.write_text(
        f"model: {model_folder}\ntasks:\n{places}\nmethod: seq-lora\nseed: 4\n"
        "set:\n  r: 3\n  learning_rate: 1e-2\n  batch_size: 8\n  max_length: 48\n  target_modules: [v_proj]\n"
    )
    ended = folklora("learn", "--config", file, "--out", tmp_path / "run", "--set", "r=2")
    assert ended.code == 0, ended.err
    results = Run.load(tmp_path / "run").results
    settings = results["methods"]["seq-lora"]["settings"]
    assert settings["r"] == 2, "the command line goes before the file"
    assert settings["learning_rate"] == 0.01
    assert settings["target_modules"] == ["v_proj"]
    assert results["seed"] == 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("modle: x\n", "unknown option modle; known: "),
        ("- model\n", "expected options by name"),
        ("model: [\n", "not valid YAML"),
        ("set: r\n", "set"),
        ("set: {rank: 2}\n", "there is no option 'rank'"),
    ],
)
def test_a_file_with_what_cannot_be_is_refused(refused, tmp_path, text, expected):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert expected in refused("--config", file)


def test_report_is_written_anew_and_holds_every_method(folklora, runs):
    file = runs[0] / "report.html"
    file.unlink()
    ended = folklora("report", runs[0])
    assert ended.code == 0
    assert f"written: {file}" in ended.out
    text = file.read_text()
    assert "seq-lora" in text
    assert "am-lora" in text
    assert "http://" not in text.replace("http://www.w3.org", "")


def test_report_of_no_run_says_so(folklora, tmp_path):
    ended = folklora("report", tmp_path)
    assert ended.code == 1
    assert str(tmp_path) in ended.err


def test_compare_makes_one_table_of_two_seeds(folklora, runs, tmp_path):
    ended = folklora("compare", *runs, "--out", tmp_path / "both")
    assert ended.code == 0, ended.err
    assert ended.out.count("seq-lora") == 1, "equal runs with other seeds are one row"
    assert "am-lora" in ended.out
    assert (tmp_path / "both" / "compare.html").is_file()
    json.loads((tmp_path / "both" / "compare.json").read_text())


def test_explain_shows_which_task_answers_a_text(folklora, runs):
    prompt = "xx: c\nAnswer:"
    ended = folklora("explain", runs[0], "c", "--prompt", "xx: {text}\nAnswer:", "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert found["prompt"] == prompt
    assert list(found["methods"]) == ["am-lora"], "seq-lora answers every prompt in the same way"
    (weights,) = found["methods"]["am-lora"]["weights"]
    seen = Run.load(runs[0]).results["methods"]["am-lora"]["attention"]
    assert found["methods"]["am-lora"]["layers"] == seen["layers"]
    assert [sum(row) for row in weights] == pytest.approx([1.0] * 4, abs=3e-6)
    ended = folklora("explain", runs[0], prompt)
    mean = [100 * sum(column) / 4 for column in zip(*weights, strict=True)]
    assert "none xx yy mean over the layers " + " ".join(f"{value:.1f}" for value in mean) in ended.out
    ended = folklora("explain", runs[0], prompt, "--layers")
    for layer, row in zip(seen["layers"], weights, strict=True):
        assert f"{layer} " + " ".join(f"{100 * value:.1f}" for value in row) in ended.out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--method", "seq-lora"], "seq-lora: answers every prompt in the same way"),
        (["--method", "slm"], "has no method slm; it has seq-lora, am-lora"),
        (["--prompt", "no place"], "it must hold {text}"),
        (["--model", "/nowhere/model"], "there is no model in /nowhere/model"),
    ],
)
def test_what_cannot_be_explained_says_why(folklora, runs, tmp_path, words, expected):
    ended = folklora("explain", runs[0], "xx: c", *words)
    assert ended.code == 1
    assert expected in ended.err
    assert "holds no run" in folklora("explain", tmp_path, "xx: c").err


def test_an_exported_adapter_gives_stock_peft_the_same_logits(folklora, runs, model_folder, tmp_path):
    saved = Run.load(runs[0]).adapters("seq-lora")
    ended = folklora("export", saved, "--model", model_folder, "--out", tmp_path / "lora")
    assert ended.code == 0, ended.err
    assert "4 layers, LoRA rank 2, scaling 1" in ended.out
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"

    def logits(folder: Path) -> torch.Tensor:
        base = AutoModelForCausalLM.from_pretrained(model_folder)
        with torch.no_grad():
            return PeftModel.from_pretrained(base, str(folder)).eval()(ids).logits

    ids = torch.arange(2, 26).view(2, 12)
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(model_folder)(ids).logits
    assert (logits(saved) - plain).abs().max() > 1e-3, "the adapter does something"
    torch.testing.assert_close(logits(tmp_path / "lora"), logits(saved), rtol=1e-5, atol=1e-5)


def test_an_adapter_with_gates_is_not_exported(folklora, runs, model_folder, tmp_path):
    saved = Run.load(runs[0]).adapters("am-lora")
    ended = folklora("export", saved, "--model", model_folder, "--out", tmp_path / "lora")
    assert ended.code == 1
    assert "its update depends on each layer's input" in ended.err
    assert not (tmp_path / "lora").exists()


def test_export_of_what_is_no_adapter_says_so(folklora, model_folder, tmp_path):
    ended = folklora("export", tmp_path, "--model", model_folder, "--out", tmp_path / "lora")
    assert ended.code == 1
    assert "holds no adapter_model.safetensors" in ended.err
