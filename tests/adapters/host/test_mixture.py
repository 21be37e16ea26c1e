"""Adapters mixed row by row: what each row computes, how long a mixture holds, and what cannot be done with one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from folklora import KaSA, LoRA, PiSSA, tiny
from folklora.adapters.host.layer import layers_of, updates_of
from folklora.adapters.host.mixture import base_alone, mix_by_row, stop_mixing
from folklora.stream.evaluate import generate_answers, rank_labels

NAMES = ("one", "two", "three")


def adapted(base: nn.Module, *configs: Any) -> PeftModel:
    """Three adapters, moved off their starts."""
    configs = configs or tuple(LoRA(r=2, target_modules=["q_proj", "v_proj"]) for _ in NAMES)
    torch.manual_seed(0)
    model = get_peft_model(base, configs[0], adapter_name=NAMES[0])
    for name, config in zip(NAMES[1:], configs[1:], strict=True):
        model.add_adapter(name, config)
    generator = torch.Generator().manual_seed(3)
    for name in NAMES:
        for _, update in updates_of(model, name):
            update.B.data += torch.randn(update.B.shape, generator=generator) * 0.3
    return model.eval()


def weights_of(ids: Tensor) -> Tensor:
    """Weights [rows, 3] that sum to 1 and depend on each row's tokens."""
    return torch.stack([(ids.sum(1) * k % 7 + 1).float() for k in (1, 2, 3)], dim=1).softmax(-1)


def route(inputs: dict[str, Any]) -> dict[str, Tensor]:
    # wherever padding is; generation gives no mask where there is none
    mask = inputs.get("attention_mask")
    ids = inputs["input_ids"] if mask is None else inputs["input_ids"] * mask
    return dict(zip(NAMES, weights_of(ids).T, strict=True))


def logits(model: nn.Module, ids: Tensor, **options: Any) -> Tensor:
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), **options).logits


def test_each_row_adds_its_own_blend_of_the_updates_to_the_weight() -> None:
    model = adapted(tiny.llama())
    ids = tiny.batch()["input_ids"]
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for layer in layers_of(model):
        layer.register_forward_hook(lambda layer, inputs, output: seen.update({layer.name: (inputs[0], output)}))
    mix_by_row(model.get_base_model(), route)
    logits(model, ids)
    assert len(seen) == 4
    for layer in layers_of(model):
        x, y = seen[layer.name]
        D = torch.stack([layer.folklora_updates[name].factors().dense().double() for name in NAMES])
        W = layer.get_base_layer().weight.double()
        blended = W + torch.einsum("bp,poi->boi", weights_of(ids).double(), D)
        assert (blended[0] - blended[1]).abs().max() > 1e-2, "rows differ"
        expected = torch.einsum("bni,boi->bno", x.double(), blended)
        # 32 products of float32 numbers around 1
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_one_weight_alone_is_that_of_all_rows_and_an_adapter_without_one_takes_no_part() -> None:
    model = adapted(tiny.llama())
    ids = tiny.batch()["input_ids"]
    model.set_adapter("two")
    expected = logits(model, ids)
    mix_by_row(model.get_base_model(), lambda inputs: {"two": torch.ones(1)})
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-6, atol=1e-6)
    mix_by_row(model.get_base_model(), lambda inputs: {})
    assert torch.equal(logits(model, ids), logits(tiny.llama(), ids))
    stop_mixing(model.get_base_model())
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-6, atol=1e-6)


def test_weights_of_one_and_zero_are_adapter_names() -> None:
    # PiSSA takes its frozen start off, KaSA a part of the base
    model = adapted(tiny.llama(), LoRA(r=2), PiSSA(r=2), KaSA(r=2))
    ids, rows = tiny.batch()["input_ids"], ["two", "three", "one", "two"]
    expected = logits(model, ids, adapter_names=rows)
    chosen = {name: torch.tensor([float(row == name) for row in rows]) for name in NAMES}
    mix_by_row(model.get_base_model(), lambda inputs: chosen)
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-5, atol=1e-5)
    mix_by_row(model.get_base_model(), route)
    torch.testing.assert_close(logits(model, ids, adapter_names=rows), expected, rtol=1e-5, atol=1e-5)


def test_the_base_alone_is_read_without_adapters_dropout_and_gradients() -> None:
    model = adapted(tiny.llama())
    base, ids = model.get_base_model(), tiny.batch()["input_ids"]
    model.train()
    frozen = base.model.layers[0].eval()
    with base_alone(base):
        found = logits(model, ids)
        assert not base.training
    assert not found.requires_grad
    assert torch.equal(found, logits(tiny.llama(), ids))
    assert base.training
    assert not frozen.training
    assert not torch.allclose(logits(model, ids), found, atol=1e-3)


def test_the_modes_of_what_is_read_alone_are_put_back_and_no_others_are_touched() -> None:
    model = adapted(tiny.llama()).train()
    for _, update in updates_of(model, "three"):
        update.eval()
    before = {name: module.training for name, module in model.named_modules()}
    with base_alone(model.get_base_model(), ["two"]):
        during = {name: module.training for name, module in model.get_base_model().named_modules()}
    assert {name.rpartition(".")[2] for name, training in during.items() if training} == {"one", "folklora_updates"}
    assert {name: module.training for name, module in model.named_modules()} == before


