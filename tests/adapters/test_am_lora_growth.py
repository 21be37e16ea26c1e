"""AM-LoRA as tasks are added to it, and in real transformers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from folklora import AMLoRA, LoRA, activation_penalty, add_task
from folklora.adapters.am_lora import AMLoRAUpdate
from folklora.adapters.host.layer import FolkloraLayer, updates_of

IN, OUT, R = 24, 20, 3
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(IN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x)


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def adapted(base: nn.Module | None = None, **options: Any) -> PeftModel:
    """A model whose LoRAs and gates all have values of ordinary size."""
    settings = {"r": R, "alpha": 2.0, "dropout": 0.0, "tasks": 2, "target_modules": ["q"]} | options
    model = get_peft_model(base or net(), AMLoRA(**settings))
    randomise(model)
    return model


def randomise(model: PeftModel) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, update in updates_of(model, "default"):
            for part in (update.A, update.B, update.gate_weight, update.gate_bias):
                for parameter in part:
                    parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))


def the_layer(model: PeftModel) -> tuple[FolkloraLayer, AMLoRAUpdate]:
    return next(updates_of(model, "default"))


def inputs() -> Tensor:
    return torch.randn(2, 5, IN, generator=torch.Generator().manual_seed(2))


def assert_identical(before: list[Tensor], after: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def tokens(length: int) -> Tensor:
    return torch.randint(2, 128, (2, length), generator=torch.Generator().manual_seed(4))


def train(model: PeftModel, steps: int = 3) -> None:
    goal = torch.randn(2, 5, OUT, generator=torch.Generator().manual_seed(9))
    # frozen parameters are handed over too: without a gradient nothing may touch them, not even weight decay
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(inputs()) - goal).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("selector_train", ["new", "all"])
def test_training_a_task_leaves_the_older_ones_and_the_base_alone(selector_train: str):
    model = adapted(tasks=1, selector_train=selector_train)
    layer, update = the_layer(model)
    train(model)
    add_task(model)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    old = [update.A[0], update.B[0], layer.base_layer.weight, layer.base_layer.bias]
    gates = [update.gate_weight[0], update.gate_bias[0]]
    new = [update.A[1], update.B[1], update.gate_weight[1], update.gate_bias[1]]
    kept, kept_gates, start = copy.deepcopy([p.data for p in old]), copy.deepcopy(gates), copy.deepcopy(new)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in new + (gates if selector_train == "all" else [])}
    train(model)
    assert_identical(kept, [p.data for p in old])
    assert [torch.equal(a, b) for a, b in zip(kept_gates, gates, strict=True)] == [selector_train == "new"] * 2
    assert not any(torch.equal(a, b) for a, b in zip(start, new, strict=True))
    model.set_adapter("default")
    assert [id(p) for p in model.parameters() if p.requires_grad] == [id(p) for p in trained]


def test_growth_is_noted_in_every_configuration_and_saved(tmp_path: Path):
    model = adapted(tasks=1, rank_pattern={"q": 2})
    _, update = the_layer(model)
    assert update.config is not model.peft_config["default"]
    for tasks in (2, 3):
        add_task(model)
        assert (model.peft_config["default"].tasks, update.config.tasks, len(update.A)) == (tasks, tasks, tasks)
    randomise(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(net(), tmp_path, is_trainable=True)
    assert loaded.peft_config["default"].tasks == 3
    assert torch.equal(loaded(inputs()), model(inputs()))
    add_task(loaded)
    trained = {name.partition("default.")[2] for name, p in loaded.named_parameters() if p.requires_grad}
    assert trained == {"A.3", "B.3", "gate_weight.3", "gate_bias.3"}


def test_a_model_whose_penalty_nobody_took_can_be_copied():
    model = adapted(sparsity=1.0).train()
    expected = model(inputs())
    twin = copy.deepcopy(model)
    assert torch.equal(twin(inputs()), expected)
    assert torch.equal(activation_penalty(twin), activation_penalty(model))
    add_task(twin)
    assert (twin.peft_config["default"].tasks, model.peft_config["default"].tasks) == (3, 2)
    assert the_layer(twin)[1].config.tasks == 3


@pytest.mark.parametrize("granularity", ["token", "prefix", "sequence"])
def test_beside_a_plain_lora_both_add_their_updates(granularity: str):
    model = adapted(granularity=granularity)
    alone = model(inputs())
    model.add_adapter("second", LoRA(r=R, target_modules=["q"]))
    layer, _ = the_layer(model)
    lora = layer.folklora_updates["second"]
    torch.nn.init.normal_(lora.B)
    model.base_model.set_adapter(["default", "second"])
    expected = alone + inputs() @ lora.factors().dense().T
    tolerance = 100 * torch.finfo(torch.float32).eps * float(expected.detach().abs().max())
    torch.testing.assert_close(model(inputs()), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["default", "missing"])
def test_a_task_is_added_to_am_lora_alone(name: str):
    with pytest.raises(ValueError, match=f"no AM-LoRA adapter named '{name}'"):
        add_task(get_peft_model(net(), LoRA(r=R, target_modules=["q"])), name)


def layers_with_masks(model: PeftModel, source: Tensor, target: Tensor | None) -> list[Tensor]:
    """Each layer's mean penalty over the tokens that its input holds, from the attention that it noted."""
    means = []
    for layer, update in updates_of(model, "default"):
        a = 1 - update.attention[..., 0]
        from_source = layer.name.startswith("encoder") or layer.name.endswith("EncDecAttention.v")
        mask = source if from_source else target
        means.append(a.mean() if mask is None else (a * mask).sum() / mask.sum())
    return means


