"""What a call says about the rows of its batch, and how passes that are computed again for a gradient hear it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from folklora.adapters.base import AdapterConfig
from folklora.adapters.host.layer import CallContext, layers_of

KEYWORD = "class_labels"


@contextmanager
def classes(model: nn.Module, labels: Tensor | Sequence[int]) -> Iterator[None]:
    """Within this block, the rows of every batch that `model` sees have these classes.

    A call may instead name them itself, `model(..., class_labels=labels)`, which holds for that call alone (a
    `transformers.Trainer` passes such a column on with `remove_unused_columns=False`). Gradient checkpointing of
    `transformers` remembers the classes of each pass; where `torch.utils.checkpoint` is called by hand, the block has
    to hold the backward pass too.

    Args:
        model: A model with Folklora adapters, wrapped or compiled or not.
        labels: The class of each row, or weights of the classes [rows, classes] (a soft gate), for methods that take
            them. Rows that stand in equal runs (beams) need one label a run.

    Raises:
        ValueError: The model carries no adapter, or none of them reads classes; when a layer needs them: a class that
            its adapter does not know.
    """
    # the tuner knows the adapters, and imports this module
    from folklora.adapters.host.tuner import FolkloraModel

    tuner = next((module for module in model.modules() if isinstance(module, FolkloraModel)), None)
    layer = next(layers_of(model), None)
    if tuner is None or layer is None:
        raise ValueError("this model carries no Folklora adapter, so nothing in it reads classes")
    device = layer.get_base_layer().weight.device
    # offloaded weights wait on the meta device
    device = None if device.type == "meta" else device
    gates = class_gates(tuner.peft_config, torch.as_tensor(labels, device=device))
    if not gates:
        raise ValueError(f"no adapter of this model reads classes; it carries {', '.join(tuner.peft_config)}")
    context = layer.context
    before = context.classes, context.classes_in_block
    context.classes, context.classes_in_block = gates, gates
    try:
        yield
    finally:
        context.classes, context.classes_in_block = before


def class_gates(configs: dict[str, AdapterConfig], labels: Tensor) -> dict[str, Tensor | ValueError]:
    """What the labels of the rows mean to each adapter that reads classes, or why they mean nothing to it."""
    gates: dict[str, Tensor | ValueError] = {}
    for name, config in configs.items():
        try:
            gate = config.class_gate(labels)
        except ValueError as error:
            # another adapter may be the one in use
            gate = error
        if gate is not None:
            gates[name] = gate
    return gates


class CallStart:
    """Before a call of the base model: take its classes, let checkpointed parts remember what they were told.

    A class, so that models can be pickled and copied.
    """

    def __init__(self, context: CallContext, configs: dict[str, AdapterConfig], model: nn.Module) -> None:
        self.context, self.configs = context, configs
        # some class-conditional models have an argument of this name themselves
        self.own_keyword = KEYWORD in inspect.signature(model.forward).parameters

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Note the classes; hand the call on without what is not the model's own."""
        if module.training and not torch.compiler.is_compiling():
            _remember_in_checkpoints(module, self.context)
        labels = kwargs.get(KEYWORD)
        if labels is None:
            return args, kwargs
        device = next((value.device for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        gates = class_gates(self.configs, torch.as_tensor(labels, device=device))
        if not gates:
            return args, kwargs
        if self.context.classes_in_block is None:
            self.context.classes = gates
        elif not self.own_keyword:
            raise ValueError(f"{KEYWORD} was passed inside a block of folklora.classes: give the classes once")
        if self.own_keyword:
            return args, kwargs
        return args, {key: value for key, value in kwargs.items() if key != KEYWORD}


class CallEnd:
    """After a call of the base model, however it ended: its classes are forgotten."""

    def __init__(self, context: CallContext) -> None:
        self.context = context

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Put back what an open block says, or nothing."""
        self.context.classes = self.context.classes_in_block


class _Remembering:
    """A checkpointing function whose recomputation sees the call context of the pass that it recomputes."""

    def __init__(self, checkpoint: Any, context: CallContext) -> None:
        self.checkpoint, self.context = checkpoint, context

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        told = dict(vars(self.context))
        return self.checkpoint(partial(_told, self.context, told, function), *args, **kwargs)


def _told(context: CallContext, told: dict[str, Any], function: Any, *args: Any, **kwargs: Any) -> Any:
    now = dict(vars(context))
    vars(context).update(told)
    try:
        return function(*args, **kwargs)
    finally:
        vars(context).update(now)


def _remember_in_checkpoints(model: nn.Module, context: CallContext) -> None:
    for module in model.modules():
        checkpoint = vars(module).get("_gradient_checkpointing_func")
        if checkpoint is not None and not isinstance(checkpoint, _Remembering):
            module._gradient_checkpointing_func = _Remembering(checkpoint, context)


def forget_in_checkpoints(model: nn.Module) -> None:
    """Give checkpointed parts their own function back."""
    for module in model.modules():
        checkpoint = vars(module).get("_gradient_checkpointing_func")
        if isinstance(checkpoint, _Remembering):
            module._gradient_checkpointing_func = checkpoint.checkpoint
