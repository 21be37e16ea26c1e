"""Tiny checkpoints on disk, as users have them: sharded, tied and untied, with a tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM


def _stored(folder: Path) -> dict[str, Tensor]:
    return {
        name: value for file in sorted(folder.glob("model*.safetensors")) for name, value in load_file(file).items()
    }


def _gpt2(seed: int) -> GPT2LMHeadModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64))
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(value)
        return model.eval()


def _asked(root: Path, method: str, *models: str, **more: Any) -> dict[str, Any]:
    base = {"base_model": str(root / more.pop("base"))} if "base" in more else {}
    each = more.pop("each", {})
    entries = [{"model": str(root / name), **({"parameters": each[name]} if name in each else {})} for name in models]
    return {"merge_method": method, **base, "models": entries, **more}


@pytest.fixture(scope="session")
def stored() -> Callable[[Path], dict[str, Tensor]]:
    """`stored(folder)`: all tensors of a checkpoint, however it is sharded."""
    return _stored


@pytest.fixture(scope="session")
def gpt2() -> Callable[[int], GPT2LMHeadModel]:
    """`gpt2(seed)`: a GPT-2 that fits `tiny_tokenizer`, with biases that are not zero."""
    return _gpt2


@pytest.fixture(scope="session")
def asked() -> Callable[..., dict[str, Any]]:
    """`asked(root, method, *names, base=name, each={name: parameters}, ...)`: a merge of folders in `root`."""
    return _asked


@pytest.fixture(scope="session")
def llamas(tiny_llama: Callable[..., LlamaForCausalLM], tiny_tokenizer: Any, tmp_path_factory: Any) -> Path:
    """A folder with the Llamas base, a and b: sharded, untied, bfloat16, with a tokenizer."""
    root = tmp_path_factory.mktemp("llamas")
    for seed, name in enumerate(("base", "a", "b")):
        model = tiny_llama(seed, tie_word_embeddings=False, num_hidden_layers=3).to(torch.bfloat16)
        model.save_pretrained(root / name, max_shard_size="30KB")
        tiny_tokenizer.save_pretrained(root / name)
    assert len(list((root / "base").glob("model-*.safetensors"))) > 2
    return root
