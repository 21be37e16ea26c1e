"""Penalties and after-step work that need nobody to call them: PyTorch's global optimizer hooks do.

Just before any `optimizer.step()`, the gradient of each adapter's penalty is added to the gradients of the parameters
that the optimizer holds; just after, `after_step` runs. So both count exactly once a step, whatever the gradient
accumulation, the number of processes, the trainer or the loss. Gradient clipping has happened before.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from folklora.adapters.base import Update
from folklora.adapters.host.layer import LIVE_LAYERS, FolkloraLayer, layers_of

_handles: list[Any] = []


def register() -> None:
    """Install the two hooks; called once, when the package is imported."""
    if not _handles:
        _handles.append(register_optimizer_step_pre_hook(_add_penalty_gradients))
        _handles.append(register_optimizer_step_post_hook(_after_step))


def penalty(model: nn.Module) -> Tensor:
    """The value of all penalties on a model's trainable adapters, as they enter its loss; a scalar, for logs.

    Args:
        model: A model with Folklora adapters.

    Returns:
        Σ over adapters of the sum (or mean, where the method says so) over its layers; 0 where there is none.
    """
    updates = [(layer, name, update) for layer in layers_of(model) for name, update in _regularised(layer)]
    total = sum((value for value, _ in _penalties(updates)), torch.zeros(()))
    return total.detach()


def activation_penalty(model: nn.Module) -> Tensor | None:
    """The mean over layers of what their updates penalise in the last forward pass, per adapter; None if nothing.

    The caller adds it to the micro-batch's loss. Each forward pass's penalty can be taken once.
    """
    by_adapter: dict[str, list[Tensor]] = defaultdict(list)
    for layer in layers_of(model):
        for name, update in layer.folklora_updates.items():
            value = update.activation_penalty()
            if value is not None:
                by_adapter[name].append(value)
    if not by_adapter:
        return None
    return sum(torch.stack(values).mean() for values in by_adapter.values())


def _regularised(layer: FolkloraLayer) -> Iterator[tuple[str, Update]]:
    for name, update in layer.folklora_updates.items():
        overrides = type(update).penalty is not Update.penalty
        if overrides and any(p.requires_grad for p in update.parameters()):
            yield name, update


def _penalties(
    updates: list[tuple[FolkloraLayer, str, Update]],
) -> Iterator[tuple[Tensor, list[nn.Parameter]]]:
    counts: dict[tuple[int, str], int] = defaultdict(int)
    for layer, name, _ in updates:
        counts[id(layer.context), name] += 1
    for layer, name, update in updates:
        value = update.penalty()
        if value is None:
            continue
        mean = layer.reductions[name] == "mean"
        value = value / counts[id(layer.context), name] if mean else value
        yield value, [p for p in update.parameters() if p.requires_grad]


def _held(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _add_penalty_gradients(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    updates = [(layer, name, update) for layer in LIVE_LAYERS for name, update in _regularised(layer)]
    if not updates:
        return
    held = _held(optimizer)
    # a fused optimizer under a gradient scaler divides by the scale itself, after this hook
    scale = getattr(optimizer, "grad_scale", None)
    with torch.enable_grad():
        for value, parameters in _penalties(updates):
            mine = [p for p in parameters if id(p) in held]
            if not mine:
                continue
            gradients = torch.autograd.grad(value, mine, allow_unused=True)
            for parameter, gradient in zip(mine, gradients, strict=True):
                if gradient is None:
                    continue
                gradient = gradient if scale is None else gradient * scale
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


@torch.no_grad()
def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    held: set[int] | None = None
    for layer in LIVE_LAYERS:
        for update in layer.folklora_updates.values():
            if type(update).after_step is Update.after_step:
                continue
            held = _held(optimizer) if held is None else held
            if any(id(p) in held for p in update.parameters()):
                update.after_step()
