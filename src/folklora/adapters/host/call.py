"""What a call of a model tells its layers, and how passes that are computed again for a gradient hear it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from folklora.adapters.base import AdapterConfig

KEYWORD = "class_labels"
_MASKS = ("decoder_attention_mask", "attention_mask", "encoder_attention_mask")


@dataclass
class CallContext:
    """What a forward pass tells the layers of one model.

    Args:
        rows: The adapter of each row of the batch ("__base__" for none), or None where all rows share the active ones.
        mixture: How much each adapter counts in each row, [rows], or [1] for all rows alike; None where the active ones
            count whole. It holds until the next text.
        alone: While the base model is being read by itself: the adapters that belong to it then, whole; else None.
        masks: Attention masks [batch, positions] of this call, a decoder's own before its encoder's.
        before: How many positions a cache holds that come before this call's.
        classes: For each adapter that reads classes, its gate [rows, classes], or why it cannot read those given.
        classes_in_block: The same, of the block of `folklora.classes` that is open; it holds for several calls.
        blocks: The hidden states that entered the block that is running, by its name, for updates that read them.
        entries: The part of each such block that is handed them first.
        told: What `telling` tells the updates, by the key that they ask for; replaced as a whole, never added to.
        shared: What the layers of each adapter have in common, by adapter; the model's root has it too.
    """

    rows: list[str] | None = None
    mixture: dict[str, Tensor] | None = None
    alone: tuple[str, ...] | None = None
    masks: tuple[Tensor, ...] = ()
    before: int = 0
    classes: dict[str, Tensor | ValueError] | None = None
    classes_in_block: dict[str, Tensor | ValueError] | None = None
    blocks: dict[str, Tensor] = field(default_factory=dict)
    entries: dict[str, str] = field(default_factory=dict)
    told: dict[str, Any] = field(default_factory=dict)
    shared: nn.ModuleDict = field(default_factory=nn.ModuleDict)

    def __getstate__(self) -> dict[str, Any]:
        # computing a block again leaves a part of its graph here, which can neither be copied nor pickled
        return {**self.__dict__, "blocks": {}}

    def mask_for(self, x: Tensor) -> Tensor | None:
        """The mask of the very positions of an input [batch, positions, width], if it is known."""
        return next((mask for mask in self.masks if mask.shape == x.shape[:-1]), None)

    @property
    def by_rows(self) -> bool:
        """Whether rows have adapters of their own, or parts of several."""
        return self.alone is None and (self.rows is not None or self.mixture is not None)

    def own_rows(self, adapter: str, x: Tensor, layer: str) -> Tensor | None:
        """How much the adapter counts in each row of an input x of a layer, [batch, 1, ..., 1]; None: whole in all."""
        if not self.by_rows:
            return None
        dtype = x.dtype if x.is_floating_point() else torch.float32
        if self.rows is not None:
            return by_row("adapter_names", _own(tuple(self.rows), adapter, x.device, dtype), x, layer)
        return by_row("the mixture of adapters", self.mixture[adapter].to(x.device, dtype)[:, None], x, layer)

    def own_mask(self, adapter: str, x: Tensor, layer: str) -> Tensor | None:
        """1 for the real tokens of the rows in which the adapter takes part."""
        mask, own = self.mask_for(x), self.own_rows(adapter, x, layer)
        if own is None or x.dim() < 2 or not x.is_floating_point():
            return mask
        own = (own != 0).to(x.dtype).squeeze(-1).expand(x.shape[:-1])
        return own if mask is None else own * mask

    def class_gate(self, adapter: str, x: Tensor, layer: str) -> Tensor:
        """What `AdapterConfig.class_gate` of an adapter made of the classes of the rows of x, [batch, 1, ..., n].

        Raises:
            ValueError: Nobody named the classes, or the adapter does not know them.
        """
        gate = (self.classes or {}).get(adapter)
        if gate is None:
            raise ValueError(
                f"adapter {adapter} on layer '{layer}' needs the class of each row of the batch: call the model with "
                "class_labels=[...] or within folklora.classes(model, [...]) (which must still be open in the backward "
                "pass where torch.utils.checkpoint is called by hand)"
            )
        if isinstance(gate, ValueError):
            raise ValueError(f"adapter {adapter}: {gate}")
        return by_row(KEYWORD, gate.to(x.device), x, layer)


@lru_cache(maxsize=256)
def _own(rows: tuple[str, ...], adapter: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    # every layer asks for the same few, and each would be a copy to the device that its work waits for
    return torch.tensor([[row == adapter] for row in rows], device=device).to(dtype)


def by_row(what: str, values: Tensor, x: Tensor, layer: str) -> Tensor:
    """Values [rows, n] of the rows of a call as [batch, 1, ..., n], which broadcasts over the positions of x.

    Raises:
        ValueError: The input x of the layer has no whole number of rows for each of them; `what` names the values.
    """
    if x.shape[0] % len(values):
        raise ValueError(
            f"{what} has {len(values)} entries, and the batch of {x.shape[0]} rows that layer '{layer}' "
            "sees is no multiple of that"
        )
    # beams, and tokens that a router flattened, stand in equal runs of their row
    values = values.repeat_interleave(x.shape[0] // len(values), dim=0)
    positions = x.dim() - 2 if x.is_floating_point() else x.dim() - 1
    return values.view(len(values), *([1] * positions), values.shape[-1])


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
    from folklora.adapters.host.layer import layers_of
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


@contextmanager
def telling(model: nn.Module, **what: Any) -> Iterator[None]:
    """Tell the updates of a model something for the calls within; what was told before comes back afterwards.

    A backward pass that computes activations again must be within, too, where `torch.utils.checkpoint` is called by
    hand; gradient checkpointing of `transformers` remembers what each pass was told.

    Args:
        model: A model with Folklora adapters.
        **what: Values by the key that the updates ask for.
    """
    from folklora.adapters.host.layer import layers_of

    contexts = list({id(layer.context): layer.context for layer in layers_of(model)}.values())
    before = [context.told for context in contexts]
    for context in contexts:
        context.told = {**context.told, **what}
    try:
        yield
    finally:
        for context, told in zip(contexts, before, strict=True):
            context.told = told


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


class _MaskReader:
    """Notes the attention masks of a call for the layers; a class, so that models can be pickled and copied."""

    def __init__(self, context: CallContext) -> None:
        self.context = context

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        masks = (kwargs.get(name) for name in _MASKS)
        self.context.masks = tuple(m for m in masks if isinstance(m, Tensor) and m.dim() == 2)
        cache = kwargs.get("past_key_values")
        self.context.before = 0 if cache is None else int(cache.get_seq_length())


def read_masks(model: nn.Module, context: CallContext) -> list[RemovableHandle]:
    """Let a context know the attention masks of every call of a model, from now on."""
    reader = _MaskReader(context)
    return [part.register_forward_pre_hook(reader, with_kwargs=True) for part in _called_with_masks(model)]


def _called_with_masks(model: nn.Module) -> list[nn.Module]:
    # generation calls the encoder by itself; and each half reads masks of its own
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and hasattr(model, "get_encoder"):
        return [model.get_encoder(), model.get_decoder()]
    return [model]


def listen(model: nn.Module, context: CallContext, configs: dict[str, AdapterConfig]) -> None:
    """Let a context know what every call of a model says, from now on.

    Args:
        model: The base model.
        context: Where it is noted.
        configs: The options of the adapters on the model, by name, now and later.
    """
    read_masks(model, context)
    model.register_forward_pre_hook(_CallStart(context, configs, model), with_kwargs=True)
    model.register_forward_hook(_CallEnd(context), always_call=True)


def stop_listening(model: nn.Module) -> None:
    """Take all that `listen` put on a model away, and give checkpointed parts their own function back."""
    for part in {model, *_called_with_masks(model)}:
        remove_hooks(part, (_MaskReader, _CallStart, _CallEnd))
    for module in model.modules():
        checkpoint = vars(module).get("_gradient_checkpointing_func")
        if isinstance(checkpoint, _Remembering):
            module._gradient_checkpointing_func = checkpoint.checkpoint


def remove_hooks(module: nn.Module, kinds: tuple[type, ...]) -> None:
    """Take the hooks of these classes off a module; a copied model's hooks have no handle that would."""
    # the sets of hooks that are called in another way, which hold the same keys
    marked = (module._forward_pre_hooks_with_kwargs, module._forward_hooks_with_kwargs)
    marked = (*marked, module._forward_hooks_always_called)
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(hook, kinds)]:
            for entries in (hooks, *marked):
                entries.pop(key, None)


class _CallStart:
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


class _CallEnd:
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
        return self.checkpoint(partial(as_told, self.context, told, function), *args, **kwargs)


def as_told(context: CallContext, told: dict[str, Any], function: Any, *args: Any, **kwargs: Any) -> Any:
    """What a function gives while a context says what it said at another time, `dict(vars(context))` of then."""
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
