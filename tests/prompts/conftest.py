"""Soft prompts on tiny models, and the same models that read tokens in the prompts' place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
)

from folklora.prompts import SoftPrompt, prompts_of

SIZES = {"vocab_size": 128, "eos_token_id": 0, "pad_token_id": 1, "bos_token_id": None}
TOKENS = torch.tensor([70, 71, 72])


def _gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(**SIZES, n_embd=32, n_layer=2, n_head=4, n_positions=64))


def _bloom() -> BloomForCausalLM:
    return BloomForCausalLM(BloomConfig(**SIZES, hidden_size=32, n_layer=2, n_head=4))


def _mistral() -> MistralForCausalLM:
    # a window shorter than prompt and text: prompts count as positions
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return MistralForCausalLM(MistralConfig(**SIZES, **sizes, num_key_value_heads=2, sliding_window=5))


def _bart() -> BartForConditionalGeneration:
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    widths = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64}
    ends = {"decoder_start_token_id": 0, "forced_eos_token_id": None}
    return BartForConditionalGeneration(BartConfig(**SIZES, **sizes, **widths, **ends, dropout=0.0))


OTHERS = {"gpt2": _gpt2, "bloom": _bloom, "mistral": _mistral, "bart": _bart}


@pytest.fixture
def make_base(tiny_llama: Any, tiny_t5: Any) -> Callable[[str], Any]:
    """`make_base(kind)`: a new tiny model of a kind: llama, t5 or one of `OTHERS`, the same at every call."""

    def make(kind: str) -> Any:
        if kind in OTHERS:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(4)
                return OTHERS[kind]().float().eval()
        return {"llama": tiny_llama, "t5": tiny_t5}[kind](1)

    return make


@pytest.fixture
def prompted(make_base: Callable[[str], Any]) -> Callable[..., PeftModel]:
    """`prompted(kind)`: a model whose soft prompt is what it embeds of `TOKENS`."""

    def make(kind: str) -> PeftModel:
        base = make_base(kind)
        task_type = "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"
        model = get_peft_model(base, SoftPrompt(prompt_length=len(TOKENS), task_type=task_type)).eval()
        part = base.get_encoder() if base.config.is_encoder_decoder else base
        with torch.no_grad():
            prompts_of(model)["default"].embedding.copy_(part.get_input_embeddings()(TOKENS))
        return model

    return make


@pytest.fixture(scope="session")
def tokens() -> Tensor:
    """What the prompt of `prompted` embeds."""
    return TOKENS


@pytest.fixture(scope="session")
def rows() -> Callable[[bool], tuple[Tensor, Tensor]]:
    """`rows(left)`: token ids and mask of three rows of 6, 4 and 1 tokens, padded on the left or on the right."""
    return _rows


@pytest.fixture(scope="session")
def with_tokens() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """`with_tokens(ids, mask)`: the same with `tokens` before each row's own, behind padding on the left."""
    return _with_tokens


def _rows(left: bool) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(8)
    ids, mask = torch.ones(3, 6, dtype=torch.long), torch.zeros(3, 6, dtype=torch.long)
    for row, count in enumerate((6, 4, 1)):
        place = slice(6 - count, 6) if left else slice(0, count)
        ids[row, place], mask[row, place] = torch.randint(2, 128, (count,), generator=draw), 1
    return ids, mask


def _with_tokens(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    found = []
    for row, kept in zip(ids.tolist(), mask.tolist(), strict=True):
        start = kept.index(1)
        found.append((row[:start] + TOKENS.tolist() + row[start:], kept[:start] + [1] * 3 + kept[start:]))
    return torch.tensor([row for row, _ in found]), torch.tensor([kept for _, kept in found])
