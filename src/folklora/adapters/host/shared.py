"""What all layers of one adapter have in common: kept once, at the model's root, and saved once.

At the root, because there it is counted, moved, copied and pickled with the model, and belongs to the part that FSDP
keeps whole while the blocks run.
"""

from __future__ import annotations

from torch import Tensor, nn

from folklora.adapters.base import AdapterConfig
from folklora.adapters.host.call import CallContext
from folklora.adapters.host.kinds import kind_of

# where a model's root keeps it
SHARED = "folklora_shared"


def make_shared(config: AdapterConfig, bases: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
    """The shared parameters of a new adapter on these base layers, by name."""
    if type(config).shared is AdapterConfig.shared:
        return {}
    shapes = {name: kind_of(base, name).shape(base) for name, base in bases.items()}
    name, base = next(iter(bases.items()))
    return config.shared(shapes, kind_of(base, name).matrix(base)[:0])


def place_shared(
    model: nn.Module, context: CallContext, adapter_name: str, parameters: dict[str, nn.Parameter]
) -> None:
    """Put an adapter's shared parameters into the model, in place of those that it may have had."""
    if adapter_name in context.shared:
        del context.shared[adapter_name]
    if parameters:
        context.shared[adapter_name] = nn.ParameterDict(parameters)
        setattr(model, SHARED, context.shared)


def remove_shared(model: nn.Module) -> None:
    """Take all shared parameters out of a model that is unloaded."""
    if hasattr(model, SHARED):
        delattr(model, SHARED)


def shared_values(adapter_name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What of a model's state the layers of an adapter have in common."""
    return {key: value for key, value in state.items() if f"{SHARED}.{adapter_name}." in key}


def with_adapter_name(adapter_name: str, key: str) -> str:
    """The name in the model of what is saved as `key`."""
    head, found, tail = key.partition(f"{SHARED}.")
    return f"{head}{found}{adapter_name}.{tail}" if found else key
