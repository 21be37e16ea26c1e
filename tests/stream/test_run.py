"""The run directory: full disks, other models, poisoned folders; nothing in a folder is ever run."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from folklora import LoRA
from folklora.continual import IncLoRA
from folklora.stream.learn import learn
from folklora.stream.run import Run, RunError, create_run, load_adapters, save_adapters
from folklora.stream.tasks import Example, Task

QUICK = {"r": 2, "dropout": 0.0, "learning_rate": 0.02, "batch_size": 8, "max_length": 48, "epochs": 1}


class StoppedError(Exception):
    """What the tests end a run with, as a killed process would."""


def stop_after_first_row(event: str, **details: Any) -> None:
    if event == "row":
        raise StoppedError


def make_task(name: str, labels: tuple[str, str]) -> Task:
    rows = tuple(Example(f"{name}: {'abcd'[i % 4]}\nAnswer:", labels[i % 2]) for i in range(24))
    return Task(name, rows, rows[:8], labels)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def scores(run: Run) -> dict[str, Any]:
    return {name: (entry["matrix"], entry["losses"]) for name, entry in run.results["methods"].items()}


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    return [make_task("xx", (" yes", " no")), make_task("yy", (" no", " yes"))]


@pytest.fixture(scope="module")
def make_model(tiny_llama, tiny_tokenizer) -> Callable[[Path, int], Path]:
    def make(folder: Path, seed: int) -> Path:
        tiny_llama(seed).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def model_folder(make_model, tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), 1)


@pytest.fixture(scope="module")
def half(model_folder, tasks, tmp_path_factory) -> Path:
    """A run of AM-LoRA that ended after the first of two tasks; to be copied, not changed."""
    folder = tmp_path_factory.mktemp("half") / "run"
    with pytest.raises(StoppedError):
        learn(model_folder, tasks, "am-lora", out=folder, options=QUICK, progress=stop_after_first_row)
    return folder


@pytest.fixture
def begun(half, tmp_path) -> Path:
    """A copy of `half`."""
    return Path(shutil.copytree(half, tmp_path / "run"))


@pytest.fixture
def go_on(model_folder, tasks) -> Callable[..., Run]:
    def go(out: Path, model: Path = model_folder) -> Run:
        return learn(model, tasks, "am-lora", out=out, options=QUICK, resume=True)

    return go


class Poison:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path) -> Path:
    return tmp_path / "the-pickle-was-run"


@pytest.fixture
def poison(marker) -> bytes:
    """A pickle that makes `marker` when it is loaded, as is proved here."""
    data = pickle.dumps(Poison(marker))
    pickle.loads(data)
    marker.rmdir()
    return data


def test_a_run_resumed_after_its_first_task_ends_as_one_that_went_through(begun, go_on, model_folder, tasks, tmp_path):
    with pytest.raises(RunError, match="no results yet"):
        _ = Run.load(begun).results
    whole = learn(model_folder, tasks, "am-lora", out=tmp_path / "whole", options=QUICK)
    assert scores(go_on(begun)) == scores(whole)


def test_a_folder_without_a_run_is_neither_opened_nor_resumed(go_on, tmp_path):
    with pytest.raises(RunError, match=r"no run\.json"):
        Run.load(tmp_path)
    with pytest.raises(RunError, match="no run to resume"):
        go_on(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", [64, 8192], ids=["the configuration does not fit", "the tensors do not fit"])
def test_a_full_disk_is_told_and_the_state_before_stays_whole(model_folder, tasks, tmp_path, limit):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    options = {**QUICK, "r": 16}
    out, rows = tmp_path / "run", []

    def fill(event: str, **details: Any) -> None:
        rows.append(event)
        # no file may grow beyond the limit: a write fails with an error of the system, as on a full disk
        if event == "evaluate" and "row" in rows:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))

    try:
        with pytest.raises(RunError, match=r"cannot write .*task-002.*go on by --resume"):
            learn(model_folder, tasks, "seq-lora", out=out, options=options, progress=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    run = Run.load(out)
    assert run.finished("seq-lora") == 1
    assert not list(out.rglob("*.tmp"))
    assert not (out / "results.json").exists()
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), str(run.adapters("seq-lora")))
    learn(model_folder, tasks, "seq-lora", out=out, options=options, resume=True)
    whole = learn(model_folder, tasks, "seq-lora", out=tmp_path / "whole", options=options)
    assert scores(run) == scores(whole)


def test_a_disk_that_is_full_at_the_start_leaves_no_folder(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        with pytest.raises(RunError, match="cannot write to"):
            create_run(tmp_path / "run", {"model": "m" * 100}, resume=False, overwrite=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_not_resumed_with_another_model(begun, go_on, make_model, tmp_path):
    other = make_model(tmp_path / "other", 2)
    before = contents(begun)
    with pytest.raises(RunError, match=r"cannot be resumed:\s+model: "):
        go_on(begun, other)
    assert contents(begun) == before
    # the same request, so that the adapters themselves must tell
    request = Run.load(begun).request
    (begun / "run.json").write_text(json.dumps({**request, "model": str(other)}))
    before = contents(begun)
    with pytest.raises(ValueError, match="made for another base model's weights"):
        go_on(begun, other)
    assert contents(begun) == before


def test_a_run_is_not_resumed_with_other_examples(begun, model_folder, tasks):
    changed = [tasks[0], make_task("yy", (" yes", " no"))]
    with pytest.raises(RunError, match="digests"):
        learn(model_folder, changed, "am-lora", out=begun, options=QUICK, resume=True)


def test_a_pickle_in_place_of_the_adapters_is_not_loaded(begun, go_on, poison, marker):
    adapters = begun / "am-lora" / "task-001" / "adapters"
    (adapters / "adapter_model.safetensors").unlink()
    (adapters / "adapter_model.bin").write_bytes(poison)
    with pytest.raises(RunError, match=r"no adapter_model\.safetensors; other formats are not loaded"):
        go_on(begun)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["adapters/adapter_model.safetensors", "carried.safetensors"])
@pytest.mark.parametrize("kind", ["pickle", "half"])
def test_what_is_not_safetensors_is_refused_in_words(begun, go_on, poison, marker, name, kind):
    file = begun / "am-lora" / "task-001" / name
    whole = file.read_bytes() if file.exists() else b"\x40"
    file.write_bytes(poison if kind == "pickle" else whole[: len(whole) // 2])
    with pytest.raises(RunError, match=rf"{file.name} is not in safetensors format, or is damaged"):
        go_on(begun)
    assert not marker.exists()


def test_a_damaged_record_is_named(begun, go_on):
    (begun / "am-lora" / "task-001" / "state.json").write_text('{"row": [')
    with pytest.raises(ValueError, match=r"task-001/state\.json:1:\d+: not valid JSON"):
        go_on(begun)


def test_a_pickled_base_model_is_not_loaded(make_model, tasks, poison, marker, tmp_path):
    folder = make_model(tmp_path / "model", 1)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(poison)
    with pytest.raises(OSError, match="safetensors"):
        learn(folder, tasks, "seq-lora", out=tmp_path / "run", options=QUICK)
    assert not marker.exists()
    assert not (tmp_path / "run").exists()


def add_code(folder: Path, marker: Path, model_type: str) -> None:
    """Give a model's folder code of its own, which makes `marker` and fails."""
    (folder / "own_code.py").write_text(f"import os\nos.mkdir({str(marker)!r})\nraise ValueError('the code ran')\n")
    classes = {"AutoConfig": "own_code.C", "AutoModelForCausalLM": "own_code.M", "AutoTokenizer": [None, "own_code.T"]}
    for name, extra in (("config.json", {"model_type": model_type}), ("tokenizer_config.json", {})):
        read = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**read, **extra, "auto_map": classes}))