@pytest.mark.parametrize(("length", "masked"), [(3, False), (3, True), (8, True)])
def test_encoder_and_decoder_tokens_have_their_own_padding(tiny_t5: Any, length: int, masked: bool):
    targets = ["q", "v"]
    model = adapted(tiny_t5(), target_modules=targets, sparsity=1.0).train()
    updates = [update for _, update in updates_of(model, "default")]
    for update in updates:
        update.record = True
    ids = tokens(13)
    source = MASK.flip(-1)
    target = (torch.arange(length) < torch.tensor([[length], [2]])).long() if masked else None
    model(
        input_ids=ids[:, :5],
        attention_mask=source,
        decoder_input_ids=ids[:, 5 : 5 + length],
        decoder_attention_mask=target,
    )
    torch.testing.assert_close(
        activation_penalty(model), torch.stack(layers_with_masks(model, source, target)).mean(), rtol=1e-5, atol=0
    )


def test_generating_reads_the_masks_of_its_own_call(tiny_t5: Any):
    model = adapted(tiny_t5(), target_modules=["q", "v"], granularity="sequence")
    ids = tokens(5)
    call = {"max_new_tokens": 3, "use_cache": False, "output_scores": True, "return_dict_in_generate": True}

    def scores() -> Tensor:
        return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **call).scores[0]

    expected = scores()
    model(input_ids=ids, attention_mask=MASK, decoder_input_ids=ids[:, :1])
    assert torch.equal(scores(), expected)


def test_gradient_checkpointing_keeps_the_penaltys_gradient(tiny_llama: Any):
    ids = tokens(6)
    gradients = []
    for checkpointing in (False, True):
        model = adapted(tiny_llama(), target_modules=["q_proj", "v_proj"], sparsity=1.0).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = model(input_ids=ids, labels=ids).loss + activation_penalty(model)
        loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert_identical(*gradients)


@pytest.mark.parametrize("granularity", ["token", "prefix"])
def test_a_key_value_cache_stays_valid(tiny_llama: Any, granularity: str):
    model = adapted(tiny_llama(), target_modules=["q_proj", "v_proj"], granularity=granularity)
    ids = tokens(6)
    whole = model(input_ids=ids).logits
    start = model(input_ids=ids[:, :4], use_cache=True)
    rest = model(input_ids=ids[:, 4:], past_key_values=start.past_key_values, use_cache=True)
    # two layers of sums of at most 64 terms
    tolerance = 100 * torch.finfo(torch.float32).eps * float(whole.detach().abs().max())
    torch.testing.assert_close(torch.cat([start.logits, rest.logits], dim=1), whole, rtol=0, atol=tolerance)
