"""Fusion-X: selection, feedback and distillation against their formulas, and training of a real model by others."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, Trainer, TrainingArguments

from folklora import LoRA
from folklora.merge import FusionX
from folklora.merge.fusion_x import distillation, feedback_loss, select
from folklora.merge.lessons import Collator, Lessons

B, L, M, K, V = 3, 7, 4, 5, 128


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lessons(texts: int = 6, teachers: int = M, seed: int = 0) -> Lessons:
    """Texts of random tokens, and teachers who say this and that of them, some not everywhere."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, L + 1, (texts,), generator=draw)
    total = int(lengths.sum())
    aligned = torch.rand(total, teachers, generator=draw) > 0.3
    aligned[:, 0] = True
    return Lessons(
        ["target", *(f"source {m}" for m in range(1, teachers))],
        torch.randint(2, V, (total,), generator=draw),
        lengths.cumsum(0),
        # few numbers, so that some are there twice
        torch.randint(2, 30, (total, teachers, K), generator=draw),
        torch.randn(total, teachers, K, generator=draw),
        aligned,
        1 + torch.rand(texts, teachers, generator=draw),
    )


def batch(**options: Any) -> dict[str, Tensor]:
    return Collator(pad=1, **options)(list(lessons(B)))


@pytest.fixture
def fusion(tiny_llama: Callable[..., LlamaForCausalLM]) -> Callable[..., FusionX]:
    def make(teachers: int = M, **options: Any) -> FusionX:
        torch.manual_seed(1)
        return FusionX(tiny_llama(initializer_range=0.2), teachers, **options)

    return make


def dense(batch: dict[str, Tensor], weights: Tensor, temperature: float = 1.0) -> Tensor:
    """P [B, L, V], number by number."""
    P = torch.zeros(*batch["input_ids"].shape, V, dtype=torch.float64)
    ids, logits = batch["teacher_ids"], batch["teacher_logits"].double() / temperature
    for b, i, m in torch.cartesian_prod(*map(torch.arange, ids.shape[:3])).tolist():
        if bool(logits[b, i, m].isfinite().any()):
            for token, p in zip(ids[b, i, m].tolist(), logits[b, i, m].softmax(0).tolist(), strict=True):
                P[b, i, token] += float(weights[b, m]) * p
    return P


def test_selected_weights_sum_to_one_and_are_zero_elsewhere() -> None:
    logits = drawn(200, 5)
    g = logits.softmax(-1)
    found = select(logits, 0.15)
    torch.testing.assert_close(found.sum(-1), torch.ones(200).double())
    for own, weights in zip(g, found, strict=True):
        chosen = (own > 0.15).nonzero().flatten().tolist() or [int(own.argmax())]
        expected = torch.zeros(5).double()
        expected[chosen] = own[chosen] / own[chosen].sum()
        torch.testing.assert_close(weights, expected)


def test_the_threshold_goes_from_all_to_the_largest() -> None:
    logits = drawn(50, 5)
    assert torch.equal(select(logits, 0.0), logits.softmax(-1) / logits.softmax(-1).sum(-1, keepdim=True))
    assert torch.equal(select(logits, 1.0), F.one_hot(logits.argmax(-1), 5).double())
    # of equal ones one is chosen where the threshold is above all
    assert select(torch.zeros(1, 5), 0.5).tolist() == [[1.0, 0.0, 0.0, 0.0, 0.0]]


