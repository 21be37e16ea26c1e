"""Every method on every kind of layer that it adapts, with gradients, against a dense weight in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers.pytorch_utils import Conv1D

from folklora import LoRA, check, methods, tiny
from folklora.adapters.base import AdapterConfig
from folklora.adapters.host.kinds import kind_of
from folklora.adapters.host.layer import layers_of, updates_of

METHODS = {m.name: m.factory for m in methods("adapters") if (m.name, "merge") not in check.EXCEPTIONS}


class One(nn.Module):
    """A model that is one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def _image() -> Tensor:
    return torch.randn(2, 8, 7, 9, dtype=torch.float64)


def _tokens() -> Tensor:
    return torch.tensor([[1, 0, 19], [3, 3, 0]])


# a layer, its input, and what it computes with a weight in its own layout
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], Callable[..., Tensor]]] = {
    "linear": (lambda: nn.Linear(12, 10), lambda: torch.randn(2, 3, 12, dtype=torch.float64), F.linear),
    "Conv1D": (
        lambda: Conv1D(10, 12),
        lambda: torch.randn(2, 3, 12, dtype=torch.float64),
        lambda x, W, b: x @ W + b,
    ),
    "embedding": (lambda: nn.Embedding(20, 12), _tokens, lambda x, W, b: F.embedding(x, W)),
    "embedding with padding": (
        lambda: nn.Embedding(20, 12, padding_idx=0),
        _tokens,
        lambda x, W, b: F.embedding(x, W, padding_idx=0),
    ),
    "convolution of one pixel": (lambda: nn.Conv2d(8, 10, 1), _image, F.conv2d),
    "convolution of a square": (
        lambda: nn.Conv2d(8, 10, 3, stride=2, padding=1, bias=False),
        _image,
        lambda x, W, b: F.conv2d(x, W, b, stride=2, padding=1),
    ),
    "convolution in groups": (
        lambda: nn.Conv2d(8, 12, 3, groups=2, padding=1),
        _image,
        lambda x, W, b: F.conv2d(x, W, b, groups=2, padding=1),
    ),
    "convolution by channel": (
        lambda: nn.Conv2d(8, 16, 3, groups=8),
        _image,
        lambda x, W, b: F.conv2d(x, W, b, groups=8),
    ),
    "convolution in time": (
        lambda: nn.Conv1d(8, 10, 4, dilation=2),
        lambda: torch.randn(2, 8, 15, dtype=torch.float64),
        lambda x, W, b: F.conv1d(x, W, b, dilation=2),
    ),
}
CASES = [
    (name, layer)
    for name, method in METHODS.items()
    for layer, (make, _, _) in LAYERS.items()
    if kind_of(make(), layer).name in method.layer_kinds
]


def _config(name: str) -> AdapterConfig:
    known = {field.name for field in dataclasses.fields(METHODS[name])}
    small = {"r": 3, "target_modules": ["layer"]}
    return METHODS[name](**{key: value for key, value in small.items() if key in known})


def _layer(kind: str) -> nn.Module:
    torch.manual_seed(1)
    return LAYERS[kind][0]().double()


def _adapted(name: str, kind: str, dtype: torch.dtype = torch.float64) -> tuple[PeftModel, Tensor]:
    """The adapted layer off its start, and an input."""
    model, x = One(_layer(kind).to(dtype)), LAYERS[kind][1]()
    x = x.to(dtype) if x.is_floating_point() else x
    config = tiny.calibrated(model, _config(name), [x])
    return tiny.moved(get_peft_model(model, config)).to(dtype).eval(), x


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_output_and_gradients_are_those_of_the_dense_weight(name: str, kind: str) -> None:
    model, x = _adapted(name, kind)
    layer = next(layers_of(model))
    base, update = layer.get_base_layer(), layer.folklora_updates["default"]
    y = model(x)
    cotangent = torch.randn_like(y)
    trained = {key: value for key, value in update.named_parameters() if value.requires_grad}
    found = torch.autograd.grad(y, list(trained.values()), cotangent)

    weight = base.weight.detach() + layer.kind.layout(base, tiny.change(layer))
    bias = getattr(base, "bias", None)
    bias = bias if update.bias_change is None else bias.detach() + update.bias_change
    expected = LAYERS[kind][2](x, weight, bias)
    assert not torch.allclose(expected, base(x), atol=1e-3)
    tiny.close(y, expected, 1e-6, "the output and that of the dense weight")
    if kind == "embedding with padding":
        # the row of padding is no part of what is trained, where it goes through A
        return
    for key, one, other in zip(
        trained, found, torch.autograd.grad(expected, list(trained.values()), cotangent), strict=True
    ):
        tiny.close(one, other, 1e-6, f"the gradient of {key}")


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_saved_and_merged(name: str, kind: str, tmp_path: Path) -> None:
    model, x = _adapted(name, kind, torch.float32)
    expected = model(x)
    model.save_pretrained(tmp_path)
    derives = any(update.unsaved for _, update in updates_of(model, "default"))
    with nullcontext() if derives else tiny.NoDecomposition():
        loaded = PeftModel.from_pretrained(One(_layer(kind).float()), tmp_path)
    assert torch.equal(loaded(x), expected)
    merged = loaded.merge_and_unload()
    assert type(merged.layer) is type(_layer(kind))
    wrapped = next(layers_of(model))
    assert (wrapped.out_features, wrapped.in_features) == wrapped.kind.shape(wrapped.get_base_layer())
    tiny.close(merged(x), expected, 1e-5, "the merged layer and the adapted one")


@pytest.mark.parametrize("name", ["lora", "lt-sft"])
@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_flat_parameters_of_fsdp_are_seen(kind: str, name: str, one_process: None) -> None:
    """While they are whole, plain tensors lie over the parameters, the base's weight among them."""
    model, x = _adapted(name, kind, torch.float32)
    expected = model(x)
    with model.disable_adapter():
        assert not torch.allclose(model(x), expected, atol=1e-3)
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id="cpu")
    tiny.close(wrapped(x), expected, 1e-6, "sharded and not")


def test_padding_is_trained_as_peft_trains_it() -> None:
    ours, _ = _adapted("lora", "embedding with padding")
    update = next(layers_of(ours)).folklora_updates["default"]
    theirs = get_peft_model(
        One(_layer("embedding with padding")), LoraConfig(r=3, lora_alpha=16, target_modules=["layer"])
    )
    layer = theirs.base_model.model.layer
    layer.lora_embedding_A["default"].data = update.A.detach().clone()
    layer.lora_embedding_B["default"].data = update.B.detach().clone()
    for model in (ours, theirs):
        model(_tokens()).square().sum().backward()
    tiny.close(update.A.grad, layer.lora_embedding_A["default"].grad, 1e-6, "the gradients of A")
    tiny.close(update.B.grad, layer.lora_embedding_B["default"].grad, 1e-6, "the gradients of B")
    assert not update.A.grad[:, 0].any()


def test_what_cannot_be_adapted_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match=r"'layer' is a LayerNorm; Folklora adapts linear, embedding and convolution"):
        get_peft_model(One(nn.LayerNorm(4)), LoRA(r=2, target_modules=["layer"]))


class Transposed(nn.Module):
    """A layer of somebody's own that calls itself linear and keeps [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 5, 3
        self.weight = nn.Parameter(torch.randn(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def test_a_weight_that_lies_the_other_way_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layer 'layer' \(Transposed\) keeps a weight \[5, 3\].*here \[3, 5\]"):
        get_peft_model(One(Transposed()), LoRA(r=2, target_modules=["layer"]))
