"""The layer around a whole feed-forward layer, for methods that compute it in another way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from folklora.adapters.host.call import CallContext
from folklora.adapters.host.feed_forward import feed_forward_of, layout_of, stored
from folklora.adapters.host.kinds import evenly_spaced
from folklora.adapters.host.layer import FolkloraLayer
from folklora.adapters.host.weights import check_in_place


class FeedForwardLayer(FolkloraLayer):
    """A feed-forward layer and the updates that compute its output in its place."""

    def __init__(self, base_layer: nn.Module, name: str, context: CallContext) -> None:
        super().__init__(base_layer, name, context)
        # PEFT asks every layer for them
        self.out_features = self.in_features = self.kind.shape(base_layer)[-1]

    def stored_weight(self) -> Tensor:
        """The weight that leads back to the layer's width."""
        base = self.get_base_layer()
        return getattr(base, layout_of(base).down).weight

    def sample_base(self) -> Tensor:
        """Evenly spaced elements of every weight, float32."""
        base = self.get_base_layer()
        return torch.cat([evenly_spaced(getattr(base, name).weight.detach()) for name in layout_of(base).names])

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output of the active update; of several, or of rows that have their own: the sum of their changes."""
        names = self._names_to_apply()
        if not names:
            return self.base_layer(x, *args, **kwargs)
        check_in_place(self, x)
        whole = feed_forward_of(self.get_base_layer())
        if len(names) == 1 and not self.context.by_rows:
            return self._updates[names[0]].output(x, whole, self._inputs(names[0], x)[1])
        y = base = self.base_layer(x, *args, **kwargs)
        for name in names:
            change = self._updates[name].output(x, whole, self._inputs(name, x)[1]) - base
            gate = self.context.own_rows(name, x, self.name)
            y = y + (change if gate is None else gate.to(change.dtype) * change)
        return y

    @torch.no_grad()
    def replace_weights(self, change: Tensor) -> None:
        """Put new parameters, the weights plus a change [matrices, f, d] (see `Kind.matrix`), in the base's place."""
        base = self.get_base_layer()
        names, changed = layout_of(base).names, feed_forward_of(base).plus(change)
        matrices = [value for value in (changed.gate, changed.up, changed.down) if value is not None]
        for name, value in zip(names, matrices, strict=True):
            part = getattr(base, name)
            part.weight = nn.Parameter(stored(part, value).contiguous(), requires_grad=False)
