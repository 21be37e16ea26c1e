"""What enters a block of layers, for updates inside it that read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from folklora.adapters.host.call import CallContext


def block_of(name: str) -> str:
    """The block of a model that a layer is in: its name up to and with the first number.

    Raises:
        ValueError: The name has no number.
    """
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    if not numbers:
        raise ValueError(f"layer '{name}' is in no block of layers: its name has no number")
    return ".".join(parts[: numbers[0] + 1])


def read_block(model: nn.Module, name: str, context: CallContext) -> None:
    """Let a context know the hidden states that enter a block, from now on.

    Gradient checkpointing may compute a block again without calling its hooks, but calls those of its parts. So the
    first part that is handed the very tensor that entered is noted, and from then on speaks for the block.
    """
    block = model.get_submodule(name)
    if any(isinstance(hook, _Entered) for hook in block._forward_pre_hooks.values()):
        return
    block.register_forward_pre_hook(_Entered(context, name), with_kwargs=True)
    block.register_forward_hook(_Left(context, name))
    for key, part in _parts(block):
        part.register_forward_pre_hook(_Handed(context, name, key), with_kwargs=True)


def stop_reading(model: nn.Module) -> None:
    """Take away all that `read_block` put on the parts of a model."""
    for part in model.modules():
        for key, hook in list(part._forward_pre_hooks.items()):
            if isinstance(hook, (_Entered, _Handed)):
                del part._forward_pre_hooks[key], part._forward_pre_hooks_with_kwargs[key]
        for key, hook in list(part._forward_hooks.items()):
            if isinstance(hook, _Left):
                del part._forward_hooks[key]


def _parts(block: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that the block itself calls; lists of them are looked into."""
    found = []
    for key, child in block.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            found += [(f"{key}.{inner}", part) for inner, part in child.named_children()]
        else:
            found.append((key, child))
    return found


def _first(args: tuple, kwargs: dict) -> Tensor | None:
    return args[0] if args else kwargs.get("hidden_states")


# classes, so that models with these hooks can be pickled and copied


@dataclass
class _Entered:
    context: CallContext
    block: str

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.context.blocks[self.block] = _first(args, kwargs)


@dataclass
class _Handed:
    context: CallContext
    block: str
    part: str

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        handed = _first(args, kwargs)
        spokesman = self.context.entries.get(self.block)
        if spokesman is None and handed is not None and handed is self.context.blocks.get(self.block):
            self.context.entries[self.block] = self.part
        elif spokesman == self.part:
            self.context.blocks[self.block] = handed


@dataclass
class _Left:
    context: CallContext
    block: str

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.context.blocks.pop(self.block, None)
