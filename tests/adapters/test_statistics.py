"""Statistics: saved and loaded, carried by a configuration, and what the host does with them and without."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from folklora import CorDA, LoRA, LoRASB, Statistics, calibrate, tiny
from folklora.adapters.host.layer import layers_of, updates_of
from folklora.adapters.lora import LoRAUpdate

TARGETS = ["q_proj", "k_proj", "down_proj"]
EVERYTHING = frozenset({"covariance", "gradient", "fisher"})


@pytest.fixture(scope="module")
def found() -> Statistics:
    return calibrate(tiny.llama(), [tiny.labelled_batch()], EVERYTHING, target_modules=TARGETS)


def same(one: Statistics, other: Statistics) -> bool:
    return list(one) == list(other) and all(
        torch.equal(value, other[layer][kind]) for layer, kinds in one.items() for kind, value in kinds.items()
    )


@dataclass
class Recording(LoRA):
    """LoRA that notes what it was given."""

    method: str = "lora"
    needs: ClassVar[frozenset[str]] = EVERYTHING
    given: ClassVar[list[tuple[Tensor, Mapping[str, Tensor]]]] = []

    def update(self, weight: Tensor, stats: Mapping[str, Tensor]) -> LoRAUpdate:
        self.given.append((weight, stats))
        return super().update(weight)


def test_saved_and_loaded_they_are_the_same_and_share_as_before(found: Statistics, tmp_path: Path) -> None:
    found.save(tmp_path / "found.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["found.safetensors"]
    loaded = Statistics.load(tmp_path / "found.safetensors")
    assert same(found, loaded)
    q, k = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
    for statistics in (found, loaded, loaded.to("cpu"), copy.deepcopy(found)):
        assert statistics[q]["covariance"] is statistics[k]["covariance"]
        assert statistics[q]["covariance"] is not statistics["model.layers.1.self_attn.q_proj"]["covariance"]
    # six layers with G and F each, and two covariances a block
    assert len(load_file(tmp_path / "found.safetensors")) == 6 * 2 + 4
    assert copy.deepcopy(found) is found


def test_what_holds_no_statistics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there are no statistics in"):
        Statistics.load(tmp_path / "nothing")
    save_file({"a": torch.ones(2)}, tmp_path / "other")
    with pytest.raises(ValueError, match=r"other holds no statistics that folklora\.calibrate found"):
        Statistics.load(tmp_path / "other")
    (tmp_path / "broken").write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match="broken is not in safetensors format"):
        Statistics.load(tmp_path / "broken")
    with pytest.raises(OSError, match=r"cannot write .*missing/file"):
        Statistics({"layer": {"covariance": torch.eye(2)}}).save(tmp_path / "missing" / "file")


def test_a_method_is_given_its_layers_statistics(found: Statistics) -> None:
    Recording.given.clear()
    model = get_peft_model(
        tiny.llama(), Recording(r=2, target_modules=TARGETS, rank_pattern={"k_proj": 1}).calibrated(found)
    )
    layers = list(layers_of(model))
    assert [layer.folklora_updates["default"].A.shape[0] for layer in layers] == [2, 1, 2] * 2
    for layer, (weight, stats) in zip(layers, Recording.given, strict=True):
        assert torch.equal(weight, layer.get_base_layer().weight)
        assert set(stats) == EVERYTHING
        assert all(torch.equal(value, found[layer.name][kind]) for kind, value in stats.items())


def test_other_methods_are_given_the_weight_alone(found: Statistics) -> None:
    model = get_peft_model(tiny.llama(), LoRA(r=2, target_modules=TARGETS).calibrated(found))
    assert model.peft_config["default"].statistics is None


def test_statistics_are_no_option_and_the_model_does_not_keep_them(found: Statistics, tmp_path: Path) -> None:
    config = CorDA(r=2, target_modules=TARGETS)
    carrying = config.calibrated(found)
    assert (config.statistics, carrying.statistics) == (None, found)
    assert config == carrying
    assert "statistics" not in carrying.to_dict()
    assert carrying.changed(r=1).statistics is found
    assert copy.deepcopy(carrying).statistics is found
    assert same(pickle.loads(pickle.dumps(carrying)).statistics, found)
    model = get_peft_model(tiny.llama(), carrying)
    assert carrying.statistics is found, "the caller's own still has them"
    assert model.peft_config["default"].statistics is None
    model.add_adapter("second", LoRASB(r=2, target_modules=TARGETS).calibrated(found))
    assert model.peft_config["second"].statistics is None
    assert len(list(updates_of(model, "second"))) == 6
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert not {"statistics", "needs"} & set(saved)


def test_loading_needs_none(found: Statistics, tmp_path: Path) -> None:
    model = get_peft_model(tiny.llama(), CorDA(r=2, target_modules=TARGETS).calibrated(found))
    model.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).statistics is None
    with tiny.NoDecomposition():
        loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))


def refused(config: CorDA | LoRASB, pattern: str) -> None:
    """The error comes before the model is changed."""
    model = tiny.llama()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=pattern):
        get_peft_model(model, config)
    assert [name for name, _ in model.named_modules()] == names


def test_without_statistics_nothing_is_changed() -> None:
    pattern = r'(?s)corda must know the covariance of each layer.*calibrate\(model, batches, \{"covariance"\}'
    refused(CorDA(r=2, target_modules=TARGETS), pattern)
    model = get_peft_model(tiny.llama(), LoRA(r=2, target_modules=TARGETS))
    with pytest.raises(ValueError, match="lora-sb must know the gradient"):
        model.add_adapter("other", LoRASB(r=2, target_modules=TARGETS))


def test_statistics_that_do_not_fit_are_named_all_at_once(found: Statistics) -> None:
    config = CorDA(r=2, target_modules=TARGETS)
    q = "model.layers.0.self_attn.q_proj"
    wrong = {name: dict(kinds) for name, kinds in found.items()}
    wrong[q]["covariance"] = torch.eye(5)
    del wrong["model.layers.1.mlp.down_proj"]["covariance"]
    pattern = rf"(?s)covariance of layer '{q}' has shape \[5, 5\], not \[32, 32\].*needs the covariance of .*1\.mlp"
    refused(config.calibrated(Statistics(wrong)), pattern)
    del wrong[q]
    refused(config.calibrated(Statistics(wrong)), rf"(?s)the statistics have no layer '{q}'.*they have: model\.layers")
    empty = {name: {kind: torch.zeros_like(value) for kind, value in kinds.items()} for name, kinds in found.items()}
    refused(config.calibrated(Statistics(empty)), rf"covariance of layer '{q}' is zero")
    refused(LoRASB(r=2, target_modules=TARGETS).calibrated(Statistics(empty)), rf"gradient of layer '{q}' is zero")
