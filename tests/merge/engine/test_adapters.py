"""Adapters over a base are merged a tensor at a time to what PEFT's merging of the whole model gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from folklora import SALT, AMLoRA, KaSA, LoRA, SVFit
from folklora.merge import average, task_arithmetic
from folklora.merge.engine import merge_models
from folklora.merge.engine import models as engine_models

ALL = "all-linear"
CONFIGS = {
    "lora": LoraConfig(r=4, target_modules=ALL, modules_to_save=["lm_head"]),
    "dora": LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=True),
    "tokens": LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[3, 5]),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "kasa": KaSA(r=4, target_modules=ALL),
    # their folders leave out what is made from the base weight again
    "salt": SALT(r=4, target_modules=["q_proj", "down_proj"]),
    "svfit": SVFit(r=4, target_modules=["v_proj", "up_proj"]),
}


def adapted(base: Path, folder: Path, config) -> dict[str, torch.Tensor]:
    """Save an adapter that has left its start; return the parameters of the merged model in float32."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(7)
    adapter = get_peft_model(model, config)
    with torch.no_grad():
        for value in adapter.parameters():
            if value.requires_grad:
                value += 0.1 * torch.randn_like(value)
    adapter.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(again, folder).merge_and_unload()
    return {name: value.detach() for name, value in merged.named_parameters()}


@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_gives_the_tensors_of_the_merged_model(llamas, tmp_path, name, stored, asked):
    expected = adapted(llamas / "base", tmp_path / "adapter", CONFIGS[name])
    config = asked(llamas, "passthrough", f"base+{tmp_path / 'adapter'}", dtype="float32")
    merged, before = stored(merge_models(config, tmp_path / "out")), stored(llamas / "base")
    assert merged.keys() == expected.keys()
    for key, value in merged.items():
        assert torch.equal(value, expected[key]), key
    changed = [key for key, value in merged.items() if not torch.equal(value, before[key].float())]
    assert 2 <= len(changed) < len(merged)


def test_two_adapters_over_a_gpt2_with_biases(tmp_path, stored, asked, gpt2):
    gpt2(0).save_pretrained(tmp_path / "base")
    configs = {
        "one": LoraConfig(r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
        "two": LoRA(r=2, target_modules=["c_attn", "c_fc"], train_bias=True),
    }
    models = {key: adapted(tmp_path / "base", tmp_path / key, config) for key, config in configs.items()}
    names = [f"base+{tmp_path / key}" for key in configs]
    merged = stored(merge_models(asked(tmp_path, "task_arithmetic", *names, base="base"), tmp_path / "out"))
    base = stored(tmp_path / "base")
    for name, value in merged.items():
        expected = task_arithmetic([models[key][name] for key in configs], base[name])
        assert torch.equal(value, expected), name
    bias = "transformer.h.0.attn.c_attn.bias"
    assert not torch.equal(models["two"][bias], base[bias])


def test_a_folder_of_an_adapter_alone_stands_over_the_base(llamas, tmp_path, stored, asked):
    expected = adapted(llamas / "base", tmp_path / "adapter", CONFIGS["lora"])
    config = asked(llamas, "average", "a", str(tmp_path / "adapter"), base="base", dtype="float32")
    merged, a = stored(merge_models(config, tmp_path / "out")), stored(llamas / "a")
    for name, value in merged.items():
        assert torch.equal(value, average([a[name], expected[name]])), name


def test_the_adapted_model_is_never_in_memory(llamas, tmp_path):
    adapted(llamas / "base", tmp_path / "adapter", CONFIGS["kasa"])
    reference = engine_models.Reference.parse(f"{llamas / 'base'}+{tmp_path / 'adapter'}")
    model = engine_models.open_models([reference], None)[reference]
    for key in model.layout.forms:
        assert not model.read(key).is_meta
    over = model._over
    weights = [layer.get_base_layer().weight for layer in over.layers.values()]
    assert weights
    assert all(weight.is_meta for weight in weights)
    assert not over.ready


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AMLoRA(r=2, target_modules=["q_proj"]), "the adapter's update depends on"),
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "learns a prompt and changes no weight"),
    ],
)
def test_what_is_no_change_of_a_weight(llamas, tmp_path, config, message, asked):
    model = AutoModelForCausalLM.from_pretrained(llamas / "base")
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=message):
        merge_models(asked(llamas, "passthrough", f"base+{tmp_path / 'adapter'}"), tmp_path / "out")


def test_an_adapter_of_another_base_or_of_a_tied_weight(llamas, tmp_path, asked, gpt2):
    adapted(llamas / "base", tmp_path / "adapter", CONFIGS["kasa"])
    with pytest.raises(ValueError, match="made for another base model's weights"):
        merge_models(asked(llamas, "passthrough", f"a+{tmp_path / 'adapter'}"), tmp_path / "out")
    gpt2(0).save_pretrained(tmp_path / "tied")
    get_peft_model(gpt2(0), LoraConfig(r=2, target_modules=["wte"])).save_pretrained(tmp_path / "over")
    with pytest.raises(ValueError, match=r"changes 'transformer\.wte', whose weight the model uses in two places"):
        merge_models(asked(tmp_path, "passthrough", f"tied+{tmp_path / 'over'}"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