def test_feedback_is_the_squared_coefficient_of_variation() -> None:
    one = torch.eye(5, dtype=torch.float64)[:1]
    torch.testing.assert_close(feedback_loss(one), torch.tensor(5.0).double(), rtol=1e-8, atol=0)
    assert feedback_loss(torch.full((3, 4), 0.25)) == 0
    assert feedback_loss(torch.eye(4)) == 0, "each once"
    assert feedback_loss(torch.ones(7, 1)) == 0
    weights = select(drawn(6, 5), 0.1)
    repeated = feedback_loss(weights.repeat_interleave(40, dim=0))
    torch.testing.assert_close(repeated, feedback_loss(weights), rtol=1e-8, atol=0)
    importance = weights.sum(0)
    mean = importance.mean()
    expected = ((importance - mean) ** 2).sum() / 4 / mean**2
    torch.testing.assert_close(feedback_loss(weights), expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("divergence", ["ce", "kl"])
def test_sparse_distillation_is_the_dense_one(divergence: str) -> None:
    logits, ids = (
        drawn(2, 3, 20).requires_grad_(),
        torch.randint(0, 6, (2, 3, 8), generator=torch.Generator().manual_seed(1)),
    )
    p = drawn(2, 3, 8, seed=2).softmax(-1).requires_grad_()
    found = distillation(logits, ids, p, divergence)
    P = torch.zeros(2, 3, 20, dtype=torch.float64).scatter_add(-1, ids, p)
    expected = -(P * logits.log_softmax(-1)).sum(-1)
    if divergence == "kl":
        expected = F.kl_div(logits.log_softmax(-1), P, reduction="none").sum(-1)
    torch.testing.assert_close(found, expected)
    for one, other in zip(*(torch.autograd.grad(x.sum(), (logits, p)) for x in (found, expected)), strict=True):
        # the constant 1 of P's own logarithm falls out of a gradient along which P sums to 1
        torch.testing.assert_close(one - one.mean(-1, keepdim=True), other - other.mean(-1, keepdim=True))


@pytest.mark.parametrize("divergence", ["ce", "kl"])
@pytest.mark.parametrize("fallback", ["gold", "drop"])
def test_teachers_that_are_left_out_or_silent_leave_all_gradients_finite(
    fusion: Callable[..., FusionX], divergence: str, fallback: str
) -> None:
    for threshold in (0.2, 1.0):
        model = fusion(divergence=divergence, threshold=threshold, lm_weight=0.5)
        with torch.no_grad():
            model.gate[-1].bias.copy_(torch.tensor([3.0, 2.9, -9.0, -9.0]))
        model(**batch(fallback=fallback)).loss.backward()
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
        # the gradient of g / g, a sum of a few float32 terms of size 10, is rounding
        assert bool(model.gate[-1].bias.grad.abs().max() > 1e-5) == (threshold < 1)


@pytest.mark.parametrize("options", [{}, {"divergence": "kl"}, {"temperature": 2.0}, {"threshold": 0.0}])
@pytest.mark.parametrize("fallback", ["gold", "drop"])
def test_the_loss_is_that_of_dense_teachers(
    fusion: Callable[..., FusionX], options: dict[str, Any], fallback: str
) -> None:
    model, given = fusion(lm_weight=0.3, feedback=0.7, **options), batch(fallback=fallback)
    output = model(**given)
    weights = model.weights(given["teacher_losses"]).double().detach()
    P, log_q = dense(given, weights, options.get("temperature", 1.0)), output.logits.double().log_softmax(-1)
    lost = -(P * log_q).sum(-1)
    if "divergence" in options:
        lost = lost + torch.special.xlogy(P, P).sum(-1)
    learnt = torch.zeros_like(given["labels"], dtype=torch.bool)
    learnt[:, :-1] = given["labels"][:, 1:] != -100
    own = F.cross_entropy(output.logits.double()[:, :-1].flatten(0, 1), given["labels"][:, 1:].flatten())
    expected = 0.3 * own + 0.7 * lost[learnt].mean() + 0.7 * feedback_loss(weights)
    # float32 sums over a vocabulary of 128
    torch.testing.assert_close(output.loss.double(), expected, rtol=1e-5, atol=1e-5)
    if fallback == "gold":
        torch.testing.assert_close(P.sum(-1)[learnt], torch.ones(int(learnt.sum())).double(), rtol=0, atol=1e-6)


def test_without_distillation_it_is_plain_training_bit_for_bit(fusion: Callable[..., FusionX]) -> None:
    model, given = fusion(lm_weight=1.0, feedback=0.0), batch()
    plain = model.target(**{name: given[name] for name in ("input_ids", "attention_mask", "labels")}).loss
    assert torch.equal(model(**given).loss, plain)
    alone = {name: value for name, value in given.items() if not name.startswith("teacher")}
    assert torch.equal(model(**alone).loss, plain)


def test_a_single_chosen_source_is_all_that_teaches(fusion: Callable[..., FusionX]) -> None:
    model, given = fusion(lm_weight=0.0, feedback=0.0, threshold=1.0), batch()
    with torch.no_grad():
        model.gate[-1].weight.zero_()
        model.gate[-1].bias.copy_(torch.tensor([0.0, 0.0, 5.0, 0.0]))
    alone = FusionX(model.target, 1, lm_weight=0.0, feedback=0.0)
    one = {name: value[..., 2:3, :] if value.dim() == 4 else value for name, value in given.items()}
    one["teacher_losses"] = given["teacher_losses"][:, 2:3]
    assert torch.equal(model(**given).loss, alone(**one).loss)
    assert model.parts["weights"].tolist() == [0.0, 0.0, 1.0, 0.0]


def test_the_gate_learns_from_what_is_distilled_and_from_the_feedback(fusion: Callable[..., FusionX]) -> None:
    given = batch()
    for options in ({"lm_weight": 0.0, "feedback": 0.0}, {"lm_weight": 1.0, "feedback": 1.0}):
        model = fusion(threshold=0.0, **options)
        model(**given).loss.backward()
        assert all(bool(p.grad.abs().sum() > 0) for p in model.gate.parameters())
    model = fusion(lm_weight=1.0, feedback=0.0)
    model(**given).loss.backward()
    assert all(bool((p.grad == 0).all()) for p in model.gate.parameters())


def test_what_is_misconfigured_is_refused(fusion: Callable[..., FusionX]) -> None:
    with pytest.raises(ValueError, match="one of ce, kl, not 'mse'"):
        fusion(divergence="mse")
    for options in ({"teachers": 0}, {"lm_weight": 1.1}, {"temperature": 0.0}, {"feedback": -1.0}):
        with pytest.raises(ValueError, match="teachers must be at least 1"):
            fusion(**options)
    with pytest.raises(ValueError, match="the batch has 4 teachers, and the gate 3"):
        fusion(teachers=3)(**batch())


def trainer(model: FusionX, folder: Path, steps: int) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        seed=3,
        use_cpu=True,
        report_to=[],
        save_steps=2,
        logging_strategy="no",
        disable_tqdm=True,
    )
    return Trainer(model, arguments, train_dataset=lessons(), data_collator=Collator(pad=1))


