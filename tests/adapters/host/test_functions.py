"""Updates that are functions, that read what enters their block, and that are told something by a call."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from folklora import AdapterConfig, LoRA, Update, tiny
from folklora.adapters.host.blocks import block_of, read_block, stop_reading
from folklora.adapters.host.call import CallContext, telling
from folklora.adapters.host.layer import layers_of


@dataclass
class Sine(AdapterConfig):
    method: str = "sine"
    note: str = ""

    def fit(self, model: nn.Module) -> None:
        self.note = type(model).__name__

    def check(self, shape: tuple[int, int], name: str) -> list[str]:
        return []

    def update(self, weight: Tensor) -> SineUpdate:
        return SineUpdate(weight.shape[0])


class SineUpdate(Update):
    """y + a sin(y) times what the call says, or nothing where it says "nothing"."""

    gated: ClassVar[bool] = True
    is_function: ClassVar[bool] = True

    def __init__(self, out: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.full((out,), 0.5))

    def placed(self, layer: Any, adapter_name: str) -> None:
        self.context, self.place = layer.context, (adapter_name, layer.name)
        self.before = [sibling.place for sibling in layer.updates_elsewhere(adapter_name)]

    def function(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor | None:
        self.seen = (x, y, mask)
        said = self.context.told.get("times", 1.0)
        return None if said == "nothing" else said * self.a * torch.sin(y)


def model(targets: tuple[str, ...] = ("q_proj", "down_proj")) -> nn.Module:
    return get_peft_model(tiny.llama(), Sine(target_modules=list(targets)))


def test_a_function_adds_to_the_base_and_to_factors_and_reads_the_base_alone():
    net = model()
    net.add_adapter("other", LoRA(r=2, target_modules=["q_proj"]))
    tiny.moved(net, "other")
    layer, x = next(layers_of(net)), torch.randn(2, 5, 32)
    base, sine, lora = (tiny.layer_output(layer, names, x) for names in ([], ["default"], ["other"]))
    both = tiny.layer_output(layer, ["default", "other"], x)
    torch.testing.assert_close(sine, base + 0.5 * torch.sin(base))
    torch.testing.assert_close(both, lora + 0.5 * torch.sin(base))
    assert torch.equal(layer.folklora_updates["default"].seen[1], base)


def test_it_is_given_the_mask_of_its_positions_and_its_rows():
    net = model()
    tiny.logits(net)
    update = next(layers_of(net)).folklora_updates["default"]
    assert torch.equal(update.seen[2], tiny.batch()["attention_mask"])
    base = tiny.logits(tiny.llama())
    with torch.no_grad():
        mixed = net(**tiny.batch(), adapter_names=["default", "__base__", "default", "__base__"]).logits
    torch.testing.assert_close(mixed[1::2], base[1::2])
    torch.testing.assert_close(mixed[::2], tiny.logits(net)[::2])
    assert not torch.allclose(mixed[0], base[0])


def test_options_are_filled_in_from_the_model_and_updates_know_their_place():
    net = model()
    assert net.peft_config["default"].note == "LlamaForCausalLM"
    places = [layer.folklora_updates["default"].place for layer in layers_of(net)]
    assert places[0] == ("default", "model.layers.0.self_attn.q_proj")
    for number, layer in enumerate(layers_of(net)):
        assert layer.folklora_updates["default"].before == places[:number]


def test_what_a_call_is_told_is_forgotten_afterwards():
    net, base = model(), tiny.logits(tiny.llama())
    once = tiny.logits(net)
    with telling(net, times=2.0, more=1):
        twice = tiny.logits(net)
        assert not torch.allclose(twice, once)
        with telling(net, times="nothing"):
            assert torch.equal(tiny.logits(net), base)
            assert next(layers_of(net)).context.told["more"] == 1
        assert torch.equal(tiny.logits(net), twice)
        twin = copy.deepcopy(net)
    with pytest.raises(KeyError), telling(net, times=3.0):
        raise KeyError
    assert torch.equal(tiny.logits(net), once)
    assert torch.equal(tiny.logits(twin), twice)


def test_a_recomputed_pass_is_told_what_its_own_pass_was_told():
    gradients = []
    for checkpointing in (False, True):
        net = model().train()
        if checkpointing:
            net.gradient_checkpointing_enable({"use_reentrant": False})
        with telling(net, times=2.0):
            loss = tiny.loss(net)
        with telling(net, times="nothing"):
            loss.backward()
        gradients.append(tiny.gradients(net))
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=0, atol=1e-6)
        assert float(expected.abs().max()) > 1e-3


def test_the_block_of_a_layer():
    assert block_of("model.layers.11.mlp.experts.3.up_proj") == "model.layers.11"
    with pytest.raises(ValueError, match="layer 'lm_head' is in no block"):
        block_of("lm_head")


class Block(nn.Module):
    def __init__(self, first: bool) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        self.first = first

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states if self.first else hidden_states * 2
        return x + self.parts[0](torch.tanh(self.parts[1](x)))


@pytest.mark.parametrize("first", [True, False])
def test_what_enters_a_block_is_known_while_it_runs(first: bool):
    net, context, x = nn.ModuleDict({"0": Block(first)}), CallContext(), torch.randn(2, 3)
    read_block(net, "0", context)
    read_block(net, "0", context)
    seen = []
    net["0"].parts[0].register_forward_pre_hook(lambda *_: seen.append(context.blocks.get("0")))
    net["0"](hidden_states=x)
    net["0"](x)
    assert seen[0] is x
    assert seen[1] is x
    assert context.blocks == {}
    # the part that was handed it speaks for the block when that is computed again without its own hooks
    net["0"].forward(x)
    assert context.entries == ({"0": "parts.1"} if first else {})
    assert (seen[2] is x) == first
    assert copy.deepcopy(context).blocks == {}
    stop_reading(net)
    assert sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in net.modules()) == 1
