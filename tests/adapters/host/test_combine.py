"""`add_weighted_adapter`: the sum of adapters of any methods as one LoRA, against dense sums in float64."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from folklora import AMLoRA, KaSA, LoRA, PiSSA, SVFit, check, methods, tiny
from folklora.adapters.base import AdapterConfig
from folklora.adapters.host.layer import layers_of, updates_of

FIXED = {m.name: m.factory for m in methods("adapters") if (m.name, "weighted") not in check.EXCEPTIONS}


def _two(first: AdapterConfig, second: AdapterConfig, base: nn.Module | None = None) -> PeftModel:
    """A model with the adapters "default" and "other", both off their start."""
    torch.manual_seed(0)
    base = tiny.llama() if base is None else base
    if first.needs:
        first = tiny.calibrated(base, first)
    model = get_peft_model(base, first)
    model.add_adapter("other", second)
    tiny.moved(model, "other")
    return tiny.moved(model, "default").eval()


def _dense(model: PeftModel, name: str) -> dict[str, Tensor]:
    return {layer.name: update.factors().dense().double() for layer, update in updates_of(model, name)}


@pytest.mark.parametrize("name", FIXED)
def test_the_sum_of_two_methods_is_one_lora(name: str, tmp_path: Path) -> None:
    first = tiny.sized(FIXED[name])
    first.target_modules = list(tiny.TARGETS)
    model = _two(first, LoRA(r=2, alpha=3, target_modules=["q_proj", "up_proj"]))
    one, two = _dense(model, "default"), _dense(model, "other")
    model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "sum", combination_type="cat")
    found = _dense(model, "sum")
    assert found.keys() == one.keys() | two.keys()
    correction = {layer.name: update for layer, update in updates_of(model, "default") if update.corrects_base}
    for layer, value in found.items():
        expected = 0.5 * one.get(layer, 0.0) - 2.0 * two.get(layer, 0.0)
        if layer in correction:
            expected = expected + 0.5 * correction[layer].split()[1].dense().double()
        tiny.close(value, expected, 1e-5, layer)
    assert model.peft_config["sum"].method == "lora"
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path / "sum")
    tiny.same(tiny.logits(loaded), tiny.logits(model), "the logits of the sum loaded and saved")


def test_the_sum_with_weights_of_one_is_both_adapters_at_once() -> None:
    for config in (KaSA(r=2, truncate=3, truncate_limit=1.0), PiSSA(r=2), SVFit(), LoRA(r=2)):
        config.target_modules, second = ["q_proj", "v_proj"], copy.deepcopy(config)
        second.target_modules = ["q_proj", "down_proj"]
        model = _two(config, second)
        model.base_model.set_adapter(["default", "other"])
        both = tiny.logits(model)
        model.add_weighted_adapter(["default", "other"], [1, 1], "sum", combination_type="cat")
        model.set_adapter("sum")
        tiny.close(tiny.logits(model), both, 1e-5, f"the logits of two {config.method} at once and of their sum")


def test_svd_is_the_best_sum_of_its_rank_and_the_same_as_pefts() -> None:
    model = _two(LoRA(r=2, target_modules=["q_proj"]), LoRA(r=3, target_modules=["q_proj", "v_proj"]))
    stock = get_peft_model(tiny.llama(), LoraConfig(r=2, lora_alpha=16, target_modules=["q_proj"]))
    stock.add_adapter("other", LoraConfig(r=3, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    for name in ("default", "other"):
        for layer, update in updates_of(model, name):
            twin = stock.base_model.model.get_submodule(layer.name)
            twin.lora_A[name].weight.data, twin.lora_B[name].weight.data = update.A.data, update.B.data
    one, two = _dense(model, "default"), _dense(model, "other")
    for rank, adapter in ((None, "largest"), (1, "first"), (4, "fourth")):
        for each in (model, stock):
            each.add_weighted_adapter(["default", "other"], [0.7, -0.4], adapter, svd_rank=rank)
        for layer, value in _dense(model, adapter).items():
            whole = 0.7 * one.get(layer, 0.0) - 0.4 * two[layer]
            U, S, V = torch.linalg.svd(whole)
            kept = min(rank or 3, 5 if layer in one else 3)
            tiny.close(value, U[:, :kept] * S[:kept] @ V[:kept], 1e-5, f"{layer} at rank {rank}")
            peft = stock.base_model.model.get_submodule(layer).get_delta_weight(adapter)
            tiny.close(value, peft, 1e-5, f"{layer} and PEFT's at rank {rank}")


def test_biases_are_summed_and_a_sum_of_nothing_is_zero() -> None:
    first = LoRA(r=2, target_modules=["q"], train_bias=True)
    model = _two(first, LoRA(r=2, target_modules=["q", "v"], train_bias=True), tiny.TwoLayers())
    changes = [{u.bias_change for layer, u in updates_of(model, n) if layer.name == "q"}.pop() for n in check._BOTH]
    model.add_weighted_adapter(check._BOTH, [3.0, -1.0], "sum")
    update = next(update for layer, update in updates_of(model, "sum") if layer.name == "q")
    tiny.close(update.bias_change, 3 * changes[0] - changes[1], 1e-6, "the change of the bias")
    model.add_weighted_adapter(["default"], [0.0], "nothing")
    assert not any(value.any() for value in _dense(model, "nothing").values())


def test_what_has_no_sum_is_refused_in_words() -> None:
    model = _two(AMLoRA(r=2, target_modules=["q_proj"]), LoRA(r=2, target_modules=["q_proj"]))
    with pytest.raises(
        ValueError, match=r"'default' on layer 'model.layers.0.self_attn.q_proj' depends on each layer's"
    ):
        model.add_weighted_adapter(["default", "other"], [1, 1], "sum")
    with pytest.raises(
        ValueError, match=r"there is no adapter 'third'\nadapters must be different.*\nthere is an adapter"
    ):
        model.add_weighted_adapter(["other", "third"], [1], "other")
    with pytest.raises(ValueError, match="combination_type 'ties' mixes the factors of LoRAs"):
        model.add_weighted_adapter(["other"], [1], "sum", combination_type="ties")
    with pytest.raises(ValueError, match="rank r must be a whole number"):
        model.add_weighted_adapter(["other"], [1], "sum", svd_rank=0)
    assert list(model.peft_config) == ["default", "other"]
    model = _two(
        LoRA(r=2, target_modules=["q"], modules_to_save=["v"]), LoRA(r=2, target_modules=["q"]), tiny.TwoLayers()
    )
    with pytest.raises(ValueError, match="'v' was trained in full by one of the adapters"):
        model.add_weighted_adapter(["default", "other"], [1, 1], "sum")
    model.merge_adapter(["other"])
    with pytest.raises(ValueError, match="other is merged into layer 'q': call unmerge_adapter"):
        model.add_weighted_adapter(["other"], [1], "sum")
    assert sum(1 for _ in layers_of(model)) == 1
