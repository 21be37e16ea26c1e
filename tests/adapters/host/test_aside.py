"""Work on one of many adapters: the others stand aside meanwhile, and nothing comes out otherwise for that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from folklora import AMLoRA, LoRA, PiSSA, RandLoRA, tiny
from folklora.adapters.base import AdapterConfig
from folklora.adapters.host import tuner
from folklora.adapters.host.aside import others_aside
from folklora.adapters.host.layer import FolkloraLayer, layers_of
from folklora.stream import run

TARGETS = ["q_proj", "v_proj"]
METHODS = {
    "lora": [LoRA(r=2, target_modules=TARGETS), LoRA(r=3, train_bias=True, target_modules=["v_proj", "up_proj"])],
    "am-lora": [AMLoRA(r=2, tasks=2, target_modules=TARGETS)] * 2,
    # what their layers have in common is at the model's root
    "randlora": [RandLoRA(r=4, target_modules=TARGETS), RandLoRA(r=3, target_modules=["up_proj"])],
    "pissa": [PiSSA(r=2, target_modules=TARGETS), LoRA(r=2, target_modules="all-linear")],
}


def carrying(configs: list[AdapterConfig], count: int = 3) -> PeftModel:
    """A model with adapters task_0, task_1, ... of the given methods in turn."""
    torch.manual_seed(0)
    model = get_peft_model(tiny.llama(), configs[0].changed(), adapter_name="task_0")
    for i in range(1, count):
        model.add_adapter(f"task_{i}", configs[i % len(configs)].changed())
    return model


def all_of(model: PeftModel) -> dict[str, Any]:
    """Whatever the order in which adapters came could have made different; names in their order."""
    ids = torch.arange(12).view(2, 6)
    model.eval()
    outputs: dict[str, Tensor] = {}
    for name in model.peft_config:
        model.set_adapter(name)
        outputs[name] = model(input_ids=ids).logits.detach()
    model.base_model.set_adapter(list(model.peft_config))
    outputs["all"] = model(input_ids=ids).logits.detach()
    layers = [(layer.name, list(layer.folklora_updates), layer.active_adapters) for layer in layers_of(model)]
    return {"layers": layers, "names": model.base_model.targeted_module_names, **model.state_dict(), **outputs}


def same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert list(found) == list(wanted)
    for key, value in wanted.items():
        assert torch.equal(found[key], value) if isinstance(value, Tensor) else found[key] == value, key


@contextmanager
def visits() -> Iterator[list[int]]:
    """How many modules were met by all walks over models, as the one entry of the list."""
    count, walk = [0], nn.Module.named_modules

    def counted(self: nn.Module, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        for one in walk(self, *args, **kwargs):
            count[0] += 1
            yield one

    nn.Module.named_modules = counted
    try:
        yield count
    finally:
        nn.Module.named_modules = walk


@pytest.fixture
def side_by_side(monkeypatch):
    """Let the adapters stay in the model."""

    def stay() -> None:
        monkeypatch.setattr(tuner, "others_aside", lambda *names: nullcontext())
        monkeypatch.setattr(run, "others_aside", lambda *names: nullcontext())

    return stay


@pytest.mark.parametrize("method", METHODS)
def test_adapters_that_are_added_saved_and_loaded_are_as_without_it(method, side_by_side, tmp_path: Path):
    def results(folder: Path) -> tuple[PeftModel, PeftModel, dict[str, bytes], list[bool]]:
        model = carrying(METHODS[method])
        trainable = [parameter.requires_grad for parameter in model.parameters()]
        for name in model.peft_config:
            tiny.moved(model, name)
        run.save_adapters(model, folder)
        files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        loaded = run.load_adapters(tiny.llama(), folder)
        return model, loaded, files, trainable + [parameter.requires_grad for parameter in loaded.parameters()]

    found = results(tmp_path / "aside")
    side_by_side()
    wanted = results(tmp_path / "beside")
    same(all_of(found[0]), all_of(wanted[0]))
    same(all_of(found[1]), all_of(wanted[1]))
    assert found[2:] == wanted[2:]


def test_an_adapter_costs_as_many_visits_however_many_there_are(tmp_path):
    model, met, config = carrying(METHODS["lora"], 2), [], METHODS["lora"][0]
    for i in range(2, 8):
        with visits() as count:
            model.add_adapter(f"task_{i}", config.changed())
        met.append(count[0])
    assert len(set(met)) == 1
    assert met[0] > 100
    # nor are the walks of loading longer: n adapters cost n times one
    folders = [tmp_path / str(n) for n in (1, 3, 5)]
    met = []
    for folder, number in zip(folders, (1, 3, 5), strict=True):
        run.save_adapters(carrying([config], number), folder)
        base = tiny.llama()
        with visits() as count:
            run.load_adapters(base, folder)
        met.append(count[0])
    assert met[2] - met[1] == met[1] - met[0] > 100


def test_others_come_back_in_their_order_after_an_error():
    model = carrying(METHODS["randlora"], 4)
    names = [list(layer.folklora_updates) for layer in layers_of(model)]
    shared = list(model.base_model.model.folklora_shared)
    with others_aside(model, "task_2"):
        assert {name for layer in layers_of(model) for name in layer.folklora_updates} == {"task_2"}
        assert list(model.base_model.model.folklora_shared) == ["task_2"]
    assert [list(layer.folklora_updates) for layer in layers_of(model)] == names
    assert list(model.base_model.model.folklora_shared) == shared
    with pytest.raises(ValueError, match="nowhere"):
        model.add_adapter("task_4", RandLoRA(target_modules=["nowhere"]))
    assert [list(layer.folklora_updates) for layer in layers_of(model)] == names


def test_an_adapter_that_is_deleted_or_added_meanwhile_stays_so():
    model = carrying(METHODS["lora"])
    with others_aside(model, "task_1"):
        model.base_model.delete_adapter("task_1")
    assert {name for layer in layers_of(model) for name in layer.folklora_updates} == {"task_0", "task_2"}


def test_the_layers_of_a_model_are_those_that_modules_gives_in_its_order():
    model = carrying(METHODS["lora"])
    # one that is reached by two ways counts once
    model.base_model.model.again = model.base_model.model.model.layers[1]
    assert list(layers_of(model)) == [module for module in model.modules() if isinstance(module, FolkloraLayer)]
    assert len(list(layers_of(model))) == 6
