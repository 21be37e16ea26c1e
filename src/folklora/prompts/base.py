"""What a soft prompt is: a configuration, and the trained vectors that it puts among the tokens of each row."""

from __future__ import annotations

import enum
import importlib
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from peft import PeftConfig
from torch import Tensor, nn

from folklora.adapters.base import refuse_unknown


class _PeftType(str, enum.Enum):
    # PEFT and transformers ask a type for its `.value`
    FOLKLORA_PROMPT = "FOLKLORA_PROMPT"


PROMPT_TYPE = _PeftType.FOLKLORA_PROMPT
_PLACES = ("front", "answer")


class Prompt(nn.Module):
    """Vectors that stand among a row's tokens; its parameters are what is trained, saved and loaded.

    Args:
        length: How many positions it puts there.
    """

    reads_query: ClassVar[bool] = False
    """Whether its vectors depend on what the frozen model makes of the row."""
    place: str = "front"
    """As in `PromptConfig`; set by `PromptLayer`."""
    base_sample: nn.Parameter
    """Some values of the base's input embeddings, which tell one base from another; set by `PromptLayer`."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def vectors(self, query: Tensor | None = None) -> Tensor:
        """The vectors of each row, [rows, length, width], or [1, length, width] where they are the same for all.

        Args:
            query: [rows, width], the mean over a row's question of the frozen model's last hidden states; given only
                where the prompt reads it.
        """
        raise NotImplementedError


@dataclass
class PromptConfig(PeftConfig):
    """What every soft prompt can be told; a `peft.PeftConfig`, so `peft.get_peft_model` takes it.

    Args:
        method: The prompt's kind; chooses the class when a saved configuration is read.
        prompt_length: Positions of one prompt.
        place: "front", before the text, where the papers have it; or "answer", within the question and directly before
            its last token. There a causal model's prompt reads the text, and the answer's first token is told by what
            has read the prompt.
    """

    method: str = ""
    prompt_length: int = 10
    place: Literal["front", "answer"] = "front"

    def __new__(cls, *args: Any, **kwargs: Any) -> PromptConfig:
        """Choose the class by `method` when called as `PromptConfig(...)`; refuse options that it does not know."""
        chosen = cls if cls is not PromptConfig else _class_of(kwargs.get("method"))
        refuse_unknown(chosen, kwargs)
        return object.__new__(chosen)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PROMPT_TYPE
        expected = type(self).__dataclass_fields__["method"].default
        if self.method != expected:
            raise ValueError(f"{type(self).__name__} is the method '{expected}', not '{self.method}'")
        self.check_sizes("prompt_length")
        if self.place not in _PLACES:
            raise ValueError(f"place must be {' or '.join(_PLACES)}, not {self.place!r}")

    def check_sizes(self, *names: str) -> None:
        """Refuse options of these names that are not whole numbers of at least 1."""
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")

    def prompt(self, embedding: nn.Module) -> Prompt:
        """A new prompt for a model with these input embeddings."""
        raise NotImplementedError


def vocabulary(embedding: nn.Module, count: int) -> Tensor:
    """What the embedding makes of `count` tokens drawn at random, float32, [count, width]."""
    # drawn on the CPU, so that a seed gives the same tokens on every device
    tokens = torch.randint(embedding.weight.shape[0], (count,), device="cpu").to(embedding.weight.device)
    with torch.no_grad():
        return embedding(tokens).float()


def _class_of(method: Any) -> type[PromptConfig]:
    room = importlib.import_module("folklora.prompts")
    kinds = [getattr(room, name) for name in room.__all__]
    known = {kind.method: kind for kind in kinds if isinstance(kind, type) and issubclass(kind, PromptConfig)}
    known.pop("", None)
    if method not in known:
        raise ValueError(f"there is no kind of soft prompt {method!r}; there are {', '.join(known)}")
    return known[method]
