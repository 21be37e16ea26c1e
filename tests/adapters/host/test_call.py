"""What a call says of its rows: how long it holds, who hears it, and what recomputed passes hear."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import T5Config, T5ForConditionalGeneration

import folklora
from folklora import KIND, AMLoRA, LoRA, tiny
from folklora.adapters.host.layer import layers_of

A, B = [0, 1, 0, 1], [1, 1, -1, 0]


def adapted(**options: Any) -> PeftModel:
    return tiny.moved(tiny.adapted(KIND(target_modules=tiny.TARGETS, **options))).eval()


def logits(model: nn.Module, **options: Any) -> Tensor:
    return model(**tiny.batch(), **options).logits


def test_a_call_and_a_block_say_the_same() -> None:
    model = adapted()
    expected = logits(model, class_labels=torch.tensor(A))
    with folklora.classes(model, A):
        assert torch.equal(logits(model), expected)
        # the block holds for the base model and for parts of the wrapped one too
        assert torch.equal(logits(model.get_base_model()), expected)
        with folklora.classes(model, torch.tensor(B)):
            other = logits(model)
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model, class_labels=B), other)
    assert not torch.allclose(expected, other)


def test_nothing_is_left_of_a_call_or_a_block_however_they_end() -> None:
    model = adapted()
    context = next(layers_of(model)).context
    with pytest.raises(ValueError, match="class 4 is unknown"):
        logits(model, class_labels=[4] * 4)
    assert context.classes is None
    with pytest.raises(RuntimeError), folklora.classes(model, A):
        raise RuntimeError
    assert context.classes is context.classes_in_block is None
    with pytest.raises(ValueError, match="needs the class of each row"):
        logits(model)


def test_classes_are_given_once() -> None:
    model = adapted()
    with folklora.classes(model, A), pytest.raises(ValueError, match="class_labels was passed inside a block"):
        logits(model, class_labels=A)


def test_a_class_that_an_idle_adapter_does_not_know_does_no_harm() -> None:
    model = adapted()
    model.add_adapter("other", KIND(classes=[7], target_modules=["q_proj"]))
    with folklora.classes(model, A):
        expected = logits(model)
        model.set_adapter("other")
        with pytest.raises(ValueError, match=r"adapter other: class 0, 1 is unknown; the classes are \[7\]"):
            logits(model)
    rows = ["default", "__base__", "default", "other"]
    model.set_adapter("default")
    mixed = adapted()
    mixed.add_adapter("other", KIND(classes=[0, 1, 7], target_modules=["q_proj"]))
    assert torch.allclose(logits(mixed, class_labels=A, adapter_names=rows)[::2], expected[::2], atol=1e-5)


def test_a_model_that_reads_no_classes_is_told_so() -> None:
    with pytest.raises(ValueError, match="no adapter of this model reads classes; it carries default"):
        folklora.classes(tiny.adapted(LoRA(target_modules=["q_proj"])), A).__enter__()
    with pytest.raises(ValueError, match="carries no Folklora adapter"):
        folklora.classes(tiny.llama(), A).__enter__()


def test_a_keyword_of_the_models_own_reaches_the_model_too() -> None:
    class Conditional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.table = nn.Linear(6, 6), nn.Embedding(3, 6)

        def forward(self, x: Tensor, class_labels: Tensor) -> Tensor:
            return self.layer(x) + self.table(class_labels)

    torch.manual_seed(0)
    model = tiny.moved(get_peft_model(Conditional(), KIND(classes=2, target_modules=["layer"])))
    x, labels = torch.randn(3, 6), torch.tensor([0, 1, 1])
    layer, table = next(layers_of(model)), model.get_base_model().table
    with folklora.classes(model, labels):
        assert torch.equal(model(x, class_labels=labels), layer(x) + table(labels))
        # the model's own null class need not be a class of the adapter
        assert torch.equal(model(x, class_labels=labels + 1), layer(x) + table(labels + 1))
        expected = layer(x)
    assert torch.equal(model(x, class_labels=labels), expected + table(labels))


def test_copies_hear_their_own_calls() -> None:
    model = adapted()
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    expected = logits(model, class_labels=A)
    with folklora.classes(model, B):
        for twin in twins:
            assert torch.equal(logits(twin, class_labels=A), expected)


def test_unloading_leaves_the_model_as_it_was() -> None:
    base = tiny.llama()
    base.gradient_checkpointing_enable({"use_reentrant": False})
    own = [vars(module).get("_gradient_checkpointing_func") for module in base.modules()]
    model = get_peft_model(base, KIND(target_modules=tiny.TARGETS)).train()
    logits(model, class_labels=A)
    plain = model.unload()
    hooks = [hook for m in plain.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert not [hook for hook in hooks if type(hook).__module__.startswith("folklora")]
    assert [vars(module).get("_gradient_checkpointing_func") for module in plain.modules()] == own


def test_generation_keeps_the_classes_of_its_block() -> None:
    model, tokens = adapted(), tiny.batch()["input_ids"]
    found = {}
    for labels in (A, B):
        with folklora.classes(model, labels):
            longer = model.generate(input_ids=tokens, max_new_tokens=3, do_sample=False, use_cache=True)
            assert torch.equal(longer[:, -1], model(input_ids=longer[:, :-1]).logits[:, -1].argmax(-1))
            found[tuple(labels)] = longer
    assert not torch.equal(*found.values())


def test_an_encoder_and_its_decoder_hear_the_classes() -> None:
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4, "vocab_size": 32}
    torch.manual_seed(0)
    base = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    model = tiny.moved(get_peft_model(base, KIND(target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"))).eval()
    tokens = torch.randint(32, (2, 5), generator=torch.Generator().manual_seed(1))
    mixed = model(input_ids=tokens, labels=tokens, class_labels=[1, 0]).logits
    for row, label in enumerate([1, 0]):
        one = model(input_ids=tokens[row : row + 1], labels=tokens[row : row + 1], class_labels=[label]).logits
        assert torch.allclose(one[0], mixed[row], atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_passes_hear_what_their_own_pass_was_told(reentrant: bool) -> None:
    found = []
    for checkpointing in (False, True):
        model = adapted().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        # two passes of other classes before one gradient, which is computed when both calls have ended
        total = logits(model, class_labels=A).square().mean() + 2 * logits(model, class_labels=B).square().mean()
        total.backward()
        found.append(tiny.gradients(model))
    assert set(found[0]) == set(found[1])
    for name, expected in found[0].items():
        assert torch.allclose(found[1][name], expected, rtol=1e-5, atol=1e-6), name


def test_recomputed_passes_see_their_own_mask() -> None:
    found = []
    for checkpointing in (False, True):
        model = tiny.moved(tiny.adapted(AMLoRA(r=2, dropout=0.0, target_modules=tiny.TARGETS))).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        left, right = tiny.batch(), tiny.batch()
        left["attention_mask"] = torch.ones_like(left["attention_mask"])
        left["attention_mask"][:, :2] = 0
        (model(**left).logits.square().mean() + model(**right).logits.square().mean()).backward()
        found.append(tiny.gradients(model))
    for name, expected in found[0].items():
        assert torch.allclose(found[1][name], expected, rtol=1e-5, atol=1e-6), name


def test_a_checkpoint_by_hand_needs_the_block_around_the_backward_pass() -> None:
    class ByHand(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.layer, x, use_reentrant=False)

    torch.manual_seed(0)
    model = tiny.moved(get_peft_model(ByHand(), KIND(target_modules=["layer"])))
    y = model(torch.randn(2, 6), class_labels=[0, 1])
    with pytest.raises(ValueError, match="must still be open in the backward pass"):
        y.sum().backward()
    with folklora.classes(model, [0, 1]):
        model(torch.randn(2, 6)).sum().backward()
    assert next(layers_of(model)).folklora_updates["default"].components.U.grad.abs().max() > 0


def test_compiled_within_a_block_the_classes_may_change() -> None:
    torch.manual_seed(0)
    model = tiny.moved(get_peft_model(nn.Sequential(nn.Linear(6, 6)), KIND(target_modules=["0"]))).eval()
    x = torch.randn(4, 6)
    expected = [model(x, class_labels=labels) for labels in (A, B)]
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for labels, y in zip((A, B), expected, strict=True):
            with folklora.classes(compiled, labels):
                assert torch.allclose(compiled(x), y, atol=1e-6)
