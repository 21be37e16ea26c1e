"""Source adapters read from folders: what composes, and what is refused before anything is put on the model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from folklora import AdapterFusion, AMLoRA, LoRA, Rocket, ScaLearn, VLAdapter, tiny
from folklora.adapters.base import AdapterConfig
from folklora.adapters.host.layer import layers_of, updates_of

BOTH = pytest.mark.parametrize("method", [ScaLearn, AdapterFusion])
RELU = {"activation": "relu", "target_modules": ["down_proj"]}


def saved(config: peft.PeftConfig, folder: Path, base: LlamaForCausalLM | None = None) -> str:
    get_peft_model(tiny.llama() if base is None else base, config).save_pretrained(folder)
    return str(folder)


@BOTH
def test_sources_that_do_not_compose_are_refused(
    method: type[AdapterConfig], bottlenecks: dict[str, str], loras: dict[str, str], tmp_path: Path
) -> None:
    tasks = VLAdapter(**RELU, tasks=["a", "b"], sharing="down")
    cases: list[tuple[dict[str, str], str]] = [
        ({}, 'name them, sources={"name": "folder", ...}'),
        ({"art": bottlenecks["art"], "own": loras["own"]}, "of one kind, and these are art: relu, own: factors"),
        ({"tasks": saved(tasks, tmp_path / "tasks")}, "source 'tasks' is a VLAdapter of the tasks a, b"),
        (
            {"hyper": saved(VLAdapter(**RELU, form="hyperformer"), tmp_path / "hyper")},
            "one adapter of one task",
        ),
        ({"norms": saved(VLAdapter(**RELU, train_layer_norms=True), tmp_path / "norms")}, "changed norms or biases"),
        ({"gated": saved(AMLoRA(r=2, tasks=2), tmp_path / "gated")}, "does not hold its factors"),
        (
            {"art": bottlenecks["art"], "gelu": saved(VLAdapter(target_modules=["down_proj"]), tmp_path / "gelu")},
            "art: relu, gelu: gelu",
        ),
        ({"model": str(Path(tiny.task_vectors(tiny.llama())["art"]))}, "'model' is a checkpoint, and no adapter"),
    ]
    for sources, words in cases:
        base = tiny.llama()
        with pytest.raises(ValueError, match=words.replace("(", r"\(").replace("{", r"\{").replace(".", r"\.")):
            get_peft_model(base, method(sources=sources))
        assert not list(layers_of(base))
    with pytest.raises(FileNotFoundError, match="for these source adapters:\n  nowhere: /no/such"):
        get_peft_model(tiny.llama(), method(sources={"nowhere": "/no/such", **bottlenecks}))


@BOTH
def test_sources_of_another_model_or_layer_are_refused(
    method: type[AdapterConfig], bottlenecks: dict[str, str], tmp_path: Path, tiny_llama: Any
) -> None:
    other = saved(VLAdapter(**RELU), tmp_path / "other", tiny_llama(intermediate_size=48))
    with pytest.raises(ValueError, match=r"source 'other' was made for another base .*layers\.\d\.mlp\.down_proj"):
        get_peft_model(tiny.llama(), method(sources={"other": other, "art": bottlenecks["art"]}))
    with pytest.raises(ValueError, match=r"no source adapts layer 'model\.layers\.0\.mlp\.up_proj'"):
        get_peft_model(tiny.llama(), method(sources=bottlenecks, target_modules=["up_proj"]))
    wide = tiny_llama(hidden_size=64)
    lora = saved(LoRA(r=2, target_modules=["down_proj"]), tmp_path / "lora", wide)
    stock = saved(peft.LoraConfig(r=2, target_modules=["down_proj"]), tmp_path / "stock", tiny_llama(hidden_size=64))
    with pytest.raises(ValueError, match="made for another base"):
        get_peft_model(tiny.llama(), method(sources={"lora": lora}))
    # PEFT's own adapters carry no sample of their base
    with pytest.raises(ValueError, match=r"source 'stock' does not fit .*down_proj' \[32, 48\]: its update there is"):
        get_peft_model(tiny.llama(), method(sources={"stock": stock}))


@BOTH
def test_a_source_that_changed_since_is_noticed_when_its_coefficients_are_loaded(
    method: type[AdapterConfig], bottlenecks: dict[str, str], tmp_path: Path
) -> None:
    sources = {name: str(shutil.copytree(folder, tmp_path / name)) for name, folder in bottlenecks.items()}
    model = tiny.trained(method(sources=sources))
    model.save_pretrained(tmp_path / "composed")
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path / "composed")
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))
    shutil.rmtree(sources["cow"])
    shutil.copytree(bottlenecks["art"], sources["cow"])
    with pytest.raises(ValueError, match="a folder in `sources` holds another adapter by now"):
        PeftModel.from_pretrained(tiny.llama(), tmp_path / "composed")
    shutil.rmtree(sources["cow"])
    with pytest.raises(FileNotFoundError, match="cow"):
        PeftModel.from_pretrained(tiny.llama(), tmp_path / "composed")


@BOTH
def test_its_layers_are_those_of_its_sources(
    method: type[AdapterConfig], bottlenecks: dict[str, str], loras: dict[str, str]
) -> None:
    for sources, ends in ((bottlenecks, {"o_proj", "down_proj"}), (loras, {"q_proj", "down_proj"})):
        model = get_peft_model(tiny.llama(), method(sources=sources))
        assert {layer.name.rpartition(".")[2] for layer in layers_of(model)} == ends
        for layer, update in updates_of(model, "default"):
            widths = {"o_proj": [4, 8, 0], "q_proj": [0, 3], "down_proj": [4, 8, 3] if ends & {"o_proj"} else [2, 3]}
            assert update.branches.widths == widths[layer.name.rpartition(".")[2]]
    only = get_peft_model(tiny.llama(), method(sources=bottlenecks, target_modules=["down_proj"]))
    assert len(list(layers_of(only))) == 2


@BOTH
def test_over_a_bfloat16_base_sources_of_a_float32_one_compose(
    method: type[AdapterConfig], bottlenecks: dict[str, str]
) -> None:
    model = get_peft_model(tiny.llama(dtype=torch.bfloat16), method(sources=bottlenecks))
    precise = get_peft_model(tiny.llama(), method(sources=bottlenecks, target_modules=None))
    for (_, own), (_, other) in zip(updates_of(model, "default"), updates_of(precise, "default"), strict=True):
        assert torch.equal(own.branches.up, other.branches.up)
        assert own.branches.up.dtype == torch.float32
    assert torch.isfinite(tiny.logits(model)).all()


def test_a_bottleneck_has_a_width_of_its_own_and_either_activation() -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny.llama(), VLAdapter(**RELU, start="normal", bottleneck_size=40))
    layer = next(layers_of(model))
    update, y = layer.folklora_updates["default"], torch.randn(3, 32)
    down, up = update.adapter()
    assert down.weight.shape == (40, 32)
    with torch.no_grad():
        torch.testing.assert_close(update.function(None, y), up(torch.relu(down(y))))
    found = model.get_nb_trainable_parameters()[0]
    assert found == 2 * (2 * 32 * 40 + 40 + 32) == 2 * model.peft_config["default"].trainable_count((32, 48))
    for options in ({"activation": "tanh"}, {"bottleneck_size": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            VLAdapter(**options)


def test_example_sources_are_those_of_the_model_and_fit_its_layers() -> None:
    models = [tiny.TwoLayers(), tiny.TwoLayers()]
    models[1].q.weight.data *= 2
    for model in models:
        get_peft_model(model, tiny.calibrated(model, ScaLearn(target_modules=["q"])))
    narrow = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 1))
    model = get_peft_model(narrow, tiny.calibrated(narrow, Rocket(target_modules=["0", "1"])))
    assert {layer.name: update.r for layer, update in updates_of(model, "default")} == {"0": 2, "1": 1}
