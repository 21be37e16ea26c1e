"""The gradient of each example of a batch, from one backward pass over all of them.

What a parameter of an adapter does to the model, it does through the outputs of the layers that read it. So one
backward pass down to these outputs is enough: with it, and with what entered the layers, the layers alone are computed
again for each row, and differentiated by the parameters. That is exact for every update, whatever it computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from folklora.adapters.host.call import as_told
from folklora.adapters.host.kinds import EMBEDDING, FEED_FORWARD, LINEAR, TRANSPOSED, Kind
from folklora.adapters.host.layer import FolkloraLayer, layers_of
from folklora.continual.answers import answers_of

Row = Mapping[str, Sequence[int]]
"""An encoded example."""
HELD = 2**26
"""About how many numbers of gradients are held at once."""
TOKENS = 4096
"""Of a batch: eight of the longest examples that the stream reads by default, half of what training reads at once."""

# torch's attention may have the batch second, and a stack of experts sees tokens without their rows
_KINDS: tuple[Kind, ...] = (LINEAR, TRANSPOSED, EMBEDDING, FEED_FORWARD)


@dataclass(frozen=True)
class LayerCall:
    """One call of an adapted layer.

    Args:
        layer: The layer.
        x: Its input.
        told: What the call context said.
        output: Where the gradient of its output arrives.
    """

    layer: FolkloraLayer
    x: Tensor
    told: dict[str, Any]
    output: GradientEdge

    def has_rows(self, rows: int) -> bool:
        """Whether x is [rows, positions], or [rows, positions, width]; else its tokens are not known to be a row's."""
        return len(self.x) == rows and self.x.dim() == (3 if self.x.is_floating_point() else 2)

    def again(self, rows: slice, inputs: dict[int, Tensor]) -> Tensor:
        """The layer's output for some rows, computed again as a function of the layer's parameters alone.

        Args:
            rows: Which.
            inputs: These rows of each x so far: layers that had one x in the batch share them, and their product.
        """

        def own(value: Tensor) -> Tensor:
            return value[rows].detach()

        x = inputs.setdefault(id(self.x), own(self.x))
        blocks = {name: own(entered) for name, entered in self.told["blocks"].items()}
        told = {**self.told, "masks": tuple(map(own, self.told["masks"])), "blocks": blocks}
        return as_told(self.layer.context, told, self.layer, x)


