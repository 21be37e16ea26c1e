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
from folklora.adapters.host.stacks import call_with

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
    """What updates penalise in the last forward pass, the mean (or sum) over an adapter's layers; None if nothing.

    The caller adds it to the micro-batch's loss. Each forward pass's penalty can be taken once.
    """
    by_adapter: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
    for layer in layers_of(model):
        for name, update in layer.folklora_updates.items():
            value = update.activation_penalty()
            if value is not None:
                by_adapter[name, update.activation_reduction].append(value)
    if not by_adapter:
        return None
    return sum(getattr(torch.stack(values), reduction)() for (_, reduction), values in by_adapter.items())


def _acting(layer: FolkloraLayer) -> Iterator[tuple[str, Update]]:
    # each step asks, and of a stream's many adapters most have nothing to do
    updates = layer.folklora_updates
    return ((name, updates[name]) for name in layer.asked_at_steps if name in updates)


def _regularised(layer: FolkloraLayer) -> Iterator[tuple[str, Update]]:
    for name, update in _acting(layer):
        overrides = type(update).penalty is not Update.penalty
        if overrides and any(p.requires_grad for p in update.parameters()):
            yield name, update


Pair = tuple[nn.Parameter, Tensor]


def _penalties(
    updates: list[tuple[FolkloraLayer, str, Update]], held: set[int] | None = None
) -> Iterator[tuple[Tensor, list[Pair]]]:
    """(penalty, [(parameter, the tensor that stands for it there)]), of what the optimizer holds where it is given."""
    counts: dict[tuple[int, str], int] = defaultdict(int)
    groups: dict[tuple, list[tuple[FolkloraLayer, str, Update]]] = defaultdict(list)
    for layer, name, update in updates:
        counts[id(layer.context), name] += update.weights
        alike = tuple((key, p.shape, p.dtype, p.device) for key, p in update.named_parameters())
        apart = None if update.batched_penalty else id(update)
        groups[id(layer.context), name, type(update), alike, apart].append((layer, name, update))
    for (context, name, *_), group in groups.items():
        trained = [[kp for kp in u.named_parameters() if kp[1].requires_grad] for _, _, u in group]
        trained = [[kp for kp in named if held is None or id(kp[1]) in held] for named in trained]
        keep = [i for i, named in enumerate(trained) if named]
        value, pairs = _group_penalty([group[i][2] for i in keep], [dict(trained[i]) for i in keep])
        if value is not None:
            mean = group[0][0].reductions[name] == "mean"
            yield value / counts[context, name] if mean else value, pairs


def _group_penalty(updates: list[Update], trained: list[dict[str, nn.Parameter]]) -> tuple[Tensor | None, list[Pair]]:
    """The sum of the penalties of updates that are alike, in one batched pass where there are several."""
    if not updates:
        return None, []
    wholes = [_gathered(update) for update in updates]
    pairs = [(p, whole.get(key, p)) for named, whole in zip(trained, wholes, strict=True) for key, p in named.items()]
    first = call_with(updates[0], "penalty", wholes[0])
    if len(updates) == 1 or first is None:
        return first, pairs
    full = [{**dict(u.named_parameters()), **whole} for u, whole in zip(updates, wholes, strict=True)]
    keys = [key for key, p in full[0].items() if p.requires_grad or key in updates[0].penalty_reads]
    stacked = {key: torch.stack([parameters[key] for parameters in full]) for key in keys}
    return torch.func.vmap(lambda one: call_with(updates[0], "penalty", one))(stacked).sum(), pairs


@torch.no_grad()
def _gathered(update: Update) -> dict[str, nn.Parameter]:
    """The parameters in full if FSDP2 has sharded them, so that a method need not know of it; else empty."""
    named = dict(update.named_parameters())
    if not any(hasattr(p, "full_tensor") for p in named.values()):
        return {}
    full = {key: p.full_tensor() if hasattr(p, "full_tensor") else p for key, p in named.items()}
    return {key: nn.Parameter(value.detach(), named[key].requires_grad) for key, value in full.items()}


def _sharded_like(parameter: nn.Parameter, value: Tensor) -> Tensor:
    if not hasattr(parameter, "full_tensor"):
        return value
    from torch.distributed.tensor import DTensor, Replicate

    mesh = parameter.device_mesh
    everywhere = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(mesh, parameter.placements)


def _held(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _add_penalty_gradients(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    updates = [(layer, name, update) for layer in LIVE_LAYERS.values() for name, update in _regularised(layer)]
    if not updates:
        return
    # a fused optimizer under a gradient scaler divides by the scale itself, after this hook
    scale = getattr(optimizer, "grad_scale", None)
    with torch.enable_grad():
        for value, pairs in _penalties(updates, _held(optimizer)):
            gradients = torch.autograd.grad(value, [whole for _, whole in pairs], allow_unused=True)
            for (parameter, _), gradient in zip(pairs, gradients, strict=True):
                if gradient is None:
                    continue
                # fused optimizers read a gradient as if it lay in memory like its parameter
                gradient = (gradient if scale is None else gradient * scale).contiguous()
                gradient = _sharded_like(parameter, gradient)
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


@torch.no_grad()
def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    held: set[int] | None = None
    for layer in LIVE_LAYERS.values():
        for _, update in _acting(layer):
            if type(update).after_step is Update.after_step:
                continue
            held = _held(optimizer) if held is None else held
            if not any(id(p) in held for p in update.parameters()):
                continue
            whole = _gathered(update)
            call_with(update, "after_step", whole)
            for key, parameter in update.named_parameters():
                if key in whole:
                    parameter.copy_(_sharded_like(parameter, whole[key]))
