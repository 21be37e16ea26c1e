"""Trained biases: a change beside each update, under every way of calling, merging, saving and exporting a layer."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from folklora import KaSA, LoRA, SoMA, early_blocks, export_lora, tiny
from folklora.adapters.host.layer import layers_of, updates_of

TARGETS = ["wide", "long", "first", "plain"]


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.long = nn.Conv2d(3, 6, (3, 2), padding=1), nn.Conv1d(6, 5, 2)
        self.first, self.plain = nn.Linear(5, 4), nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(torch.tanh(self.first(self.long(self.wide(x).flatten(2)).mean(-1))))


def net() -> _Net:
    torch.manual_seed(0)
    return _Net().eval()


def inputs() -> Tensor:
    return torch.randn(3, 3, 6, 5, generator=torch.Generator().manual_seed(1))


def adapted(config: Any = LoRA, **options: Any) -> PeftModel:
    options = {"r": 2, "train_bias": True, "target_modules": TARGETS} | options
    return tiny.moved(get_peft_model(net(), config(**options))).eval()


def by_hand(model: PeftModel, *names: str) -> nn.Module:
    """The base with the weights' updates and the biases' changes written into it."""
    plain = net()
    with torch.no_grad():
        for layer in layers_of(model):
            own = plain.get_submodule(layer.name)
            for update in (layer.folklora_updates[name] for name in names if name in layer.folklora_updates):
                own.weight += layer.kind.layout(own, update.factors().dense())
                if update.bias_change is not None:
                    own.bias += update.bias_change
    return plain


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_layers_with_a_bias_have_a_change_that_starts_at_zero():
    model = get_peft_model(net(), LoRA(r=2, train_bias=True, target_modules=TARGETS))
    changes = {layer.name: update.bias_change for layer, update in updates_of(model, "default")}
    assert changes.pop("plain") is None
    assert all((change == 0).all() and change.requires_grad for change in changes.values())
    assert torch.equal(model.eval()(inputs()), net()(inputs()))
    trainable, _ = model.get_nb_trainable_parameters()
    weights = {"wide": (6, 18), "long": (5, 12), "first": (4, 5), "plain": (4, 4)}
    assert trainable == sum(2 * sum(shape) for shape in weights.values()) + 6 + 5 + 4
    without = get_peft_model(net(), LoRA(r=2, target_modules=TARGETS))
    assert all(update.bias_change is None for _, update in updates_of(without, "default"))


def test_output_and_gradient_are_those_of_a_changed_bias():
    model = adapted()
    plain = by_hand(model, "default").requires_grad_()
    for one in (model, plain):
        one(inputs()).square().sum().backward()
    assert_same(model(inputs()), plain(inputs()))
    for layer, update in updates_of(model, "default"):
        own = plain.get_submodule(layer.name)
        if own.bias is not None:
            assert_same(update.bias_change.grad, own.bias.grad)
            assert layer.get_base_layer().bias.grad is None


def test_with_dropout_the_bias_is_whole():
    model = adapted(dropout=0.5, target_modules=["first"])
    ((layer, update),) = updates_of(model, "default")
    update.B.data.zero_()
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(2))
    own = layer.get_base_layer()
    assert_same(layer.train()(x), nn.functional.linear(x, own.weight, own.bias + update.bias_change))


def test_merging_switching_and_disabling():
    model = adapted()
    model.add_adapter("other", LoRA(r=3, train_bias=True, target_modules=["first", "long"]))
    tiny.moved(model, "other").eval()
    bases = {layer.name: layer.get_base_layer().bias for layer in layers_of(model)}
    both = by_hand(model, "default", "other")(inputs())
    model.base_model.set_adapter(["default", "other"])
    assert_same(model(inputs()), both)
    for steps in ([["default", "other"]], [["other"], ["default"]]):
        for names in steps:
            model.merge_adapter(adapter_names=names)
        assert_same(model(inputs()), both)
        model.unmerge_adapter()
        assert all(layer.get_base_layer().bias is bases[layer.name] for layer in layers_of(model))
    with model.disable_adapter():
        assert torch.equal(model(inputs()), net()(inputs()))
    merged = copy.deepcopy(model).merge_and_unload(adapter_names=["default", "other"])
    assert_same(merged(inputs()), both)
    assert torch.equal(model.unload()(inputs()), net()(inputs()))


def test_rows_have_each_their_own_bias():
    model = adapted()
    model.add_adapter("other", LoRA(r=3, train_bias=True, target_modules=["first", "long"]))
    tiny.moved(model, "other").eval()
    mixed = model(inputs(), adapter_names=["other", "__base__", "default"])
    for row, names in enumerate((["other"], [], ["default"])):
        assert_same(mixed[row], by_hand(model, *names)(inputs())[row])


def test_saved_loaded_and_exported(tmp_path: Path):
    model = adapted()
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(PeftModel.from_pretrained(net(), tmp_path / "saved")(inputs()), model(inputs()))
    export_lora(model, tmp_path / "lora")
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["lora_bias"] is True
    assert_same(PeftModel.from_pretrained(net(), tmp_path / "lora")(inputs()), model(inputs()))


def test_biases_beside_an_embedding_are_not_exported(tmp_path: Path):
    base = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3))
    model = get_peft_model(base, LoRA(r=2, train_bias=True, target_modules=["0", "1"]))
    with pytest.raises(ValueError, match="changes biases and adapts the embedding '0'"):
        export_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_compiled_and_under_autocast():
    model = adapted(KaSA, target_modules=["first", "long"])
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same(compiled(inputs()), model(inputs()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(inputs()).dtype == torch.bfloat16


def test_soma_on_a_vision_transformer_trains_biases_of_late_blocks_alone():
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48, image_size=8, patch_size=4
    )
    torch.manual_seed(0)
    base = ViTForImageClassification(config).eval()
    images = torch.randn(2, 3, 8, 8)
    expected = base(images).logits
    soma = SoMA(r=4, target_modules="all-linear", exclude_modules=early_blocks(base, 1), modules_to_save=["classifier"])
    model = get_peft_model(base, soma).eval()
    torch.testing.assert_close(model(images).logits, expected, rtol=0, atol=1e-5)
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    heads = {name for name in trained if ".classifier.modules_to_save." in name}
    adapters = {
        f"{path}.folklora_updates.default.{key}"
        for path, module in model.named_modules()
        if re.search(r"\.layers?\.[12]\.", path) and hasattr(module, "folklora_updates")
        for key in ("A", "B", "bias_change")
    }
    assert trained == heads | adapters
    assert (len(heads), len(adapters)) == (2, 2 * 6 * 3)
