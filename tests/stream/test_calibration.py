"""A stream over adapters that are calibrated: on which examples, resumed, for every adapter of the run."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from folklora import CorDA, LoRA, Statistics, calibrate, learn
from folklora.adapters.host.layer import updates_of
from folklora.continual import SeqLoRA
from folklora.stream.calibration import calibrated
from folklora.stream.tasks import Example, Task
from folklora.stream.tokens import encode
from folklora.stream.train import TrainSettings

QUICK = {"r": 2, "learning_rate": 0.01, "batch_size": 8, "max_length": 48, "epochs": 1, "calibration_examples": 10}


def make_task(name: str, labels: tuple[str, str]) -> Task:
    draw = random.Random(name)

    def example(i: int) -> Example:
        word = "abcdefgh"[draw.randrange(4) + 4 * (i % 2)]
        return Example(f"{name}: {word}\nAnswer:", labels[i % 2])

    return Task(name, tuple(map(example, range(24))), tuple(map(example, range(12))), labels)


TASKS = [make_task("xx", (" yes", " no")), make_task("yy", (" no", " yes"))]


@pytest.fixture(scope="module")
def model_folder(tiny_llama: Any, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(1).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def without_times(results: dict) -> dict:
    kept = json.loads(json.dumps(results))
    for entry in kept["methods"].values():
        for key in ("seconds", "seconds_by_task", "train_seconds"):
            entry.pop(key)
    return kept


@pytest.mark.parametrize("adapter", ["corda", "lora-sb"])
@pytest.mark.parametrize("method", ["seq-lora", "inc-lora"])
def test_an_interrupted_run_goes_on_to_the_same_results(
    method: str, adapter: str, model_folder: Path, tmp_path: Path
) -> None:
    class StopError(Exception):
        pass

    events: list[tuple[str, Any]] = []

    def stop(event: str, **details: Any) -> None:
        events.append((event, details.get("examples")))
        if event == "row":
            raise StopError

    options = {**QUICK, "adapter": adapter}
    whole = learn(model_folder, TASKS, method, out=tmp_path / "whole", options=options)
    with pytest.raises(StopError):
        learn(model_folder, TASKS, method, out=tmp_path / "part", options=options, progress=stop)
    assert [event for event in events if event[0] in ("calibrate", "train")] == [("calibrate", 10), ("train", 24)]
    part = learn(model_folder, TASKS, method, out=tmp_path / "part", options=options, resume=True)
    assert without_times(part.results) == without_times(whole.results)
    entry = whole.results["methods"][method]
    assert entry["losses"][-1]["loss"] < entry["losses"][0]["loss"]
    assert entry["settings"]["calibration_examples"] == 10
    # loading needs no statistics
    folder = whole.adapters(method)
    folder = folder if method == "seq-lora" else folder / "task_1"
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), folder)


def test_it_calibrates_on_drawn_training_examples_as_they_are_trained(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    model, settings, told = tiny_llama(1), TrainSettings(max_length=48, calibration_examples=5), []
    config = CorDA(r=2, target_modules=["q_proj"])

    def go(seed: int) -> Statistics:
        method = calibrated(
            SeqLoRA(adapter=config), model, tiny_tokenizer, TASKS, settings, seed, lambda **event: told.append(event)
        )
        return method.adapter.statistics

    found, name = go(3), "model.layers.0.self_attn.q_proj"
    assert told == [{"event": "calibrate", "method": "seq-lora", "examples": 5}]
    rows = [
        {key: torch.tensor([value]) for key, value in encode(tiny_tokenizer, example, 48).items()}
        for example in random.Random("3:calibration").sample(list(TASKS[0].train), 5)
    ]
    expected = calibrate(model, rows, {"covariance"}, target_modules=config)
    assert torch.equal(found[name]["covariance"], expected[name]["covariance"])
    assert torch.equal(go(3)[name]["covariance"], found[name]["covariance"])
    assert not torch.equal(go(4)[name]["covariance"], found[name]["covariance"])
    assert config.statistics is None, "the caller's configuration is left alone"


def test_nothing_is_calibrated_that_needs_no_statistics_or_has_them(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    def refuse(**event: Any) -> None:
        raise AssertionError("calibrated")

    config = CorDA(r=2, target_modules=["q_proj"])
    statistics = calibrate(
        tiny_llama(1), [{"input_ids": torch.arange(40).view(1, -1)}], config.needs, target_modules=config
    )
    for method in (SeqLoRA(adapter=LoRA(r=2)), SeqLoRA(adapter=config.calibrated(statistics))):
        assert calibrated(method, tiny_llama(1), tiny_tokenizer, TASKS, TrainSettings(), 0, refuse) is method


def test_own_statistics_are_used_and_survive_other_options(
    tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    config = CorDA(r=4, target_modules=["q_proj"])
    statistics = calibrate(
        tiny_llama(1), [{"input_ids": torch.arange(40).view(1, -1)}], config.needs, target_modules=config
    )
    method = SeqLoRA(adapter=config.calibrated(statistics))
    model = tiny_llama(1)
    options = {**QUICK, "learning_rate": 1e-9, "mode": "kpm"}
    run = learn(model, TASKS[:1], method, out=tmp_path / "run", options=options, tokenizer=tiny_tokenizer)
    loaded = PeftModel.from_pretrained(tiny_llama(1), run.adapters("seq-lora"))
    expected = CorDA(r=2, mode="kpm").update(
        model.model.layers[0].self_attn.q_proj.weight, statistics["model.layers.0.self_attn.q_proj"]
    )
    _, update = next(updates_of(loaded, "default"))
    assert torch.equal(update.A0, expected.A0)


def test_encoder_decoder_models_are_calibrated_too(tiny_t5: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    for adapter in ("corda", "lora-sb"):
        options = {**QUICK, "adapter": adapter}
        learn(tiny_t5(0), TASKS[:1], "seq-lora", out=tmp_path / adapter, options=options, tokenizer=tiny_tokenizer)


def test_a_layer_that_cannot_be_calibrated_is_named_before_training(model_folder: Path, tmp_path: Path) -> None:
    options = {**QUICK, "adapter": "corda", "target_modules": ["embed_tokens"]}
    with pytest.raises(ValueError, match=r"corda adapts linear layers; 'model.embed_tokens' is a Embedding"):
        learn(model_folder, TASKS, "seq-lora", out=tmp_path / "run", options=options)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="calibration_examples must be above 0"):
        learn(model_folder, TASKS, "seq-lora", out=tmp_path / "run", options={"calibration_examples": 0})
