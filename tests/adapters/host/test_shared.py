"""What all layers of an adapter share: frozen (RandLoRA's bases) and trained (DiffoRA's pairs), kept and saved once."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from folklora import AdapterConfig, DiffoRA, LoRA, RandLoRA, tiny
from folklora.adapters.host.layer import layers_of, updates_of

WEIGHTS = "adapter_model.safetensors"
TARGETS = ["q_proj", "v_proj"]
FROZEN = RandLoRA(r=4, target_modules=TARGETS)
TRAINED = DiffoRA(r=4, selected=["model.layers.0.self_attn.q_proj"], target_modules=TARGETS)
BOTH = pytest.mark.parametrize("config", [FROZEN, TRAINED], ids=["frozen", "trained"])


def adapted(config: AdapterConfig) -> PeftModel:
    torch.manual_seed(5)
    return get_peft_model(tiny.llama(), copy.deepcopy(config))


def shared(model: nn.Module, name: str = "default") -> nn.ParameterDict:
    root = model.base_model.model if isinstance(model, PeftModel) else model
    return root.folklora_shared[name]


def asking(model: nn.Module) -> set[str]:
    return {name for name, value in model.named_parameters() if value.requires_grad}


@BOTH
def test_every_layer_reads_the_one_copy_at_the_root(config: AdapterConfig) -> None:
    model = adapted(config)
    names = [name for name, _ in model.named_parameters() if "folklora_shared" in name]
    assert names == [f"base_model.model.folklora_shared.default.{key}" for key in shared(model)]
    assert all(update.shared is shared(model) for _, update in updates_of(model, "default"))
    assert len(model.state_dict()) == len(list(model.named_parameters()))
    assert {id(p) for p in shared(model).values()} <= {
        id(p) for p in next(updates_of(model, "default"))[1].parameters()
    }


@BOTH
def test_it_is_moved_with_the_model(config: AdapterConfig) -> None:
    model = adapted(config).double()
    assert {p.dtype for p in shared(model).values()} == {torch.float64}
    assert all(update.shared is shared(model) for _, update in updates_of(model, "default"))
    assert next(updates_of(model, "default"))[1].factors().A.dtype == torch.float64


@BOTH
@pytest.mark.parametrize("twice", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_share_within_themselves_and_not_with_the_original(config: AdapterConfig, twice: Callable) -> None:
    model = tiny.trained(config)
    expected, twin = tiny.logits(model), twice(model)
    assert all(update.shared is shared(twin) for _, update in updates_of(twin, "default"))
    assert all(layer.context.shared is twin.base_model.model.folklora_shared for layer in layers_of(twin))
    with torch.no_grad():
        for value in shared(twin).values():
            value += 1
    assert torch.equal(tiny.logits(model), expected)
    assert not torch.allclose(tiny.logits(twin), expected)


@BOTH
def test_it_goes_with_its_adapter(config: AdapterConfig) -> None:
    model = adapted(config)
    model.add_adapter("other", LoRA(r=2, target_modules=["q_proj"]))
    model.add_adapter("third", copy.deepcopy(config))
    model.set_adapter("other")
    model.delete_adapter("default")
    root = model.base_model.model
    assert list(root.folklora_shared) == ["third"]
    assert not any(".default." in name for name, _ in model.named_parameters())
    base = model.unload()
    assert not hasattr(base, "folklora_shared")
    assert base.state_dict().keys() == tiny.llama().state_dict().keys()


@BOTH
def test_an_adapter_of_the_same_name_has_its_own(config: AdapterConfig) -> None:
    model = adapted(config)
    before = shared(model)
    model.delete_adapter("default")
    model.add_adapter("default", copy.deepcopy(config))
    assert shared(model) is not before
    assert all(update.shared is shared(model) for _, update in updates_of(model, "default"))


def test_gradients_are_asked_for_as_its_adapter_is_trained() -> None:
    model = adapted(TRAINED)
    pairs = {f"base_model.model.folklora_shared.default.{key}" for key in shared(model)}
    trained = asking(model)
    assert pairs < trained
    model.add_adapter("other", LoRA(r=2, target_modules=["q_proj"]))
    assert asking(model) == trained
    model.set_adapter("other")
    assert not pairs & asking(model)
    model.set_adapter("default")
    assert asking(model) == trained
    with model.disable_adapter():
        assert not pairs & asking(model)
    assert asking(model) == trained
    model.set_requires_grad("default", False)
    assert not asking(model)
    assert not any("folklora_shared" in name for name in asking(adapted(FROZEN)))
    assert model.base_model.model.lm_head.weight.requires_grad is False


@BOTH
def test_it_is_saved_and_loaded_once(config: AdapterConfig, tmp_path: Path) -> None:
    model = tiny.trained(config)
    model.add_adapter("A_4", copy.deepcopy(config))
    model.add_adapter("B", LoRA(r=2, target_modules=["q_proj"]))
    # an adapter named like a shared parameter must not cost another its own
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / WEIGHTS)
    for key, value in shared(model).items():
        assert torch.equal(saved[f"base_model.model.folklora_shared.{key}"], value)
    assert len([key for key in saved if "folklora_shared" in key]) == len(shared(model))
    assert not any("folklora_shared" in key for key in load_file(tmp_path / "B" / WEIGHTS))
    for options in ({}, {"low_cpu_mem_usage": True}, {"is_trainable": True}, {"adapter_name": "other"}):
        loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path, **options)
        assert torch.equal(tiny.logits(loaded), tiny.logits(model))
        own = shared(loaded, options.get("adapter_name", "default"))
        wanted = options.get("is_trainable", False) and config is TRAINED
        assert {p.requires_grad for p in own.values()} == {wanted}
        assert all(layer.context.shared is loaded.base_model.model.folklora_shared for layer in layers_of(loaded))


@BOTH
def test_a_bare_model_gives_and_takes_it(config: AdapterConfig) -> None:
    giver, taker = tiny.llama(), tiny.llama()
    giver.add_adapter(copy.deepcopy(config))
    taker.add_adapter(copy.deepcopy(config))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in giver.named_parameters():
            if ".folklora_" in name and "base_sample" not in name:
                value += 0.1 * torch.randn(value.shape, generator=generator)
    set_peft_model_state_dict(taker, get_peft_model_state_dict(giver))
    assert torch.equal(tiny.logits(taker), tiny.logits(giver))
    taker.delete_adapter("default")
    assert not list(taker.folklora_shared)


def _lose(tensors: dict[str, Tensor], key: str) -> None:
    del tensors[key]


def _shrink(tensors: dict[str, Tensor], key: str) -> None:
    tensors[key] = tensors[key][:1].clone()


def _poison(tensors: dict[str, Tensor], key: str) -> None:
    tensors[key].view(-1)[0] = float("nan")


def _add(tensors: dict[str, Tensor], key: str) -> None:
    tensors[key.replace("A_4", "C_4")] = tensors[key].clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_lose, "no value for A_4"),
        (_shrink, r"A_4 has shape \[1, 32\], not \[4, 32\]"),
        (_poison, "A_4 holds values that are not finite"),
        (_add, "C_4 is not known here"),
    ],
)
def test_saved_values_that_do_not_fit_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    adapted(FROZEN).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    change(tensors, "base_model.model.folklora_shared.A_4")
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=f"what its layers share: {message}"):
        PeftModel.from_pretrained(tiny.llama(), tmp_path)


def test_weight_decay_and_clipping_see_it_once() -> None:
    model = adapted(TRAINED)
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert len({id(p) for p in parameters}) == len(parameters)
    tiny.loss(model).backward()
    total = sum(p.grad.square().sum() for p in {id(p): p for p in parameters}.values())
    assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9).item() == pytest.approx(total.sqrt().item())