def test_the_base_is_read_with_adapters_that_belong_to_it_whatever_else_is_mixed() -> None:
    model, ids = adapted(tiny.llama()).eval(), tiny.batch()["input_ids"]
    model.base_model.set_adapter("two")
    expected = logits(model, ids)
    mix_by_row(model.get_base_model(), lambda inputs: {"one": torch.ones(1)})
    mixed = logits(model, ids)
    with base_alone(model.get_base_model(), ["two"]):
        assert torch.equal(logits(model, ids), expected)
    assert torch.equal(logits(model, ids), mixed)


@pytest.fixture
def asked(tiny_llama: Callable[..., nn.Module], tiny_tokenizer: Any) -> tuple[PeftModel, Any, list[int]]:
    """A mixing model, its tokenizer, and how many rows each question of the route had."""
    model, rows = adapted(tiny_llama(2)), []

    def counting(inputs: dict[str, Any]) -> dict[str, Tensor]:
        rows.append(len(inputs["input_ids"]))
        return route(inputs)

    mix_by_row(model.get_base_model(), counting)
    return model, tiny_tokenizer, rows


PROMPTS = ["xx: abc\nAnswer:", "a good film\nAnswer:", "zz: q\nAnswer:"]


def test_generation_asks_once_a_text(asked: tuple[PeftModel, Any, list[int]]) -> None:
    model, tokenizer, rows = asked
    together = generate_answers(model, tokenizer, PROMPTS, max_new_tokens=6)
    assert rows == [3]
    assert together == [generate_answers(model, tokenizer, [prompt], max_new_tokens=6)[0] for prompt in PROMPTS]


def test_beams_of_one_prompt_share_its_mixture(asked: tuple[PeftModel, Any, list[int]]) -> None:
    model, tokenizer, rows = asked
    ids = torch.tensor([tokenizer(PROMPTS[0])["input_ids"]])

    def begun(inputs: dict[str, Any]) -> dict[str, Tensor]:
        # without a cache each pass is a longer text
        rows.append(len(inputs["input_ids"]))
        return route({"input_ids": inputs["input_ids"][:, : ids.shape[1]]})

    mix_by_row(model.get_base_model(), begun)
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    cached = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    assert len(rows) == 1
    whole = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **options)
    assert torch.equal(cached, whole)


LABELS = [" yes", " positive", " negative"]


def test_labels_are_ranked_by_each_prompts_own_mixture(asked: tuple[PeftModel, Any, list[int]]) -> None:
    model, tokenizer, rows = asked
    together = rank_labels(model, tokenizer, PROMPTS, LABELS)
    assert rows == [3]
    alone = torch.cat([rank_labels(model, tokenizer, [prompt], LABELS) for prompt in PROMPTS])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_a_decoder_keeps_its_encoders_mixture(tiny_t5: Callable[..., nn.Module], tiny_tokenizer: Any) -> None:
    model = adapted(tiny_t5(2), *(LoRA(r=2, target_modules=["q", "v"]) for _ in NAMES))
    mix_by_row(model.get_base_model(), route)
    together = rank_labels(model, tiny_tokenizer, PROMPTS, LABELS)
    alone = torch.cat([rank_labels(model, tiny_tokenizer, [prompt], LABELS) for prompt in PROMPTS])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    answers = generate_answers(model, tiny_tokenizer, PROMPTS, max_new_tokens=5)
    assert answers == [generate_answers(model, tiny_tokenizer, [p], max_new_tokens=5)[0] for p in PROMPTS]


def test_a_pass_computed_again_hears_its_own_mixture() -> None:
    ids, gradients = tiny.batch()["input_ids"], []
    for checkpointing in (False, True):
        model = adapted(tiny.llama())
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.base_model.set_adapter(list(NAMES))
        mix_by_row(model.get_base_model(), route)
        model.train()
        loss = F.cross_entropy(logits(model, ids).flatten(0, 1), ids.flatten())
        # another text, of another number of rows, before the backward pass
        logits(model, ids[:1].roll(1, dims=1))
        loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(gradients[0]) == 24
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-6, atol=1e-7)


def test_a_mixture_is_not_merged_and_goes_with_the_adapters() -> None:
    model = adapted(tiny.llama())
    mix_by_row(model.get_base_model(), route)
    with pytest.raises(ValueError, match="each text has its own mixture"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="each text has its own mixture"):
        model.merge_and_unload()
    base, ids = model.unload(), tiny.batch()["input_ids"]
    assert not base._forward_pre_hooks
    assert torch.equal(logits(base, ids), logits(tiny.llama(), ids))


def test_rows_that_fit_no_mixture_are_refused() -> None:
    model = adapted(tiny.llama())
    mix_by_row(model.get_base_model(), lambda inputs: {"one": torch.ones(3)})
    with pytest.raises(ValueError, match="the mixture of adapters has 3 entries, and the batch of 4 rows"):
        logits(model, tiny.batch()["input_ids"])
