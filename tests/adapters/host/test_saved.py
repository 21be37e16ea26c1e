"""Saving and loading: what is refused and in which words, and that nothing in a folder is run."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from folklora import AdapterConfig, KaSA, LoRA, PiSSA, methods, tiny
from folklora.adapters.host.layer import layers_of
from folklora.methods import Method

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj.folklora_updates."


@pytest.fixture
def model() -> PeftModel:
    return tiny.trained(KaSA(r=4, target_modules=["q_proj", "v_proj"]))


@pytest.fixture
def folder(model: PeftModel, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def _alter(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def _alter_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG
    kept = {key: value for key, value in (json.loads(path.read_text()) | changes).items() if value != "(removed)"}
    path.write_text(json.dumps(kept))


def _load(folder: Path, **options: Any) -> PeftModel:
    return PeftModel.from_pretrained(tiny.llama(), folder, **options)


def test_a_saved_folder_holds_the_method_and_no_pickle(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} <= {WEIGHTS, CONFIG, "README.md"}
    saved = json.loads((folder / CONFIG).read_text())
    assert (saved["peft_type"], saved["method"], saved["r"]) == ("FOLKLORA", "kasa", 4)
    assert "restoring" not in saved
    names = {name.rpartition(".")[2] for name in load_file(folder / WEIGHTS)}
    assert names == {"A", "B", "d", "P", "Q", "base_sample"}


@pytest.mark.parametrize("method", methods("adapters"), ids=lambda method: method.name)
def test_every_option_survives_saving(method: Method, tmp_path: Path) -> None:
    ranks = {"r": 3, "rank_pattern": {"q_proj": 2}} if hasattr(method.factory, "r") else {}
    config = AdapterConfig(method=method.name, target_modules=set(tiny.targets_of(method.factory)), **ranks)
    # the very one that the model takes, which fills in what it reads from the model
    config = tiny.calibrated(tiny.llama(), config)
    get_peft_model(tiny.llama(), config).save_pretrained(tmp_path)
    for loaded in (PeftConfig.from_pretrained(tmp_path), type(config).from_pretrained(tmp_path)):
        assert type(loaded) is type(config)
        for field in dataclasses.fields(config):
            if field.name not in ("inference_mode", "auto_mapping"):
                assert getattr(loaded, field.name) == getattr(config, field.name), field.name


def test_several_adapters_are_saved_and_loaded_side_by_side(model: PeftModel, tmp_path: Path) -> None:
    model.add_adapter("other", PiSSA(r=2, target_modules=["q_proj"]))
    expected = tiny.logits(model)
    tiny.moved(model, "other")
    other = tiny.logits(model)
    model.save_pretrained(tmp_path)
    loaded = _load(tmp_path)
    loaded.load_adapter(tmp_path / "other", "renamed")
    assert torch.equal(tiny.logits(loaded), expected)
    loaded.set_adapter("renamed")
    assert torch.equal(tiny.logits(loaded), other)


def test_adapters_may_be_named_like_parameters(tmp_path: Path) -> None:
    model = get_peft_model(tiny.llama(), KaSA(r=4, target_modules=["q_proj"]), adapter_name="A")
    for name in ("B", "d", "base_sample"):
        model.add_adapter(name, KaSA(r=3, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    for name in model.peft_config:
        model.set_adapter(name)
        assert torch.equal(tiny.logits(_load(tmp_path / name, adapter_name=name)), tiny.logits(model))


def test_loading_is_for_inference_unless_training_is_asked_for(folder: Path, model: PeftModel) -> None:
    frozen, trainable = _load(folder), _load(folder, is_trainable=True)
    assert not any(value.requires_grad for value in frozen.parameters())
    assert not frozen.training
    wanted = {name for name, value in model.named_parameters() if value.requires_grad}
    assert wanted == {name for name, value in trainable.named_parameters() if value.requires_grad}
    tiny.train(trainable)
    assert not torch.equal(tiny.logits(trainable), tiny.logits(model))


def test_loading_without_training_beside_an_adapter_in_training(folder: Path) -> None:
    model = get_peft_model(tiny.llama(), LoRA(r=2, target_modules=["q_proj"]))
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    model.load_adapter(folder, "loaded")
    assert {name for name, value in model.named_parameters() if value.requires_grad} == trained


def test_loading_over_an_adapter_that_is_there(folder: Path, model: PeftModel) -> None:
    expected = tiny.logits(model)
    tiny.moved(model)
    assert not torch.equal(tiny.logits(model), expected)
    model.load_adapter(folder, "default")
    assert torch.equal(tiny.logits(model), expected)


def test_a_configuration_without_its_values_waits(folder: Path) -> None:
    for config in (PeftConfig.from_pretrained(folder), KaSA.from_pretrained(folder)):
        model = get_peft_model(tiny.llama(), config)
        with pytest.raises(RuntimeError, match=r"layer 'model.layers.0.self_attn.q_proj' was made from a saved"):
            tiny.logits(model)
        anew = get_peft_model(tiny.llama(), dataclasses.replace(config, inference_mode=False))
        assert not torch.allclose(tiny.logits(anew), tiny.logits(tiny.llama()))


def test_values_that_come_in_as_a_state_are_admitted(folder: Path, model: PeftModel) -> None:
    waiting = get_peft_model(tiny.llama(), KaSA.from_pretrained(folder))
    waiting.load_state_dict(model.state_dict())
    assert torch.equal(tiny.logits(waiting), tiny.logits(model))


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_bare_model_takes_saved_values(wrapped: bool) -> None:
    config = PiSSA(r=4, target_modules=["q_proj"])
    giver = get_peft_model(tiny.llama(), config) if wrapped else tiny.llama()
    if not wrapped:
        giver.add_adapter(config)
    for layer in layers_of(giver):
        layer.folklora_updates["default"].B.data += 0.1
    taker = tiny.llama()
    taker.add_adapter(dataclasses.replace(config))
    assert not torch.allclose(tiny.logits(taker), tiny.logits(giver))
    set_peft_model_state_dict(taker, get_peft_model_state_dict(giver))
    assert torch.equal(tiny.logits(taker), tiny.logits(giver))


def test_another_base_is_refused(folder: Path) -> None:
    base = tiny.llama()
    base.model.layers[1].self_attn.v_proj.weight.data *= 1.02
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.v_proj': the adapter was made for another base") as e:
        PeftModel.from_pretrained(base, folder)
    assert "layers.0" not in str(e.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_base_in_fewer_bits_is_accepted(model: PeftModel, folder: Path, dtype: torch.dtype) -> None:
    loaded = PeftModel.from_pretrained(tiny.llama(dtype=dtype), folder, low_cpu_mem_usage=dtype is torch.bfloat16)
    close = 2 * float(torch.finfo(dtype).eps) * float(tiny.logits(model).abs().max()) * 10
    assert (tiny.logits(loaded).float() - tiny.logits(model)).abs().max() < close
    for ours, theirs in zip(layers_of(loaded), layers_of(model), strict=True):
        for name, value in theirs.folklora_updates["default"].named_parameters():
            # the adapter keeps its float32 values over a base of any precision
            assert torch.equal(ours.folklora_updates["default"].get_parameter(name), value), name


def test_tiny_base_weights_that_float16_rounds_coarsely_are_accepted(tmp_path: Path) -> None:
    def base() -> torch.nn.Module:
        model = tiny.llama()
        weight = model.model.layers[0].self_attn.q_proj.weight
        weight.data = torch.logspace(-9, -3, weight.numel()).view_as(weight)
        return model

    get_peft_model(base(), LoRA(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    PeftModel.from_pretrained(base().half(), tmp_path)


def test_missing_misshaped_and_infinite_values_are_named_together(folder: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{Q0}A"]
        tensors[f"{Q0}B"] = tensors[f"{Q0}B"][:, :2].clone()
        tensors[f"{Q0}d"][1] = float("nan")
        tensors[f"{Q0}P"][0, 0] = float("inf")

    _alter(folder, spoil)
    with pytest.raises(ValueError, match="the saved adapter does not fit this model") as caught:
        _load(folder)
    lines = str(caught.value).splitlines()[1:]
    layer = "  layer 'model.layers.0.self_attn.q_proj': "
    assert sorted(lines) == sorted(
        [
            f"{layer}no value for A",
            f"{layer}B has shape [32, 2], not [32, 4]",
            f"{layer}d holds values that are not finite",
            f"{layer}P holds values that are not finite",
        ]
    )


def test_values_for_layers_that_are_not_there_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"values for 'model\.layers\.1\.self_attn\.[qv]_proj', which is no"):
        PeftModel.from_pretrained(tiny.llama(layers=1), folder)


def test_after_a_refusal_no_layer_takes_itself_for_loaded(folder: Path) -> None:
    _alter(folder, lambda tensors: tensors.pop(Q0.replace("layers.0", "layers.1") + "d"))
    model = get_peft_model(tiny.llama(), KaSA.from_pretrained(folder))
    with pytest.raises(ValueError, match="no value for d"):
        model.load_adapter(folder, "default")
    assert all(layer.waiting == {"default"} for layer in layers_of(model))


class _Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("written", ["pickle", "torch"])
def test_a_poisoned_folder_runs_nothing(folder: Path, tmp_path: Path, written: str) -> None:
    sprung, poison = tmp_path / "sprung", folder / "adapter_model.bin"
    trap = {f"{Q0}A": _Trap(sprung)}
    if written == "pickle":
        poison.write_bytes(pickle.dumps(trap))
    else:
        torch.save(trap, poison)
    # beside safetensors the pickle is not even opened
    _load(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(pickle.UnpicklingError):
        _load(folder)
    assert not sprung.exists()
    pickle.loads(pickle.dumps(trap))
    assert sprung.exists(), "the trap itself does not work"


@pytest.mark.parametrize("load", [_load, PeftConfig.from_pretrained, AdapterConfig.from_pretrained])
def test_an_unknown_method_key_or_value_in_the_file_is_an_error(folder: Path, load: Callable[[Path], Any]) -> None:
    _alter_config(folder, truncat=3, lora_alpha=8)
    with pytest.raises(ValueError, match=r"KaSA has no option 'truncat'; did you mean 'truncate'\?") as caught:
        load(folder)
    assert "'lora_alpha'" in str(caught.value)
    _alter_config(folder, truncat="(removed)", lora_alpha="(removed)", method="kassa")
    with pytest.raises(ValueError, match="there is no method 'kassa'; the nearest are kasa"):
        load(folder)
    _alter_config(folder, method="(removed)")
    with pytest.raises(ValueError, match="the configuration names no method"):
        load(folder)
    _alter_config(folder, method="kasa", reduction="median")
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum', not 'median'"):
        load(folder)


def test_a_class_is_not_another_method() -> None:
    with pytest.raises(ValueError, match="LoRA is the method 'lora', not 'kasa'"):
        LoRA(method="kasa")
