"""Examples of old tasks that a method keeps: as tensors, so that they are stored and counted as all else it carries."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from folklora.stream.plots import STORED
from folklora.stream.tasks import Example

_TEXT, _ENDS = "examples.text", "examples.ends"


def pack(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Examples as tensors by name; none for no examples.

    Args:
        examples: What is kept.

    Returns:
        The texts in UTF-8, one after another, uint8 [bytes]; and where each prompt and completion ends, int64 [n, 2].
    """
    if not examples:
        return {}
    parts = [text.encode() for example in examples for text in (example.prompt, example.completion)]
    ends = torch.tensor([len(part) for part in parts]).cumsum(0).view(-1, 2)
    # a bytearray, since PyTorch warns of memory that it may not write to
    return {_TEXT: torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8), _ENDS: ends}


def unpack(tensors: dict[str, Tensor]) -> list[Example]:
    """The examples among what a method carries on."""
    if _TEXT not in tensors:
        return []
    text, ends = bytes(tensors[_TEXT].tolist()), [0, *tensors[_ENDS].flatten().tolist()]
    parts = [text[begin:end].decode() for begin, end in itertools.pairwise(ends)]
    return [Example(prompt, completion) for prompt, completion in zip(parts[::2], parts[1::2], strict=True)]


def count_stored(tensors: Sequence[Tensor], examples: Sequence[Example]) -> dict[str, int]:
    """What a method keeps beside the base model: how many numbers, the bytes of these and its examples, how many those.

    Args:
        tensors: What its adapters hold, and what it carries on beside them.
        examples: Those of old tasks that it keeps.
    """
    size = sum(value.nbytes for value in (*tensors, *pack(examples).values()))
    return dict(zip(STORED, (sum(value.numel() for value in tensors), size, len(examples)), strict=True))
