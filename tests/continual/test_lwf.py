"""LwF: the divergence by hand, the teacher that never moves, runs end to end."""

from __future__ import annotations

import math

import pytest
import torch

from folklora import KaSA, LoRA, SMoRA
from folklora.continual import LwF
from folklora.continual.answers import at_answers
from folklora.continual.lwf import distillation
from folklora.stream.train import TrainSettings, train_task


def batch(two_sided=False):
    ids = torch.randint(2, 128, (3, 7), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[0, :4], labels[1, :6], labels[2, :3] = -100, -100, -100
    labels[2, -1] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels} | (
        {"decoder_input_ids": ids.flip(1)} if two_sided else {}
    )


def shake(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)


def test_the_divergence_is_the_one_by_hand():
    teacher, student = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    by_hand = 0.0
    for z_teacher, z_student in zip(teacher.tolist(), student.tolist(), strict=True):
        p = [math.exp(z / 3) for z in z_teacher]
        q = [math.exp(z / 3) for z in z_student]
        p, q = [value / sum(p) for value in p], [value / sum(q) for value in q]
        by_hand += 9 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 5
    assert distillation(teacher, student, 3.0).item() == pytest.approx(by_hand, rel=1e-10)


def test_at_a_high_temperature_it_compares_centred_logits():
    teacher, student = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    difference = (teacher - teacher.mean(1, keepdim=True)) - (student - student.mean(1, keepdim=True))
    limit = difference.square().sum(1).mean() / (2 * 9)
    # the next term is smaller by about the logits over the temperature
    assert distillation(teacher, student, 1e4).item() == pytest.approx(limit.item(), rel=1e-3)


@pytest.mark.parametrize("two_sided", [False, True])
def test_the_loss_is_taken_where_answers_are(tiny_llama, tiny_t5, two_sided):
    method = LwF(adapter=LoRA(r=2), distillation_weight=0.5, distillation_temperature=2.0)
    model = method.start(tiny_t5(0) if two_sided else tiny_llama(1)).eval()
    shake(model, 0)
    assert not method.reads_logits
    method.prepare(model, None, [], 1)
    assert method.reads_logits
    inputs = batch(two_sided)
    old = model(**inputs).logits.detach()
    assert method.logits_penalty(model, inputs, old).abs() < 1e-6, "nothing has moved yet"
    shake(model, 1)
    new = model(**inputs).logits
    total, count = 0.0, 0
    for row, position in (inputs["labels"] != -100).nonzero().tolist():
        at = position if two_sided else position - 1
        p, q = ((z[row, at].double() / 2).softmax(-1) for z in (old, new))
        total, count = total + 4 * (p * (p / q).log()).sum().item(), count + 1
    value = method.logits_penalty(model, inputs, new)
    assert value.item() == pytest.approx(0.5 * total / count, rel=1e-4)
    assert value.item() > 1e-3


@pytest.mark.parametrize("adapter", [LoRA(r=2, dropout=0.3), KaSA(r=2), SMoRA(r=4)])
def test_the_teacher_is_the_model_before_the_task_and_never_moves(
    tiny_llama, tiny_tokenizer, stream, tmp_path, adapter
):
    method = LwF(adapter=adapter)
    model = method.start(tiny_llama(1))
    shake(model, 0)
    inputs = batch()
    with torch.no_grad():
        before = model.eval()(**inputs).logits
    method.prepare(model, tiny_tokenizer, stream, 1)
    settings = TrainSettings(learning_rate=0.02, batch_size=8, max_length=48)
    train_task(model, tiny_tokenizer, method, stream[1].train, settings, seed=0, folder=tmp_path)
    with torch.no_grad():
        assert not torch.allclose(model.eval()(**inputs).logits, before, atol=1e-2)
    held = {name: value.detach().clone() for name, value in model.named_parameters()}
    model.train()
    torch.testing.assert_close(method.teach(model, inputs), before, rtol=1e-6, atol=1e-6)
    assert model.training
    assert all(torch.equal(value, held[name]) for name, value in model.named_parameters())
    assert not any(value.requires_grad for value in method._teacher.values())


def test_the_first_step_of_a_task_has_the_loss_of_plain_training(tiny_llama, tiny_tokenizer, stream, tmp_path):
    first, after = {}, {}
    for weight in (0.0, 1.0):
        method = LwF(adapter=LoRA(r=2), distillation_weight=weight)
        torch.manual_seed(0)
        model = method.start(tiny_llama(1))
        method.prepare(model, tiny_tokenizer, stream, 1)
        settings = TrainSettings(learning_rate=0.05, epochs=3, batch_size=8, max_length=48)
        losses = train_task(model, tiny_tokenizer, method, stream[1].train, settings, seed=0, folder=tmp_path)
        first[weight], after[weight] = losses[0]["loss"], losses[-1]["loss"]
    assert first[1.0] == pytest.approx(first[0.0], rel=1e-5)
    assert after[1.0] > after[0.0] * 1.01, "the old answers hold back the new ones"


def test_positions_of_a_learnt_prompt_are_passed_over():
    logits = torch.arange(2 * 5 * 3.0).view(2, 5, 3)
    labels = torch.tensor([[-100, 1, 2], [-100, -100, 0]])
    found, tokens = at_answers(logits, labels, encoder_decoder=False)
    assert tokens.tolist() == [1, 2, 0]
    assert torch.equal(found, torch.stack([logits[0, 2], logits[0, 3], logits[1, 3]]))


def test_without_weight_it_is_seq_lora(teach):
    plain, none = teach("seq-lora", "seq"), teach("lwf", "none", distillation_weight=0)
    assert (none["losses"], none["matrix"]) == (plain["losses"], plain["matrix"])
    some = teach("lwf", "some", distillation_weight=5)
    assert [p for p in some["losses"] if p["task"] == 0] == [p for p in plain["losses"] if p["task"] == 0]
    assert some["losses"] != plain["losses"]
    assert some["stored_parameters"] == some["trainable_parameters"], "nothing is carried"


def test_micro_batches_and_checkpointing_do_not_change_the_loss(teach):
    whole = teach("lwf", "whole")
    for name, options in {"split": {"accumulation": 4}, "checkpointed": {"gradient_checkpointing": True}}.items():
        losses = [p["loss"] for p in teach("lwf", name, **options)["losses"]]
        assert losses == pytest.approx([p["loss"] for p in whole["losses"]], rel=2e-3), name


def test_encoder_decoder_models_learn_too(teach, tiny_t5):
    entry = teach("lwf", "run", model=tiny_t5(0))
    task = [point["loss"] for point in entry["losses"] if point["task"] == 1]
    assert task[-1] < task[0]


def test_a_stopped_run_goes_on_to_the_same_results_over_another_adapter(teach):
    method = LwF(adapter=KaSA(r=2, alpha=8.0))
    assert teach(method, "stopped", stop_in=1) == teach(method, "whole")


def test_options_are_checked():
    with pytest.raises(ValueError, match="distillation_weight must be at least 0"):
        LwF(distillation_weight=-0.1)
    with pytest.raises(ValueError, match="distillation_temperature must be above 0"):
        LwF(distillation_temperature=0.0)
