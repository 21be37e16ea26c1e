"""Layers of one block that read the same tensor, such as query, key and value, share a product and its gradient.

Nothing of the model is changed: which layers belong together is known by their names, and whether they really are
called with one tensor is seen at each call.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from folklora.adapters.host.kinds import LINEAR, is_plain
from folklora.factored import Factors, SharedInput, share_input

if TYPE_CHECKING:
    from folklora.adapters.host.layer import FolkloraLayer

# in the order in which the architectures of transformers call them
_TOGETHER = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
    ("wi_0", "wi_1"),
    ("w1", "w3"),
)
# here the keys and values read the encoder
_APART = ("EncDecAttention", "encoder_attn", "crossattention", "cross_attn")

Offer = tuple["weakref.ref[Tensor]", Factors, SharedInput]


def link_siblings(model: nn.Module) -> None:
    """Tell each adapted layer which later ones are called with its input.

    Args:
        model: The model, with the adapters' layers in place.
    """
    from folklora.adapters.host.layer import FolkloraLayer

    for name, parent in model.named_modules():
        if any(part in name.split(".") for part in _APART):
            continue
        for names in _TOGETHER:
            layers = [getattr(parent, child, None) for child in names]
            layers = [layer for layer in layers if isinstance(layer, FolkloraLayer) and layer.kind is LINEAR]
            for index, layer in enumerate(layers):
                layer.siblings = layers[index + 1 :]


def offered(layer: FolkloraLayer, x: Tensor) -> tuple[Factors, SharedInput] | None:
    """What an earlier sibling computed for this very call of the layer, or None."""
    offer = layer.offer
    if offer is None or torch.compiler.is_compiling():
        return None
    # past nn.Module's own assignment, which looks for parameters and takes long
    vars(layer)["offer"] = None
    return offer[1:] if offer[0]() is x else None


def share(layer: FolkloraLayer, x: Tensor, factors: Factors) -> SharedInput | None:
    """Multiply x by the A of the layer and of its later siblings at once, and leave them their parts.

    Args:
        layer: The first of them to be called.
        x: Its input.
        factors: Its own.

    Returns:
        The layer's part, or None where there is nobody to share with.
    """
    if torch.compiler.is_compiling() or not (_fits(layer, x) and _here(factors, x)):
        return None
    others, parts = [], [factors]
    for sibling in layer.siblings:
        # asked last: gates that are computed may leave marks of the pass
        theirs = sibling.current_factors(x) if _fits(sibling, x) else None
        if theirs is not None and _here(theirs, x):
            others.append(sibling)
            parts.append(theirs)
    if not others:
        return None
    own, *rest = share_input(x, parts)
    for sibling, theirs, part in zip(others, parts[1:], rest, strict=True):
        vars(sibling)["offer"] = (weakref.ref(x), theirs, part)
    return own


def _fits(layer: FolkloraLayer, x: Tensor) -> bool:
    base = layer.get_base_layer()
    # a replica of nn.DataParallel has its siblings on another device
    plain = is_plain(base) and not getattr(layer, "_is_replica", False)
    return plain and x.is_floating_point() and base.in_features == x.shape[-1]


def _here(factors: Factors, x: Tensor) -> bool:
    # FSDP may hold a sibling's factors sharded
    return factors.A.device == x.device and not hasattr(factors.A, "full_tensor")
