"""OSFT over a stream: the rule for the layers' ranks, what is protected from task to task, resuming."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn

from folklora import OSFT, LoRA, tiny
from folklora.adapters.host.layer import updates_of
from folklora.continual import OSFTStream
from folklora.continual.osft import similarities
from folklora.stream.learn import learn
from folklora.stream.run import Run
from folklora.stream.tasks import Example, Task
from folklora.stream.train import TrainSettings, train_task

QUICK = {"learning_rate": 0.01, "batch_size": 8, "max_length": 48, "epochs": 2, "weight_decay": 0.1}
TARGETS = ["q_proj", "v_proj", "down_proj"]


class StoppedError(Exception):
    """What a test ends a run with, as a killed process would."""


def stop_after_first_row(**event: object) -> None:
    if event["event"] == "train" and event["index"] == 1:
        raise StoppedError


def make_task(name: str, labels: tuple[str, str]) -> Task:
    draw = random.Random(name)

    def example(i: int) -> Example:
        return Example(f"{name}: {'abcdefgh'[draw.randrange(4) + 4 * (i % 2)]}\nAnswer:", labels[i % 2])

    return Task(name, tuple(map(example, range(24))), tuple(map(example, range(8))), labels)


TASKS = [make_task("xx", (" yes", " no")), make_task("yy", (" no", " yes"))]


@pytest.fixture(scope="module")
def model_folder(tiny_llama, tiny_tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(1).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def stream(retention: str = "adaptive", **options: object) -> OSFTStream:
    return OSFTStream(OSFT(target_modules=list(TARGETS), **options), retention=retention)


def weights(model: PeftModel) -> dict[str, torch.Tensor]:
    """W + ΔW by layer, float64."""
    pairs = updates_of(model, "default")
    return {x.name: (x.get_base_layer().weight.double() + u.factors().dense().double()).detach() for x, u in pairs}


def test_the_retention_follows_the_importance():
    method = OSFTStream(min_retention=0.1, target_retention=0.8)
    # importances 1.5 and 0.5 of mean 1
    assert method.retained({"a": 0.6, "b": 0.2}) == pytest.approx({"a": 0.1 + 1.5 * 0.7, "b": 0.1 + 0.5 * 0.7})
    assert method.retained({"a": 0.6, "b": -0.2}) == pytest.approx({"a": 0.1 + 2 * 0.7, "b": 0.1})
    assert method.retained({"a": -0.6, "b": -0.2}) == pytest.approx({"a": 0.8, "b": 0.8})


def test_similarities_are_those_of_the_plain_layers(tiny_llama, tiny_tokenizer):
    base = tiny_llama(1)
    found = similarities(stream().start(copy.deepcopy(base)), tiny_tokenizer, TASKS[0])
    sums: dict[str, list[float]] = {}

    def note(name: str):
        def hook(module: nn.Module, arguments: tuple, output: torch.Tensor) -> None:
            for x, y in zip(arguments[0][0], output[0], strict=True):
                width = min(len(x), len(y))
                sums.setdefault(name, []).append(float(F.cosine_similarity(x[:width], y[:width], dim=0)))

        return hook

    for name in found:
        base.get_submodule(name).register_forward_hook(note(name))
    with torch.no_grad():
        for example in TASKS[0].train:
            base(torch.tensor([tiny_tokenizer(example.prompt)["input_ids"]]))
    assert found == pytest.approx({name: sum(values) / len(values) for name, values in sums.items()}, abs=1e-5)
    assert len(set(found.values())) == 6


def test_an_encoder_decoder_is_ranked_on_both_sides(tiny_t5, tiny_tokenizer):
    method = OSFTStream(OSFT(target_modules=["q", "wo"]))
    model = method.start(tiny_t5())
    method.prepare(model, tiny_tokenizer, TASKS, 0)
    found = {layer.name: update.protected_count for layer, update in updates_of(model, "default")}
    assert {name.partition(".")[0] for name in found} == {"encoder", "decoder"}
    assert len(set(found.values())) > 1


@pytest.mark.parametrize("retention", ["adaptive", "budget", "fixed"])
def test_each_task_is_trained_off_what_was_protected_when_it_came(retention, tiny_llama, tiny_tokenizer, tmp_path):
    method = stream(retention)
    model = method.start(tiny_llama(1))
    counts = []
    for index in range(2):
        method.prepare(model, tiny_tokenizer, TASKS, index)
        before = weights(model)
        protected = {layer.name: update.protected_count for layer, update in updates_of(model, "default")}
        settings = TrainSettings(**QUICK)
        train_task(model, tiny_tokenizer, method, TASKS[index].train, settings, seed=1, folder=tmp_path)
        for name, after in weights(model).items():
            U, _, Vh = torch.linalg.svd(before[name], full_matrices=False)
            k, change = protected[name], after - before[name]
            assert change.abs().max() > 1e-3
            assert torch.cat([(U[:, :k].T @ change).flatten(), (change @ Vh[:k].T).flatten()]).norm() < 1e-5
        counts.append(protected)
    short = {layer.name: update.protected_count + len(update.s) for layer, update in updates_of(model, "default")}
    if retention == "budget":
        assert counts == [dict.fromkeys(short, 0), {name: q // 2 for name, q in short.items()}]
    elif retention == "fixed":
        assert counts[0] == counts[1] == {name: q * 3 // 4 for name, q in short.items()}
    else:
        fresh = stream().start(tiny_llama(1))
        shares = method.retained(similarities(fresh, tiny_tokenizer, TASKS[0]))
        assert counts[0] == {name: min(max(round(shares[name] * q), 1), q - 1) for name, q in short.items()}
        assert all(counts[1][name] >= k for name, k in counts[0].items())


def test_a_run_is_recorded_resumed_and_leaves_the_base(model_folder, tiny_llama, tiny_tokenizer, tmp_path):
    method = {"method": stream(), "options": QUICK, "tokenizer": tiny_tokenizer}
    whole = learn(model_folder, TASKS, out=tmp_path / "whole", **method)
    with pytest.raises(StoppedError):
        learn(model_folder, TASKS, out=tmp_path / "part", progress=stop_after_first_row, **method)
    assert Run.load(tmp_path / "part").finished("osft") == 1
    part = learn(model_folder, TASKS, out=tmp_path / "part", resume=True, **method)
    one, other = (run.results["methods"]["osft"] for run in (whole, part))
    assert one["matrix"] == other["matrix"]
    assert one["losses"] == other["losses"]
    base = tiny_llama(1)
    model = PeftModel.from_pretrained(base, whole.adapters("osft"))
    resumed = PeftModel.from_pretrained(tiny_llama(1), part.adapters("osft"))
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), resumed.state_dict().values(), strict=True)
    )
    assert all(
        torch.equal(a, b) for a, b in zip(tiny.base_parameters(model).values(), tiny_llama(1).parameters(), strict=True)
    )
    assert set(model.peft_config["default"].history) == {layer.name for layer, _ in updates_of(model, "default")}


def test_what_does_not_fit_is_refused_before_training(model_folder, tmp_path):
    with pytest.raises(ValueError, match="needs an OSFT adapter, not LoRA"):
        OSFTStream(LoRA())
    with pytest.raises(ValueError, match="finds the ranks itself: leave r out"):
        learn(model_folder, TASKS, "osft", out=tmp_path / "run", options={"r": 3})
    with pytest.raises(ValueError, match=r"compares a linear layer's input.*model.embed_tokens is none"):
        learn(model_folder, TASKS, "osft", out=tmp_path / "run", options={"target_modules": ["embed_tokens"]})
    with pytest.raises(ValueError, match="0 <= min_retention <= target_retention <= 1"):
        OSFTStream(min_retention=0.9)
    with pytest.raises(ValueError, match="retention must be adaptive, budget or fixed, not 'all'"):
        OSFTStream(retention="all")
    assert not (tmp_path / "run").exists()