class ExampleGradients:
    """Reads examples with a model as it is, and gives the gradient of each one's mean loss by parameters of adapters.

    Several examples are differentiated together unless rows cannot be told apart in the layers. That is so where a
    parameter is not of an update of the host (an adapter of PEFT's own, a module that is trained in full), and where a
    layer is not called with rows of positions (torch's attention, experts). Then they are read one at a time.

    Args:
        model: With its adapters, in the mode in which it is read.
        parameters: What is differentiated by.
        example: Any one, encoded. It is seen here which layers read the parameters, since an update may read what
            another layer's holds (the one network of a Hyperformer).
    """

    def __init__(self, model: PeftModel, parameters: Sequence[nn.Parameter], example: Row) -> None:
        self.model, self.parameters = model, parameters
        wanted = {id(parameter) for parameter in parameters}
        layers = list(layers_of(model))
        held = [wanted & _parameters(layer) for layer in layers]
        holders = [layer for layer, own in zip(layers, held, strict=True) if own]
        self.together = wanted == set().union(*held) and all(layer.kind in _KINDS for layer in holders)
        self.layers: list[FolkloraLayer] = []
        if self.together:
            with recorded([layer for layer in layers if layer.kind in _KINDS]) as calls:
                answers_of(model, [example])
            readers = [call.layer for call in calls if self._reads(call)]
            self.layers = [layer for layer in layers if layer in holders or layer in readers]

    def _reads(self, call: LayerCall) -> bool:
        y = call.again(slice(None), {})
        if not y.requires_grad:
            return False
        return any(part is not None for part in torch.autograd.grad(y.sum(), self.parameters, allow_unused=True))

    def __call__(self, rows: Sequence[Row]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """The gradients [rows, numbers of all parameters], float32, and what `answers_of` gives, without its graph.

        Args:
            rows: Encoded examples.
        """
        if len(rows) > 1 and self.together:
            with recorded(self.layers) as calls:
                read = answers_of(self.model, rows)
            # tokens that were chosen for one expert, say, are not of one row each
            self.together = all(call.has_rows(len(rows)) for call in calls)
            if self.together:
                return self._by_row(_losses(read), calls), _detached(read)
            # the graph would stay beside those of the single rows
            del read, calls
        if len(rows) > 1:
            singles = [self([row]) for row in rows]
            return torch.cat([gradient for gradient, _ in singles]), [read for _, (read,) in singles]
        read = answers_of(self.model, rows)
        gradients = torch.autograd.grad(_losses(read).sum(), self.parameters, materialize_grads=True)
        return _flat(gradients).unsqueeze(0), _detached(read)

    def _by_row(self, losses: Tensor, calls: Sequence[LayerCall]) -> Tensor:
        outputs = [call.output for call in calls]
        arrived = torch.autograd.grad(losses.sum(), outputs, allow_unused=True) if outputs else ()
        used = [(call, grad) for call, grad in zip(calls, arrived, strict=True) if grad is not None]
        if not used:
            return torch.zeros(len(losses), sum(parameter.numel() for parameter in self.parameters)).to(losses)
        return torch.stack([self._of_row(row, used) for row in range(len(losses))])

    def _of_row(self, row: int, used: Sequence[tuple[LayerCall, Tensor]]) -> Tensor:
        rows, inputs = slice(row, row + 1), {}
        outputs = [call.again(rows, inputs) for call, _ in used]
        arrived = [grad[rows] for _, grad in used]
        return _flat(torch.autograd.grad(outputs, self.parameters, arrived, materialize_grads=True))


def batches(rows: Sequence[Row], most: int, tokens: int = TOKENS) -> list[list[int]]:
    """The numbers of the rows, those of like length together.

    Args:
        rows: Encoded examples.
        most: Rows of a batch.
        tokens: Of a batch, with its padding; an example that is longer is one by itself.
    """
    found: list[list[int]] = []
    for i in sorted(range(len(rows)), key=lambda i: (len(rows[i]["input_ids"]), len(rows[i]["labels"]))):
        longest = max(len(rows[i]["input_ids"]), len(rows[i]["labels"]))
        if found and len(found[-1]) < min(most, tokens // longest):
            found[-1].append(i)
        else:
            found.append([i])
    return found


@contextmanager
def recorded(layers: Sequence[FolkloraLayer]) -> Iterator[list[LayerCall]]:
    """Note the calls of layers within this block, in their order."""
    calls: list[LayerCall] = []

    def note(layer: FolkloraLayer, args: tuple, output: Tensor) -> None:
        if output.requires_grad:
            # the context replaces all that it says but the blocks, which it adds to
            told = {**vars(layer.context), "blocks": dict(layer.context.blocks)}
            # the place in the graph stays that of this output, should the model write over the tensor
            calls.append(LayerCall(layer, args[0], told, get_gradient_edge(output)))

    handles = [layer.register_forward_hook(note) for layer in layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _parameters(layer: FolkloraLayer) -> set[int]:
    # each update names what it shares with others too
    return {id(parameter) for update in layer.folklora_updates.values() for parameter in update.parameters()}


def _losses(read: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    losses = torch.stack([F.cross_entropy(*each) for each in read])
    if not losses.requires_grad:
        raise ValueError(
            "an example's loss does not depend on what is trained (a hard choice, say, learns from its penalty alone), "
            "so that it has no gradient: choose another adapter"
        )
    return losses


def _detached(read: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [(logits.detach(), answer) for logits, answer in read]


def _flat(parts: Sequence[Tensor]) -> Tensor:
    # layers may lie on several devices
    return torch.cat([part.flatten().to(parts[0].device, torch.float32) for part in parts])
