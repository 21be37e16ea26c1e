"""A run of several methods that is killed outright goes on to the results of one that was left alone."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from folklora import learn
from folklora.stream.files import read_json

# of those the first is killed in its second task: one that carries tensors, and one with an adapter a task
METHODS = {
    "ewc": ["ewc", "o-lora", "lwf"],
    "progprompt": ["progprompt", "l2p"],
}
OPTIONS = {"learning_rate": 0.02, "batch_size": 8, "max_length": 48, "epochs": 2}
OWN = {
    "ewc": {"r": 2, "fisher_examples": 8},
    "progprompt": {"prompt_length": 3, "pool_size": 4, "top_k": 2, "diversify": True},
}
LEFT = {"ewc": "carried.safetensors", "progprompt": "adapters/task_0/adapter_model.safetensors"}

CHILD = """
import json, os, signal, sys
from folklora import learn

asked, seen = json.loads(sys.argv[1]), {}

def progress(event, **details):
    seen.update(details)
    if event == "step" and (seen["index"], details["step"]) == (1, 3):
        os.kill(os.getpid(), signal.SIGKILL)

learn(**asked, progress=progress)
"""


@pytest.mark.parametrize("first", METHODS)
def test_a_killed_run_goes_on_to_the_same_results(first, tiny_llama, tiny_tokenizer, stream, tmp_path):
    tiny_llama(1).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    sources = []
    for task in stream:
        folder = tmp_path / "tasks" / task.name
        folder.mkdir(parents=True)
        for split in ("train", "test"):
            rows = [{"prompt": e.prompt, "completion": e.completion} for e in getattr(task, split)]
            (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (folder / "task.json").write_text(json.dumps({"labels": list(task.labels)}))
        sources.append(str(folder))
    asked = {"model": str(tmp_path / "model"), "tasks": sources, "method": METHODS[first]}
    asked["options"] = OPTIONS | OWN[first]
    whole = learn(**asked, out=tmp_path / "whole")
    out = tmp_path / "killed"
    words = [sys.executable, "-c", CHILD, json.dumps({**asked, "out": str(out)})]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert (out / first / "task-001" / LEFT[first]).is_file()
    assert not (out / first / "task-002").exists()
    resumed = learn(**asked, out=out, resume=True)
    assert _without_times(resumed.path) == _without_times(whole.path)


def _without_times(run: Path) -> dict:
    entries = read_json(run / "results.json")["methods"]
    return {
        name: {key: value for key, value in entry.items() if not key.endswith(("seconds", "seconds_by_task"))}
        for name, entry in entries.items()
    }