@pytest.mark.parametrize("model_type", ["llama", "a-type-of-its-own"])
def test_a_models_own_code_is_not_run_unless_asked(make_model, tasks, marker, tmp_path, monkeypatch, model_type):
    folder = make_model(tmp_path / "model", 1)
    add_code(folder, marker, model_type)
    if model_type == "llama":
        run = learn(folder, tasks[:1], "seq-lora", out=tmp_path / "run", options=QUICK)
        assert run.finished("seq-lora") == 1, "transformers has this type itself"
    else:
        with pytest.raises(ValueError, match="custom code"):
            learn(folder, tasks, "seq-lora", out=tmp_path / "run", options=QUICK)
        assert not (tmp_path / "run").exists()
    assert not marker.exists()
    # the code is of the kind that runs where it is allowed to
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(ValueError, match="the code ran"):
        learn(folder, tasks, "seq-lora", out=tmp_path / "trusted", options=QUICK, trust_remote_code=True)
    assert marker.exists()


def test_tasks_saved_state_is_plain_data(half):
    kinds = {path.suffix for path in half.rglob("*") if path.is_file()}
    assert kinds <= {".json", ".jsonl", ".safetensors", ".md"}
    state = Run.load(half).states("am-lora")[0]
    assert all(0 <= value <= 100 for value in state["row"])
    assert torch.isfinite(torch.tensor([point["loss"] for point in state["losses"]])).all()


def test_adapters_that_a_task_left_alone_are_not_written_again(model_folder, tasks, tmp_path):
    out, before = tmp_path / "run", {}

    def note(event: str, **details: Any) -> None:
        if event == "train" and details["index"] == 1:
            folder = out / "inc-lora/task-001/adapters/task_0"
            before.update({path.name: (path.stat().st_ino, path.read_bytes()) for path in folder.iterdir()})

    learn(model_folder, tasks, "inc-lora", out=out, options=QUICK, progress=note)
    folder = out / "inc-lora/task-002/adapters"
    assert {path.name: (path.stat().st_ino, path.read_bytes()) for path in (folder / "task_0").iterdir()} == before
    assert "adapter_model.safetensors" in before
    assert (folder / "task_1/adapter_model.safetensors").stat().st_nlink == 1
    loaded = load_adapters(AutoModelForCausalLM.from_pretrained(model_folder), folder)
    assert set(loaded.peft_config) == {"task_0", "task_1"}


def test_where_files_cannot_be_linked_they_are_copied(model_folder, tmp_path, monkeypatch):
    def refuse(*names: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    model = IncLoRA(LoRA(r=2)).start(AutoModelForCausalLM.from_pretrained(model_folder))
    IncLoRA(LoRA(r=2)).prepare(model, None, [], 1)
    save_adapters(model, tmp_path / "one")
    save_adapters(model, tmp_path / "two", tmp_path / "one", ["task_1"])
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    # what was never written has to be, whoever says that it did not change
    save_adapters(model, tmp_path / "three", tmp_path / "none", ["task_1"])
    assert contents(tmp_path / "three") == contents(tmp_path / "one")
