"""Frozen encoders of texts: one vector for what a model is called with, its answer left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from folklora.adapters.host.mixture import base_alone
from folklora.stream.tokens import IGNORED, prompt_tokens

_READ = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids")
_TOGETHER = 16


class Encoder(Protocol):
    """Gives one vector a row."""

    width: int

    def __call__(self, inputs: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None = None) -> Tensor:
        """What a model is called with as vectors [rows, width], float32."""
        ...


class BaseEncoder:
    """The frozen base model: the mean of its last hidden states (of its encoder's, if it has one) over the prompt.

    Args:
        base: The base model; adapters on it take no part.
        adapters: But for these, which count as a part of it.
    """

    def __init__(self, base: PreTrainedModel, adapters: Sequence[str] = ()) -> None:
        self.base, self.adapters = base, tuple(adapters)
        self.width = int(base.config.get_text_config().hidden_size)

    def __call__(self, inputs: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None = None) -> Tensor:
        """[rows, width] of the prompts that the model is called with."""
        two_sided = self.base.config.is_encoder_decoder
        part = self.base.get_encoder() if two_sided else self.base.base_model
        taken = {key: inputs[key] for key in _READ if inputs.get(key) is not None}
        with base_alone(self.base, self.adapters):
            hidden = part(**taken, **({} if two_sided else {"use_cache": False}))[0]
        weights = prompt_mask(inputs).to(hidden.device).unsqueeze(-1)
        return (hidden.float() * weights).sum(1) / weights.sum(1).clamp_min(1)


class SentenceEncoder:
    """A model of its own that reads the prompts' text: the mean of its last hidden states.

    Args:
        place: A folder or a name on the hub, with the encoder's tokenizer.
        device: Where it computes.
    """

    def __init__(self, place: str | Path, device: torch.device) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        model = AutoModel.from_pretrained(place, trust_remote_code=False, use_safetensors=True)
        model = model.get_encoder() if model.config.is_encoder_decoder else model
        self.model = model.eval().requires_grad_(False).to(device)
        self.width = int(model.config.hidden_size)

    @staticmethod
    def width_at(place: str | Path) -> int:
        """The width of an encoder that is not loaded yet."""
        return int(AutoConfig.from_pretrained(place, trust_remote_code=False).hidden_size)

    @torch.no_grad()
    def __call__(self, inputs: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None = None) -> Tensor:
        """[rows, width] of the prompts that the model is called with; `tokenizer` is the model's."""
        ids = inputs.get("input_ids")
        if ids is None or tokenizer is None:
            raise ValueError("a sentence encoder reads text: call the model with input_ids, and give its tokenizer")
        kept = prompt_mask(inputs) > 0
        texts = [tokenizer.decode(row[own], skip_special_tokens=True) for row, own in zip(ids, kept, strict=True)]
        read = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(self.model.device)
        hidden = self.model(**read)[0].float()
        weights = read["attention_mask"].unsqueeze(-1).to(hidden)
        return ((hidden * weights).sum(1) / weights.sum(1).clamp_min(1)).to(ids.device)


def prompt_mask(inputs: dict[str, Any]) -> Tensor:
    """1 for the tokens of each row's prompt, [rows, positions], float32: neither padding nor answers.

    A row of which every token is to be learnt is all prompt.
    """
    tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"][..., 0]
    mask, labels = inputs.get("attention_mask"), inputs.get("labels")
    fits = isinstance(mask, Tensor) and mask.shape == tokens.shape
    whole = mask.to(tokens.device).float() if fits else torch.ones(tokens.shape, device=tokens.device)
    if labels is None or labels.shape != tokens.shape:
        return whole
    asked = whole * (labels == IGNORED)
    return torch.where(asked.any(dim=1, keepdim=True), asked, whole)


def encode_prompts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    encoder: Encoder,
    prompts: Sequence[str],
    max_length: int,
) -> Tensor:
    """The vectors of prompts, [prompts, width], on the CPU; they are cut as they are for training and scoring."""
    rows = prompt_tokens(tokenizer, prompts, max_length, encoder_decoder=bool(model.config.is_encoder_decoder))
    # those of like length together: little padding
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    found = torch.empty(len(rows), encoder.width)
    found[order] = torch.cat(
        [
            encoder({"input_ids": ids, "attention_mask": mask}, tokenizer).cpu()
            for ids, mask in padded(tokenizer, [rows[index] for index in order], model.device)
        ]
    )
    return found


def padded(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and mask, [rows, positions], padded on the right, a few rows at a time."""
    blank = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    for begin in range(0, len(rows), _TOGETHER):
        some = [torch.tensor(row, device=device) for row in rows[begin : begin + _TOGETHER]]
        ids = pad_sequence(some, batch_first=True, padding_value=blank or 0)
        yield ids, pad_sequence([torch.ones_like(row) for row in some], batch_first=True)
