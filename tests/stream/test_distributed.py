"""Two processes on the CPU learn what one process learns; the run directory is written once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from folklora.stream.learn import learn
from folklora.stream.run import Run

# 24 examples in batches of 8: every batch is full, and halves for two processes
SETTINGS = {"r": 2, "dropout": 0.0, "learning_rate": 0.01, "batch_size": 8, "max_length": 48, "epochs": 1}
SETTINGS |= {"prompt_length": 3, "pool_size": 4, "top_k": 2, "diversify": True}
METHODS = ["seq-lora", "am-lora", "lwf", "progprompt", "l2p"]
LABELS = {"xx": (" yes", " no"), "yy": (" no", " yes")}

# stops in every process after the first row, then goes on; one start of Python and torch for both
INTERRUPTED = """
import json, sys
from folklora.stream.learn import learn

class Stopped(Exception):
    pass

def stop(event, **details):
    if event == "row":
        raise Stopped

asked = json.loads(sys.argv[1])
try:
    learn(**asked, progress=stop)
except Stopped:
    learn(**asked, resume=True)
"""


def launch(*words: object) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *map(str, words)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert ended.returncode == 0, ended.stderr
    # what a person reads is said once, not by each process
    if "-m" in words:
        assert ended.stdout.count("seq-lora: 2 tasks") == 1, ended.stdout
        assert ended.stdout.count("report: ") == 1, ended.stdout


@pytest.fixture(scope="module")
def model_folder(tiny_llama, tiny_tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(1).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("tasks")
    for name, labels in LABELS.items():
        (folder / name).mkdir()
        for split, count in (("train", 24), ("test", 11)):
            # prompts of different lengths, so that micro-batches differ in tokens and padding
            rows = [
                {"prompt": f"{name}: {'abcd'[i % 4] * (1 + i % 5)}\nAnswer:", "completion": labels[i % 2]}
                for i in range(count)
            ]
            (folder / name / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (folder / name / "task.json").write_text(json.dumps({"labels": list(labels)}))
    return [folder / name for name in LABELS]


@pytest.fixture(scope="module")
def one(model_folder, sources, tmp_path_factory) -> Run:
    return learn(model_folder, sources, METHODS, out=tmp_path_factory.mktemp("one") / "run", options=SETTINGS)


@pytest.fixture(scope="module")
def two(model_folder, sources, tmp_path_factory) -> Run:
    out = tmp_path_factory.mktemp("two") / "run"
    places = [word for source in sources for word in ("--tasks", source)]
    methods = [word for name in METHODS for word in ("--method", name)]
    sets = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]
    launch("-m", "folklora", "learn", "--model", model_folder, *places, *methods, *sets, "--out", out)
    return Run.load(out)


def saved(run: Run, method: str) -> dict[str, torch.Tensor]:
    """All that a method keeps after its last task, by file and name."""
    folder = run.adapters(method).parent
    files = folder.rglob("*.safetensors")
    return {f"{file.relative_to(folder)}:{key}": value for file in files for key, value in load_file(file).items()}


def test_the_run_of_two_processes_is_whole_and_written_once(two, one):
    assert two.request["processes"] == 2
    for name, entry in two.results["methods"].items():
        assert [len(row) for row in entry["matrix"]] == [2, 2]
        # 11 test examples, shared out as 6 and 5: each score counts all of them, each once
        for value in [*entry["start"], *entry["matrix"][0], *entry["matrix"][1]]:
            assert value * 11 / 100 == pytest.approx(round(value * 11 / 100), abs=1e-5)
        assert two.finished(name) == 2
    lines = [json.loads(line) for line in (two.path / "log.jsonl").read_text().splitlines()]
    assert [(line["method"], line["task"]) for line in lines] == [(m, t) for m in METHODS for t in LABELS]
    kept = {str(path.relative_to(two.path)) for path in two.path.rglob("*")}
    assert kept == {str(path.relative_to(one.path)) for path in one.path.rglob("*")}
    assert not any(name.endswith(".tmp") for name in kept)


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_train_what_one_trains(one, two, method):
    first, second = (saved(run, method) for run in (one, two))
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(
            second[name], value, rtol=0, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    zero = [value.abs().max().item() for name, value in first.items() if name.endswith((".B", ".B.0", ".B.1"))]
    if zero:
        assert max(zero) > 1e-2, "B begins at 0, so this is what training did"
    entries = [run.results["methods"][method] for run in (one, two)]
    assert entries[0]["start"] == entries[1]["start"]
    losses = [[point["loss"] for point in entry["losses"]] for entry in entries]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_two_processes_resume_to_the_same_results(two, model_folder, sources, tmp_path):
    script = tmp_path / "interrupted.py"
    script.write_text(INTERRUPTED)
    out = tmp_path / "run"
    asked = {"model": str(model_folder), "tasks": [*map(str, sources)], "method": METHODS, "options": SETTINGS}
    launch(script, json.dumps({**asked, "out": str(out)}))
    for method in METHODS:
        resumed, whole = Run.load(out).results["methods"][method], two.results["methods"][method]
        assert resumed["matrix"] == whole["matrix"]
        assert resumed["losses"] == whole["losses"]
