"""LT-SFT over a stream: two phases a task, K entries, changes that add up, the same results after a stop."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from folklora import LTSFT, LoRA, tiny
from folklora.adapters.host.layer import layers_of, updates_of
from folklora.continual import LTSFTStream, Phase
from folklora.stream.evaluate import evaluate

# these options know no rank
QUICK = {"r": None, "target_modules": ["v_proj", "down_proj"], "k": 150}


def chosen(model: PeftModel, name: str) -> dict[str, set[int]]:
    pairs = [(layer, update) for layer, update in updates_of(model, name) if update.indices is not None]
    return {layer.name: set(update.indices.tolist()) for layer, update in pairs}


def test_each_task_adds_k_entries_and_leaves_the_earlier_ones(tiny_llama, tiny_tokenizer, stream, drill):
    method = LTSFTStream(LTSFT(k=150, target_modules=["v_proj", "down_proj"]))
    model = method.start(tiny_llama(1))
    first = {}
    for index in range(2):
        method.prepare(model, tiny_tokenizer, stream, index)
        before = {
            layer.name: sum(tiny.change(layer, f"task_{i}") for i in range(index + 1)) for layer in layers_of(model)
        }
        for phase in range(2):
            method.enter(model, tiny_tokenizer, stream, index, phase)
            now = {
                layer.name: sum(tiny.change(layer, f"task_{i}") for i in range(index + 1)) for layer in layers_of(model)
            }
            assert all(torch.equal(now[name], before[name]) for name in before), "each phase begins at the task's start"
            drill(model, stream[index])
        assert sum(map(len, chosen(model, f"task_{index}").values())) == 150
        if index == 0:
            first = {layer.name: tiny.change(layer, "task_0").detach().clone() for layer in layers_of(model)}
    for layer in layers_of(model):
        assert torch.equal(tiny.change(layer, "task_0"), first[layer.name])
        moved = set(tiny.change(layer, "task_1").flatten().nonzero().flatten().tolist())
        assert moved <= chosen(model, "task_1").get(layer.name, set())
    assert model.active_adapters == ["task_0", "task_1"]
    assert all(
        torch.equal(a, b) for a, b in zip(tiny.base_parameters(model).values(), tiny_llama(1).parameters(), strict=True)
    )


def test_a_stopped_run_goes_on_to_the_same_results(teach):
    options = {**QUICK, "full_epochs": 1}
    whole = teach("lt-sft", "whole", **options)
    assert teach("lt-sft", "stopped", stop_in=1, phase="sparse", **options) == whole
    # v_proj [16, 32] and down_proj [32, 64] in two blocks
    assert whole["trainable_parameters"] == 2 * (16 * 32 + 32 * 64)
    # an index and a value each
    assert whole["stored_parameters"] == 2 * 2 * 150
    # 24 examples by 8, one epoch and two
    steps = [point["step"] for point in whole["losses"] if point["task"] == 0]
    assert steps == list(range(1, 3 + 6 + 1))


def test_iterations_share_the_entries_out(tiny_llama, tiny_tokenizer, stream, drill):
    method = LTSFTStream(LTSFT(k=100, target_modules=["v_proj", "down_proj"]), iterations=3, full_epochs=2)
    assert method.phases == (Phase("full", 2), Phase("sparse")) * 3
    model = method.start(tiny_llama(1))
    method.prepare(model, tiny_tokenizer, stream, 0)
    counts = []
    for phase in range(6):
        method.enter(model, tiny_tokenizer, stream, 0, phase)
        counts.append(sum(map(len, chosen(model, "task_0").values())))
        drill(model, stream[0])
    assert counts == [0, 33, 33, 66, 66, 100]


def test_it_learns(tiny_llama, tiny_tokenizer, opposed, drill):
    method = LTSFTStream(LTSFT(density=0.3, target_modules=["v_proj", "down_proj"]))
    model = method.start(tiny_llama(1))
    for index, task in enumerate(opposed):
        method.prepare(model, tiny_tokenizer, opposed, index)
        for phase in range(2):
            method.enter(model, tiny_tokenizer, opposed, index, phase)
            drill(model, task, 30)
        assert evaluate(model, tiny_tokenizer, task, max_length=48) >= 90


def test_options_are_checked(tiny_llama):
    with pytest.raises(ValueError, match="lt-sft needs an LTSFT adapter, not LoRA"):
        LTSFTStream(LoRA())
    with pytest.raises(ValueError, match="which modules_to_save cannot be: leave it out"):
        LTSFTStream(LTSFT(modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match="lt-sft sets full and counts as the stream goes by"):
        LTSFTStream(LTSFT(full=False))
    with pytest.raises(ValueError, match="iterations must be at least 1, not 0"):
        LTSFTStream(iterations=0)
    with pytest.raises(ValueError, match="sparse_epochs must be above 0, not 0"):
        LTSFTStream(sparse_epochs=0)
    with pytest.raises(ValueError, match="k=100000 is above 18432, the number of entries"):
        LTSFTStream(LTSFT(k=100_000)).start(tiny_llama())
    with pytest.raises(ValueError, match="K=2 entries cannot be chosen in 3 iterations"):
        LTSFTStream(LTSFT(k=2), iterations=3).start(tiny_llama())