def tied() -> FusionX:
    torch.manual_seed(2)
    sizes = {
        "vocab_size": V,
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
        "n_positions": 16,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    target = GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    return FusionX(target, M)


def test_a_trainer_trains_target_and_gate_and_resumes(tmp_path: Path) -> None:
    model, start = tied(), tied().state_dict()
    trainer(model, tmp_path / "whole", 4).train()
    assert all(not torch.equal(value, start[name]) for name, value in model.state_dict().items())
    again = tied()
    trainer(again, tmp_path / "stopped", 2).train()
    again = tied()
    trainer(again, tmp_path / "stopped", 4).train(resume_from_checkpoint=True)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=1e-6, msg=name)
    fresh = tied()
    fresh.load_state_dict(model.state_dict())
    assert fresh.target.lm_head.weight is fresh.target.transformer.wte.weight
    assert torch.equal(fresh(**batch()).loss, model.eval()(**batch()).loss)
    model.target.save_pretrained(tmp_path / "target")
    alone = GPT2LMHeadModel.from_pretrained(tmp_path / "target")
    assert torch.equal(alone(batch()["input_ids"]).logits, model.target(batch()["input_ids"]).logits)


def test_adapters_on_the_target_are_trained_alone(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    target = get_peft_model(tiny_llama(initializer_range=0.2), LoRA(r=2, target_modules=["q_proj", "v_proj"]))
    model = FusionX(target, M)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    losses = []
    for _ in range(8):
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    fresh = tiny_llama(initializer_range=0.2).state_dict()
    plain = target.unload().state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in plain.items())


def test_half_precision_sums_in_float32(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    torch.manual_seed(1)
    model = FusionX(tiny_llama(initializer_range=0.2).bfloat16(), M)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**batch())
    assert output.loss.isfinite()
    assert model.gate[0].weight.dtype == torch.float32
    assert model.weights(batch()["teacher_losses"]).dtype == torch.float32


def test_example_of_the_docstring_runs(capsys: pytest.CaptureFixture[str]) -> None:
    example = inspect.cleandoc(FusionX.__doc__).partition("\nExample:\n")[2].partition("\nArgs:\n")[0]
    exec(inspect.cleandoc(example), {"__name__": "__main__"})
    assert "'distillation'" in capsys.readouterr().out
