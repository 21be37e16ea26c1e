"""Feed-forward layers of transformers as one thing: their matrices, and what some of their hidden units compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.pytorch_utils import Conv1D

Units = slice | Tensor
"""Some of the hidden units: a run of them, or their numbers."""


class Layout(NamedTuple):
    """What the parts of a feed-forward layer are called; one without a gate has none."""

    gate: str | None
    up: str
    down: str

    @property
    def names(self) -> list[str]:
        """The linear layers, the one that leads back last."""
        return [name for name in self if name is not None]


_LAYOUTS = (
    Layout("gate_proj", "up_proj", "down_proj"),
    Layout("w1", "w3", "w2"),
    Layout("wi_0", "wi_1", "wo"),
    Layout(None, "up_proj", "down_proj"),
    Layout(None, "fc1", "fc2"),
    Layout(None, "fc_in", "fc_out"),
    Layout(None, "c_fc", "c_proj"),
    Layout(None, "wi", "wo"),
    Layout(None, "lin1", "lin2"),
    Layout(None, "dense_h_to_4h", "dense_4h_to_h"),
)
_ACTIVATIONS = ("act_fn", "act", "activation_fn", "activation")
# T5's; the others drop what leaves the layer
_DROPS_UNITS = ("wo",)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class FeedForward:
    """y = W_d u + b_d of hidden units u = act(W_g x + b_g) ⊙ (W_u x + b_u), or without a gate u = act(W_u x + b_u).

    Args:
        activation: act.
        up: W_u [f, d].
        down: W_d [d, f].
        gate: W_g [f, d], or None.
        up_bias: b_u [f], or None.
        gate_bias: b_g [f], or None.
        down_bias: b_d [d], or None.
        drop_units: Dropout of u.
        drop_output: Dropout of y.
    """

    activation: Callable[[Tensor], Tensor]
    up: Tensor
    down: Tensor
    gate: Tensor | None = None
    up_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    down_bias: Tensor | None = None
    drop_units: float = 0.0
    drop_output: float = 0.0

    def part(self, units: Units) -> FeedForward:
        """The layer of some hidden units alone, without b_d; of a run of units it copies nothing."""
        gate, gate_bias, up_bias = (None if t is None else t[units] for t in (self.gate, self.gate_bias, self.up_bias))
        return replace(
            self,
            gate=gate,
            up=self.up[units],
            down=self.down[:, units],
            gate_bias=gate_bias,
            up_bias=up_bias,
            down_bias=None,
        )

    def plus(self, change: Tensor) -> FeedForward:
        """The layer with a change [matrices, f, d] of W_g (if there is one), W_u and W_dᵀ; added up in float32."""
        *_, up, down = change.unbind()
        gate = None if self.gate is None else _sum(self.gate, change[0])
        return replace(self, gate=gate, up=_sum(self.up, up), down=_sum(self.down, down.T))

    def sum(
        self,
        x: Tensor,
        expand: Callable[[Tensor, Tensor, Tensor | None], Tensor] = F.linear,
        reduce: Callable[[Tensor, Tensor], Tensor] = F.linear,
    ) -> Tensor:
        """W_d u of inputs [..., d].

        Args:
            x: The inputs.
            expand: Multiplies x with W_g and W_u, and adds the bias.
            reduce: Multiplies u with W_d.
        """
        units = expand(x, self.up, self.up_bias)
        if self.gate is None:
            units = self.activation(units)
        else:
            units = self.activation(expand(x, self.gate, self.gate_bias)) * units
        return reduce(F.dropout(units, self.drop_units) if self.drop_units else units, self.down)

    def finish(self, summed: Tensor) -> Tensor:
        """y of W_d u: b_d, which the layer's parts have in common, and the layer's own dropout."""
        y = summed if self.down_bias is None else summed + self.down_bias.to(summed.dtype)
        return F.dropout(y, self.drop_output) if self.drop_output else y


def _sum(weight: Tensor, change: Tensor) -> Tensor:
    return (weight.to(torch.promote_types(weight.dtype, change.dtype)) + change).to(weight.dtype)


def layout_of(base: nn.Module) -> Layout | None:
    """How a module that is nothing but a feed-forward layer calls its parts; None where it is none."""
    parts = {name for name, child in base.named_children() if next(child.parameters(), None) is not None}
    if next(base.parameters(recurse=False), None) is not None or _activation(base) is None:
        return None
    return next((layout for layout in _LAYOUTS if set(layout.names) == parts), None)


def feed_forward_of(base: nn.Module) -> FeedForward:
    """A feed-forward layer's matrices, which are its own and no copies, and its dropout if it is in training."""
    layout = layout_of(base)
    gate, up, down = (None if name is None else getattr(base, name) for name in layout)
    drops = [child.p for child in base.children() if isinstance(child, nn.Dropout) and child.training]
    drop = drops[0] if drops else 0.0
    inside = layout.down in _DROPS_UNITS
    return FeedForward(
        _activation(base),
        matrix(up),
        matrix(down),
        None if gate is None else matrix(gate),
        up.bias,
        None if gate is None else gate.bias,
        down.bias,
        drop if inside else 0.0,
        0.0 if inside else drop,
    )


def matrix(layer: nn.Module) -> Tensor:
    """The weight [out, in] of a part."""
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight


def stored(layer: nn.Module, matrix: Tensor) -> Tensor:
    """A matrix [out, in] as a part stores it."""
    return matrix.T if isinstance(layer, Conv1D) else matrix


def feed_forward_problems(base: nn.Module, name: str) -> list[str]:
    """Why a feed-forward layer cannot be computed by its matrices; nothing if empty."""
    problems = []
    for part in layout_of(base).names:
        layer = getattr(base, part)
        weight, what = getattr(layer, "weight", None), f"layer '{name}.{part}'"
        if hasattr(layer, "base_layer"):
            problems.append(f"{what} carries adapters, whose part in '{name}' would be lost: merge them into it first")
        elif type(layer) not in (nn.Linear, Conv1D) or is_traceable_wrapper_subclass(weight):
            problems.append(f"{what} is a {type(layer).__name__}; slices are taken of plain weights only")
        elif "forward" in vars(layer) or any(getattr(layer, key) for key in _HOOKS):
            problems.append(f"{what} has hooks (offloading?), which slices of its weight would go past")
    if problems:
        return problems
    own = feed_forward_of(base)
    if own.down.shape != own.up.T.shape:
        return [f"'{name}' leads from {own.up.shape[1]} to {len(own.down)} values; both must be one width"]
    if not _computes(base):
        return [f"'{name}' ({type(base).__name__}) computes more than its linear layers and its activation"]
    return []


@torch.no_grad()
def _computes(base: nn.Module) -> bool:
    """Whether the module's own forward is that of its `FeedForward`, seen on an input; on the meta device: yes."""
    up = feed_forward_of(base).up
    if up.is_meta:
        return True
    x = torch.randn(1, 3, up.shape[1], generator=torch.Generator().manual_seed(0)).to(up)
    modes = [(module, module.training) for module in base.modules()]
    try:
        base.eval()
        own, expected = feed_forward_of(base), base(x).float()
    finally:
        for module, mode in modes:
            module.training = mode
    # the same products, if in another order; another function is far off
    error = (own.finish(own.sum(x)).float() - expected).abs().max()
    return bool(error <= 0.05 * expected.std())


def _activation(base: nn.Module) -> Callable[[Tensor], Tensor] | None:
    return next((getattr(base, name) for name in _ACTIVATIONS if callable(getattr(base, name, None))), None)
