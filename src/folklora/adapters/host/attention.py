"""torch's own attention, which multiplies by its weights and calls no layer; and its fast path, which reads weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from folklora.adapters.host.experts import ExpertsLayer
from folklora.adapters.host.feed_forward_layer import FeedForwardLayer
from folklora.adapters.host.kinds import ATTENTION, EXPERTS, FEED_FORWARD, Kind, weight_names
from folklora.adapters.host.layer import FolkloraLayer
from folklora.adapters.host.weights import WeightsLayer


class AttentionLayer(WeightsLayer):
    """A `torch.nn.MultiheadAttention` and the updates of its projections, each of which a method sees as one matrix.

    The projections of query, key and value are one weight [3 width, width] where torch keeps them so.
    """

    def __getattr__(self, name: str) -> Any:
        """torch's encoder layer asks its attention for its weights and sizes."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            value = getattr(self.base_layer, name)
            return _watched(self, value) if name in weight_names(self.base_layer) else value


class EncoderLinear(FolkloraLayer):
    """A linear layer of a `torch.nn.TransformerEncoderLayer`, whose fast path goes past its forward."""

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, such that the fast path is taken only where it computes the same."""
        return _watched(self, self.get_base_layer().weight)


class _Watched(Tensor):
    """A weight that is no plain tensor, so that torch's fast paths leave its multiplication to its module."""


def _watched(layer: FolkloraLayer, weight: Tensor) -> Tensor:
    # while one of the two holds, the weight is all that the layer multiplies by; while both do, forward unmerges
    if bool(layer._disable_adapters) != bool(layer.merged_adapters):
        return weight
    return weight.as_subclass(_Watched)


def layer_class(kind: Kind, parent: nn.Module) -> type[FolkloraLayer]:
    """Which layer of the host goes around a base layer.

    Args:
        kind: The base layer's.
        parent: The module that it is a part of.
    """
    if kind is EXPERTS:
        return ExpertsLayer
    if kind is FEED_FORWARD:
        return FeedForwardLayer
    if kind is ATTENTION:
        return AttentionLayer
    return EncoderLinear if isinstance(parent, nn.TransformerEncoderLayer) else FolkloraLayer
