"""Schedules for any trainer: which blocks are excluded, and how weight decay fades out."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration, Trainer, TrainingArguments

from folklora import LoRA, anneal_weight_decay, cosine_weight_decay, early_blocks, tiny
from folklora.adapters.host.layer import layers_of


def decays(optimizer: torch.optim.Optimizer, steps: int) -> list[list[float]]:
    """The weight decay of each group in each step, as the step itself saw it."""
    seen: list[list[float]] = []
    handle = optimizer.register_step_post_hook(
        lambda optimizer, args, kwargs: seen.append([group["weight_decay"] for group in optimizer.param_groups])
    )
    for _ in range(steps):
        optimizer.step()
    handle.remove()
    return seen


def adamw(*decay: float) -> torch.optim.Optimizer:
    groups = [{"params": [nn.Parameter(torch.ones(2))], "weight_decay": value} for value in decay]
    return torch.optim.AdamW(groups, lr=0.1)


def test_the_curve():
    assert cosine_weight_decay(0, 100) == 0.05
    assert cosine_weight_decay(50, 100) == pytest.approx(0.025005, rel=1e-12)
    assert cosine_weight_decay(100, 100) == pytest.approx(1e-5, rel=1e-12)
    assert cosine_weight_decay(150, 100) == pytest.approx(1e-5, rel=1e-12)
    assert cosine_weight_decay(25, 100, start=1.0, end=0.0) == pytest.approx(0.5 + 0.5 * 2**-0.5)


def test_every_group_fades_from_its_own_decay_and_zero_stays_zero():
    optimizer = adamw(0.05, 0.01, 0.0)
    anneal_weight_decay(optimizer, steps=10)
    for step, (first, second, third) in enumerate(decays(optimizer, 14)):
        assert first == cosine_weight_decay(step, 10, 0.05)
        assert second == cosine_weight_decay(step, 10, 0.01)
        assert third == 0.0
    assert first == pytest.approx(1e-5)


def test_the_parameters_decay_by_it():
    optimizer = adamw(0.05)
    (parameter,) = optimizer.param_groups[0]["params"]
    parameter.grad = torch.zeros(2)
    anneal_weight_decay(optimizer, steps=4)
    decays(optimizer, 4)
    expected = 1.0
    for step in range(4):
        expected *= 1 - 0.1 * cosine_weight_decay(step, 4)
    torch.testing.assert_close(parameter.detach(), torch.full((2,), expected))


def test_a_saved_optimizer_goes_on_where_it_was():
    whole, first, second = adamw(0.05), adamw(0.05), adamw(0.05)
    for optimizer in (whole, first, second):
        anneal_weight_decay(optimizer, steps=6)
    expected = decays(whole, 6)
    assert decays(first, 2) == expected[:2]
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert decays(second, 4) == expected[2:]


def test_it_needs_nobody_to_call_it_in_transformers_trainer(tmp_path: Path):
    model = tiny.adapted(LoRA(r=2, target_modules=["q_proj"]), layers=1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.05)
    anneal_weight_decay(optimizer, steps=3)
    rows = [{"input_ids": row, "labels": row} for row in tiny.batch()["input_ids"]]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None)).train()
    assert optimizer.param_groups[0]["weight_decay"] == cosine_weight_decay(2, 3)


def test_what_cannot_be_annealed_is_refused():
    optimizer = adamw(0.05)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        anneal_weight_decay(optimizer, steps=0)
    anneal_weight_decay(optimizer, steps=3)
    with pytest.raises(ValueError, match="annealed already"):
        anneal_weight_decay(optimizer, steps=3)
    with pytest.raises(ValueError, match="nothing to anneal"):
        anneal_weight_decay(adamw(0.0), steps=3)


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], "all-linear", r".*\.(q_proj|lm_head)"])
def test_no_layer_of_an_early_block_is_adapted_however_targets_are_named(targets: list[str] | str):
    base = tiny.llama(layers=12)
    excluded = early_blocks(base, 2)
    model = get_peft_model(base, LoRA(r=2, target_modules=targets, exclude_modules=excluded))
    blocks = {int(found[1]) for layer in layers_of(model) if (found := re.search(r"layers\.(\d+)\.", layer.name))}
    assert blocks == set(range(2, 12))


def test_encoder_and_decoder_both_have_early_blocks():
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 3, "num_heads": 2}
    pattern = early_blocks(T5ForConditionalGeneration(T5Config(**sizes)), 1)
    assert re.fullmatch(pattern, "encoder.block.0.layer.0.SelfAttention.q")
    assert re.fullmatch(pattern, "decoder.block.0.layer.1.EncDecAttention.q")
    assert not re.fullmatch(pattern, "decoder.block.1.layer.1.EncDecAttention.q")
    assert not re.fullmatch(pattern, "lm_head")


def test_lists_within_a_block_are_no_blocks():
    experts = nn.ModuleList(nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(2, 2) for _ in range(9))}) for _ in "abc")
    pattern = early_blocks(nn.ModuleDict({"layers": experts, "few": nn.ModuleList([nn.Linear(2, 2)])}), 2)
    assert re.fullmatch(pattern, "layers.1.experts.8")
    assert not re.fullmatch(pattern, "layers.2.experts.1")
    assert not re.fullmatch(pattern, "few.0.weight")


def test_blocks_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="from 1 to 1 for a model of 2 blocks, not 2"):
        early_blocks(tiny.llama(), 2)
    with pytest.raises(ValueError, match="has no list of blocks"):
        early_blocks(nn.Linear(2, 2), 1)
