"""Adapters on small models of many architectures, from the first step to the merged weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from folklora import AMLoRA, KaSA, LoRA, PiSSA, tiny
from folklora.adapters.host.layer import FolkloraLayer, layers_of

METHODS = {config.method: config for config in (LoRA(r=2), KaSA(r=2), PiSSA(r=2), AMLoRA(r=2, dropout=0.0))}
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
DECODER = {**SMALL, "vocab_size": tiny.VOCABULARY, "num_key_value_heads": 1, "head_dim": 8, "initializer_range": 0.2}
VISION = {**SMALL, "image_size": 8, "patch_size": 4, "initializer_range": 0.2}
TEXT = {**SMALL, "vocab_size": tiny.VOCABULARY, "max_position_embeddings": 16, "initializer_range": 0.2}
GPT2 = {"vocab_size": tiny.VOCABULARY, "n_embd": 16, "n_layer": 1, "n_head": 2, "initializer_range": 0.2}
T5 = {"vocab_size": tiny.VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
T5 |= {"decoder_start_token_id": 0}


def _tokens() -> dict[str, Tensor]:
    return {**tiny.batch(), "labels": tiny.batch()["input_ids"]}


def _sentences() -> dict[str, Tensor]:
    return {**tiny.batch(), "labels": torch.tensor([0, 2, 1, 0])}


def _pixels() -> Tensor:
    return torch.randn(tiny.ROWS, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def _pictures() -> dict[str, Tensor]:
    return {"pixel_values": _pixels(), "labels": torch.tensor([0, 2, 1, 0])}


def _pairs() -> dict[str, Any]:
    return {**tiny.batch(), "pixel_values": _pixels(), "return_loss": True}


@dataclass(frozen=True)
class Architecture:
    """A model, what it is fed, which layers "all-linear" and the default choose, and the head trained in full."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    linear: int
    default: tuple[str, ...] = ("q_proj", "v_proj")
    head: str | None = None


def _clip() -> nn.Module:
    return hf.CLIPModel(hf.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8))


ARCHITECTURES = {
    "llama": Architecture(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER)), _tokens, 7),
    "qwen3": Architecture(lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**DECODER)), _tokens, 7),
    "gemma3": Architecture(lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**DECODER)), _tokens, 7),
    "mistral": Architecture(lambda: hf.MistralForCausalLM(hf.MistralConfig(**DECODER)), _tokens, 7),
    "gpt2": Architecture(lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)), _tokens, 4, ("c_attn",)),
    "t5": Architecture(lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)), _tokens, 16, ("q", "v")),
    "bert": Architecture(
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**TEXT, num_labels=3)),
        _sentences,
        7,
        ("query", "value"),
        "classifier",
    ),
    "vit": Architecture(
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**VISION, num_labels=3)), _pictures, 6, (), "classifier"
    ),
    "clip": Architecture(_clip, _pairs, 14, ()),
}


def _base(architecture: Architecture) -> nn.Module:
    torch.manual_seed(4)
    return architecture.make().eval()


def _adapted(architecture: Architecture, config: Any, **options: Any) -> PeftModel:
    torch.manual_seed(5)
    saved = [architecture.head] if architecture.head else None
    return get_peft_model(_base(architecture), replace(config, modules_to_save=saved, **options))


def _output(model: nn.Module, architecture: Architecture) -> Tensor:
    with torch.no_grad():
        result = model.eval()(**architecture.inputs())
    return result.logits if "logits" in result else result.logits_per_image


def _step(model: nn.Module, architecture: Architecture) -> None:
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=0.03)
    model.train()
    model(**architecture.inputs()).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_linear_layers_are_adapted_trained_disabled_saved_and_merged(
    name: str, method: str, tmp_path: Path
) -> None:
    architecture = ARCHITECTURES[name]
    base = _output(_base(architecture), architecture)
    model = _adapted(architecture, METHODS[method], target_modules="all-linear")
    assert len(list(layers_of(model))) == architecture.linear
    _step(model, architecture)
    trained = _output(model, architecture)
    assert not torch.allclose(trained, base, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(_output(model, architecture), base)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(_base(architecture), tmp_path)
    assert torch.equal(_output(loaded, architecture), trained)
    if method == "am-lora":
        with pytest.raises(ValueError, match="its update depends on each layer's input"):
            model.merge_and_unload()
        return
    merged = model.merge_and_unload(safe_merge=True)
    assert not any(isinstance(module, FolkloraLayer) for module in merged.modules())
    tiny.close(_output(merged, architecture), trained, 1e-5, "merged and adapted outputs")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_default_targets_are_pefts_for_the_architecture(name: str) -> None:
    architecture = ARCHITECTURES[name]
    if not architecture.default:
        with pytest.raises(ValueError, match='set target_modules="all-linear"'):
            _adapted(architecture, LoRA(r=2))
        return
    model = _adapted(architecture, LoRA(r=2))
    assert {layer.name.rpartition(".")[2] for layer in layers_of(model)} == set(architecture.default)
    before = _output(_base(architecture), architecture)
    tiny.close(_output(model, architecture), before, 1e-6, "the outputs at the start and the base's")
    _step(model, architecture)
    assert not torch.allclose(_output(model, architecture), before, atol=1e-3)
