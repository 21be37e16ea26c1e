"""Checks of `folklora.check` on what a method can be put on, and on what PEFT's own tests ask of a method besides.

Each takes the class of a configuration and makes its own, since options may name layers of one model.
"""

from __future__ import annotations

from typing import Any

import peft
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from folklora import tiny
from folklora.adapters.base import AdapterConfig
from folklora.adapters.lora import LoRA
from folklora.check_training import NotHereError

_WIDTH, _BOTH = 32, ["default", "other"]


class _Convolves(nn.Module):
    """A convolution whose weight is [32, 8, 2, 2], 32 by 32 as a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(8, _WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, positions, 32] to [batch, 32, 1, positions]."""
        return self.layer(x.mT.reshape(len(x), 8, 4, -1))


class _Attends(nn.Module):
    """torch's own attention of width 32 over itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(_WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, positions, 32] to the same."""
        return self.layer(x, x, x)[0]


def check_start_at_base(config: AdapterConfig) -> None:
    """A model with a new adapter computes what its base does."""
    start, base = tiny.logits(tiny.adapted(_own(config))), tiny.logits(tiny.llama())
    tiny.close(start, base, 1e-5, "the logits at the start and the base's")


def check_plain_module(config: AdapterConfig) -> None:
    """A module of two linear layers, which has no blocks and no configuration, can be adapted."""
    _check_changes(config, tiny.TwoLayers(), ["q", "v"])


def check_convolution(config: AdapterConfig) -> None:
    """A convolution can be adapted."""
    _check_changes(config, _Convolves(), ["layer"])


def check_attention(config: AdapterConfig) -> None:
    """torch's own attention can be adapted."""
    _check_changes(config, _Attends(), ["layer"])


def check_embedding(config: AdapterConfig) -> None:
    """An embedding can be adapted."""
    model = tiny.trained(_own(config, target_modules=["embed_tokens"]))
    tiny.require(not torch.allclose(tiny.logits(model), tiny.logits(tiny.llama())), "training changed nothing")


def check_dropout(config: AdapterConfig) -> None:
    """The adapter's input can be dropped out in training."""
    model = tiny.trained(_own(config, dropout=0.5))
    tiny.same(tiny.logits(model), tiny.logits(model), "the logits of two passes in evaluation")
    model.train()
    with torch.no_grad():
        one, two = (model(**tiny.batch(model)).logits for _ in range(2))
    tiny.require(not torch.allclose(one, two), "two passes in training drop the same")


def check_weighted(config: AdapterConfig) -> None:
    """`add_weighted_adapter` makes one LoRA of it and another adapter, which computes what both do at once."""
    model = tiny.trained(_own(config))
    model.add_adapter("other", LoRA(r=3, target_modules=["q_proj", "up_proj"]))
    tiny.moved(model, "other").eval()
    model.base_model.set_adapter(_BOTH)
    both = tiny.logits(model)
    model.add_weighted_adapter(_BOTH, [1.0, 1.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    tiny.close(tiny.logits(model), both, 1e-5, "the logits of the sum and of both at once")


def check_base_values(config: AdapterConfig) -> None:
    """What PEFT lists as the base's values are those of the base, and no others."""
    if not hasattr(peft, "get_base_model_state_dict"):
        raise NotHereError("this version of PEFT does not list the base's values")
    found, base = peft.get_base_model_state_dict(tiny.trained(_own(config))), tiny.llama().state_dict()
    more = sorted(set(found) ^ set(base))
    tiny.require(not more, f"{', '.join(more[:3])} is the base's or the adapter's, and PEFT says otherwise")
    for name, value in found.items():
        tiny.same(value, base[name], f"the base's {name}")


def _own(config: AdapterConfig, **options: Any) -> AdapterConfig:
    return tiny.sized(type(config), **{"target_modules": tiny.targets_of(config), **options})


@torch.no_grad()
def _check_changes(config: AdapterConfig, base: nn.Module, targets: list[str]) -> None:
    x = torch.randn(2, 6, _WIDTH, generator=torch.Generator().manual_seed(23))
    expected = base.eval()(x)
    with torch.enable_grad():
        config = tiny.calibrated(base, _own(config, target_modules=targets), [x])
    model = tiny.moved(get_peft_model(base, config)).eval()
    found = _called(model, x)
    tiny.require(torch.isfinite(found).all(), "the output is not finite")
    tiny.require(not torch.allclose(found, expected), "the output is the base's")
    with model.disable_adapter():
        tiny.close(_called(model, x), expected, 1e-6, "the output with the adapter disabled and the base's")


def _called(model: PeftModel, x: Tensor) -> Tensor:
    return model(x, class_labels=[0, 1]) if tiny.reads_classes(model) else model(x)
