"""Tensors that are gone through some rows at a time, so that a merge holds no more of them than these.

A method that needs something of the whole tensors first, such as a threshold or a length, goes through them once for it
and a second time to merge.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from types import EllipsisType
from typing import Protocol

import torch
from torch import Tensor

from folklora.merge.deltas import deltas

# what a processor's cache holds a few of; larger ones cost two to ten times as much an entry
ELEMENTS = 2**20
# what keeps an accelerator busy for longer than it takes to start its kernels
ACCELERATOR_ELEMENTS = 2**24

Block = tuple[Sequence[Tensor], Tensor | None]
Part = slice | EllipsisType


class Readable(Protocol):
    """What blocks are read from: a tensor, or what is still on the disk."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def __getitem__(self, part: Part) -> Tensor: ...


class Rows:
    """A tensor that is computed some rows at a time, in their order.

    Args:
        shape: Its shape.
        compute: Begins a pass over its rows.
    """

    def __init__(self, shape: torch.Size, compute: Callable[[], Iterator[Tensor]]) -> None:
        self.shape, self._compute = shape, compute

    def __iter__(self) -> Iterator[Tensor]:
        return self._compute()

    def whole(self) -> Tensor:
        """All of it."""
        parts = iter(self)
        first = next(parts)
        if first.shape == self.shape:
            return first
        result, at = first.new_empty(self.shape), len(first)
        result[:at] = first
        for part in parts:
            result[at : at + len(part)] = part
            at += len(part)
        return result


class Blocks:
    """The models' tensors, or what was made of them, and the base's, some rows at a time; each pass reads them anew.

    Args:
        shape: Of each of the tensors.
        read: Begins a pass: gives for each block of rows the tensors' and the base's.
    """

    def __init__(self, shape: torch.Size, read: Callable[[], Iterator[Block]]) -> None:
        self.shape, self._read = shape, read

    def __iter__(self) -> Iterator[Block]:
        return self._read()

    @classmethod
    def of(cls, models: Sequence[Readable], base: Readable | None = None) -> Blocks:
        """Of whole tensors, in float32, or in float64 if one of them is. A tensor of one dimension is one row."""
        every = [*models, *([] if base is None else [base])]
        wide = torch.float64 if any(tensor.dtype == torch.float64 for tensor in every) else torch.float32
        shape = models[0].shape
        on_cpu = models[0].device.type == "cpu"

        def read() -> Iterator[Block]:
            for part in parts_of(shape, ELEMENTS if on_cpu else ACCELERATOR_ELEMENTS):
                yield (
                    [tensor[part].to(wide) for tensor in models],
                    None if base is None else base[part].to(wide),
                )

        return cls(shape, read)

    def each(self, function: Callable[[Sequence[Tensor]], Sequence[Tensor]]) -> Blocks:
        """Others in place of the tensors, which depend on the same rows of them alone; the base is kept."""
        return Blocks(self.shape, lambda: ((function(tensors), base) for tensors, base in self))

    def each_pass(self, begin: Callable[[], Callable[[Sequence[Tensor]], Sequence[Tensor]]]) -> Blocks:
        """As `each`, with a function that remembers the blocks before: it is made anew for each pass."""

        def read() -> Iterator[Block]:
            function = begin()
            return ((function(tensors), base) for tensors, base in self)

        return Blocks(self.shape, read)

    def changes(self) -> Blocks:
        """The task vectors in place of the models' tensors."""
        return Blocks(self.shape, lambda: ((list(deltas(models, base)), base) for models, base in self))

    def merged(self, function: Callable[[Sequence[Tensor], Tensor | None], Tensor]) -> Rows:
        """The result, of which each row depends on the same rows of the tensors and of the base alone."""
        return Rows(self.shape, lambda: (function(tensors, base) for tensors, base in self))

    def total(self, function: Callable[[Sequence[Tensor]], Tensor]) -> Tensor:
        """The sum over all blocks of what a function gives for each, from one pass."""
        return functools.reduce(torch.add, (function(tensors) for tensors, _ in self))


def parts_of(shape: torch.Size, elements: int) -> Iterator[Part]:
    """Rows of about so many elements each; all at once of what is no larger, or has one dimension."""
    if len(shape) < 2 or shape.numel() <= elements:
        yield ...
        return
    rows = max(1, elements * shape[0] // shape.numel())
    for start in range(0, shape[0], rows):
        yield slice(start, start + rows)
