"""Adapters that are mixed row by row: before a text is read, something says how much each counts in its answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from folklora.adapters.host.call import CallContext
from folklora.adapters.host.layer import FolkloraLayer, layers_of, modules_without_updates

Route = Callable[[dict[str, Any]], dict[str, Tensor]]
"""From what a model is called with to the weight of each adapter in each row, [rows], or [1] for all rows alike."""


def mix_by_row(model: nn.Module, route: Route) -> None:
    """Let `route` weigh a model's adapters at each call, in place of the active ones, which all count whole.

    It is asked once a text: passes that continue from a cache keep its answer, and a decoder's keep that of its
    encoder's pass. Rows that stand in equal runs (beams) share their row's. Adapters without a weight take no part.
    A call with `adapter_names` goes by those.

    Args:
        model: The base model, with adapters on its layers.
        route: Reads the inputs of a call of the model (of its encoder, where it has one).
    """
    stop_mixing(model)
    context = next(layers_of(model)).context
    # until the first text is read
    context.mixture = {}
    _reader(model).register_forward_pre_hook(_Mixer(context, route), with_kwargs=True)


def stop_mixing(model: nn.Module) -> None:
    """Let the active adapters count whole again."""
    part = _reader(model)
    for key, hook in list(part._forward_pre_hooks.items()):
        if isinstance(hook, _Mixer):
            del part._forward_pre_hooks[key], part._forward_pre_hooks_with_kwargs[key]
            hook.context.mixture = None


@contextmanager
def base_alone(model: nn.Module, adapters: Sequence[str] = ()) -> Iterator[None]:
    """Within this block the base model is read: without adapters, gradients and dropout.

    Args:
        model: The base model, with adapters on its layers.
        adapters: Those that belong to the base all the same: they count whole in every row.
    """
    modules = list(modules_without_updates(model))
    layers = [module for module in modules if isinstance(module, FolkloraLayer)]
    contexts = {id(layer.context): layer.context for layer in layers}.values()
    # the other adapters are not called, and where there are many they are most of the model
    called = [layer.folklora_updates[name] for layer in layers for name in adapters if name in layer.folklora_updates]
    modules += [part for update in called for part in update.modules()]
    training = [module for module in modules if module.training]
    before = [context.alone for context in contexts]
    for context in contexts:
        context.alone = tuple(adapters)
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
        for context, value in zip(contexts, before, strict=True):
            context.alone = value


class _Mixer:
    """Before a call that begins a text: ask what its rows are made of; a class, so that models can be copied."""

    def __init__(self, context: CallContext, route: Route) -> None:
        self.context, self.route = context, route

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Note the weights for the layers."""
        cache = kwargs.get("past_key_values")
        if self.context.alone is not None or (cache is not None and cache.get_seq_length() > 0):
            return
        inputs = {**dict(zip(("input_ids", "attention_mask"), args, strict=False)), **kwargs}
        # not those of another text, should this one fail
        self.context.mixture = {}
        self.context.mixture = self.route(inputs)


def _reader(model: nn.Module) -> nn.Module:
    """What reads a text first."""
    two_sided = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return model.get_encoder() if two_sided else model
