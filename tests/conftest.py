"""What many tests share: tiny seeded models, a tiny tokenizer, and real data where there is some."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

# the repeats make " yes" and " no" one token each, while " positive" and " negative" take several
_TEXTS = ["a good film\nAnswer: positive", "a bad film\nAnswer: negative", *8 * ["Answer: yes", "Answer: no"]]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data: named by FOLKLORA_SHARED, or `shared` beside the checkout."""
    named = os.environ.get("FOLKLORA_SHARED")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is no folder, and FOLKLORA_SHARED names no other")
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over printable ASCII, 128 tokens; end of text is 0, padding 1. Do not change it: it is shared."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    printable = "".join(map(chr, range(32, 127))) + "\n"
    alphabet = {
        symbol
        for piece, _ in pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(printable)
        for symbol in piece
    }
    trainer = trainers.BpeTrainer(
        vocab_size=128,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>")


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., LlamaForCausalLM]:
    """`tiny_llama(seed=0, **config)`: a new float32 Llama in evaluation mode that fits `tiny_tokenizer`."""

    def make(seed: int = 0, **config: Any) -> LlamaForCausalLM:
        sizes = {
            "vocab_size": 128,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "bos_token_id": None,
            "eos_token_id": 0,
            "pad_token_id": 1,
        }
        return _seeded(seed, LlamaForCausalLM, LlamaConfig(**sizes | config))

    return make


@pytest.fixture(scope="session")
def tiny_t5() -> Callable[..., T5ForConditionalGeneration]:
    """`tiny_t5(seed=0, **config)`: a new float32 T5 in evaluation mode that fits `tiny_tokenizer`."""

    def make(seed: int = 0, **config: Any) -> T5ForConditionalGeneration:
        sizes = {
            "vocab_size": 128,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "eos_token_id": 0,
            "pad_token_id": 1,
            "decoder_start_token_id": 1,
        }
        return _seeded(seed, T5ForConditionalGeneration, T5Config(**sizes | config))

    return make


@pytest.fixture(scope="session")
def bytes_on_disk() -> Callable[[Path], int]:
    """The bytes of all tensors in a folder that a continual method left, but the samples of the base's weights."""

    def read(folder: Path) -> int:
        files = [load_file(path) for path in folder.rglob("*.safetensors")]
        return sum(value.nbytes for file in files for key, value in file.items() if not key.endswith("base_sample"))

    return read


@pytest.fixture(autouse=True)
def every_test_draws_the_same() -> None:
    """Adapters draw where they start: alone or after other tests, a test sees the same draws."""
    torch.manual_seed(0)


def _seeded(seed: int, kind: Any, config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(config).float().eval()
