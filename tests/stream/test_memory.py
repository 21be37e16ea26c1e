"""What a method keeps: counted as its files hold it, old examples included, task after task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from folklora import SALT, ExSSNeT, LoRA, RandLoRA
from folklora.adapters.exssnet import fix_mask, next_task
from folklora.continual import Replay
from folklora.prompts import PromptPool
from folklora.stream.learn import learn
from folklora.stream.memory import count_stored, pack, unpack
from folklora.stream.run import Run, save_adapters, stored_tensors
from folklora.stream.tasks import Example, Task

TARGETS = ["q_proj", "v_proj"]
KINDS: dict[str, Any] = {
    "a matrix of bytes": lambda: ExSSNeT(target_modules=TARGETS, density=0.3),
    "made again from the base": lambda: SALT(target_modules=TARGETS),
    "shared by the layers": lambda: RandLoRA(r=4, target_modules=TARGETS),
    "whole modules": lambda: LoRA(r=2, target_modules=TARGETS, modules_to_save=["lm_head"]),
    "biases": lambda: LoRA(r=2, target_modules=TARGETS, train_bias=True),
    "prompts and keys": lambda: PromptPool(task_type="CAUSAL_LM"),
    "PEFT's": lambda: peft.LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_stored_is_what_the_files_hold(kind: str, tiny_llama: Any, tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(0, attention_bias=True), KINDS[kind](), adapter_name="default")
    if kind == "a matrix of bytes":
        fix_mask(model)
        next_task(model)
    elif kind != "prompts and keys":
        model.add_adapter("other", KINDS[kind]())
    save_adapters(model, tmp_path)
    files = [load_file(path) for path in tmp_path.rglob("*.safetensors")]
    values = [value for file in files for name, value in file.items() if not name.endswith("base_sample")]
    found = count_stored(stored_tensors(model), [])
    assert found["stored_parameters"] == sum(value.numel() for value in values) > 0
    assert found["stored_bytes"] == sum(value.numel() * value.element_size() for value in values)
    if kind == "a matrix of bytes":
        assert found["stored_bytes"] < 4 * found["stored_parameters"]


def test_examples_come_back_from_a_file(tmp_path: Path) -> None:
    examples = [Example("größe\n→", " ja"), Example("", ""), Example("日本", " 語")]
    save_file(pack(examples), tmp_path / "x.safetensors")
    assert unpack(load_file(tmp_path / "x.safetensors")) == examples
    assert pack([]) == {}
    assert unpack({"keys": torch.zeros(2)}) == []


def make_task(name: str) -> Task:
    rows = tuple(Example(f"{name}: {'abcd'[i % 4]}\nAnswer:", (" yes", " no")[i % 2]) for i in range(24))
    return Task(name, rows, rows[:6], (" yes", " no"))


def test_replays_memory_is_on_disk_and_counted_task_by_task(
    tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    tasks = [make_task("xx"), make_task("a longer name")]
    options = {"r": 2, "dropout": 0.0, "batch_size": 8, "max_length": 48, "epochs": 1, "memory": 0.2}
    learn(tiny_llama(1), tasks, ["replay", "multi-task"], out=tmp_path, options=options, tokenizer=tiny_tokenizer)
    run = Run.load(tmp_path)
    kept = run.kept("replay")
    assert kept == Replay(memory=0.2).kept(tasks, 1, 0)
    assert len(kept) == 8
    found = run.results["methods"]["replay"]
    assert found["stored_examples_by_task"] == [4, 8]
    numbers = found["stored_parameters"]
    assert found["stored_parameters_by_task"] == [numbers, numbers], "examples are no numbers"
    # four bytes a number; of an example its text, and where its two parts end
    sizes = [len(e.prompt.encode()) + len(e.completion.encode()) + 16 for e in kept]
    assert found["stored_bytes_by_task"] == [4 * numbers + sum(sizes[:4]), 4 * numbers + sum(sizes)]
    assert found["stored_bytes"] == found["stored_bytes_by_task"][-1]
    assert run.kept("multi-task") == []
    assert run.results["methods"]["multi-task"]["stored_bytes_by_task"] == [4 * numbers]
    assert "8</td>" in (tmp_path / "report.html").read_text(encoding="utf-8").split("What is stored")[1]
