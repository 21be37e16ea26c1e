"""KaSA beside others: small weights and heads stay whole, and several truncations of one weight count once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from folklora import KaSA, LoRA, tiny
from folklora.adapters.host.layer import FolkloraLayer, layers_of, updates_of

R = 4
LIMITS = {"r": R, "truncate_limit": 1.0, "target_modules": ["0"]}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 30))


def weak_end(weight: Tensor, t: int) -> Tensor:
    """The t weakest directions of a weight, float64, by a full decomposition."""
    U, S, Vh = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    return (U[:, -t:] * S[-t:]) @ Vh[-t:]


def learned(layer: FolkloraLayer, *names: str) -> Tensor:
    return sum(layer.folklora_updates[name].split()[0].dense().detach().double() for name in names)


def several(first: int, second: int) -> tuple[PeftModel, FolkloraLayer]:
    """Two KaSA adapters with so many directions dropped, and a LoRA, all moved off their start."""
    model = get_peft_model(net(), KaSA(truncate=first, **LIMITS))
    model.add_adapter("second", KaSA(truncate=second, **LIMITS))
    model.add_adapter("lora", LoRA(r=R, target_modules=["0"]))
    for name in ("default", "second", "lora"):
        tiny.moved(model, name)
    (layer,) = layers_of(model)
    return model.eval(), layer


def expected_weight(layer: FolkloraLayer, t: int, *names: str) -> Tensor:
    weight = net()[0].weight.detach().double()
    return weight - (weak_end(weight, t) if t else 0) + learned(layer, *names)


def assert_computes(model: nn.Module, weight: Tensor) -> None:
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(3))
    expected = x.double() @ weight.T + net()[0].bias.detach().double()
    torch.testing.assert_close(model(x).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("first", "second"), [(4, 4), (2, 7), (7, 2), (0, 5), (5, 0), (0, 0)])
def test_two_truncations_of_one_weight_count_once_and_the_larger_one_wins(first: int, second: int):
    model, layer = several(first, second)
    for names in (["default", "second"], ["second", "lora", "default"]):
        model.base_model.set_adapter(names)
        assert_computes(model, expected_weight(layer, max(first, second), *names))
    model.set_adapter("default")
    assert_computes(model, expected_weight(layer, first, "default"))


@pytest.mark.parametrize(("first", "second"), [(4, 4), (2, 7), (7, 2)])
def test_merged_together_or_one_after_the_other_it_is_the_same(first: int, second: int):
    model, layer = several(first, second)
    expected = expected_weight(layer, max(first, second), "default", "second")
    base = net()[0].weight
    for steps in ([["default", "second"]], [["default"], ["second"]], [["second"], ["default"]]):
        for names in steps:
            model.merge_adapter(adapter_names=names, safe_merge=True)
        torch.testing.assert_close(layer.get_base_layer().weight.double(), expected, rtol=0, atol=1e-6)
        assert_computes(model, expected)
        model.unmerge_adapter()
        assert torch.equal(layer.get_base_layer().weight, base)


def test_a_merge_that_fails_leaves_what_was_merged():
    model, layer = several(2, 7)
    model.merge_adapter(adapter_names=["default"])
    with torch.no_grad():
        layer.folklora_updates["second"].B.fill_(torch.inf)
    with pytest.raises(ValueError, match="not finite"):
        model.merge_adapter(adapter_names=["second"], safe_merge=True)
    assert layer.merged_adapters == ["default"]
    assert_computes(model, expected_weight(layer, 2, "default"))


@pytest.mark.parametrize("dropouts", [(0.5, 0.5), (0.5, 0.0), (0.0, 0.5)])
def test_dropout_in_training_does_not_double_the_truncation(dropouts: tuple[float, float]):
    model = get_peft_model(net(), KaSA(truncate=3, dropout=dropouts[0], **LIMITS))
    model.add_adapter("second", KaSA(truncate=6, dropout=dropouts[1], **LIMITS))
    model.base_model.set_adapter(["default", "second"])
    # B starts at 0, so that only the truncation is seen
    weight = net()[0].weight.detach().double()
    assert_computes(model.train(), weight - weak_end(weight, 6))


def test_rows_of_a_batch_have_each_their_own_truncation():
    model, layer = several(2, 7)
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(3))
    rows = ["second", "default", "__base__"]
    mixed = model(x, adapter_names=rows)
    for row, (name, t) in enumerate((("second", 7), ("default", 2))):
        alone = x[row].double() @ expected_weight(layer, t, name).T + net()[0].bias.detach().double()
        torch.testing.assert_close(mixed[row].double(), alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed[2], net()(x)[2])


def test_both_learn_while_both_are_active():
    model, layer = several(2, 7)
    model.base_model.set_adapter(["default", "second"])
    model(torch.ones(2, 40)).square().sum().backward()
    for name in ("default", "second"):
        update = layer.folklora_updates[name]
        assert all(p.grad.abs().max() > 0 for p in (update.A, update.B, update.d))


@pytest.mark.parametrize(("limit", "expected"), [(1 / 16, 2), (0.0, 0), (0.1, 3), (1.0, R)])
def test_small_weights_lose_at_most_a_share_of_their_directions(limit: float, expected: int):
    update = KaSA(r=R, truncate_limit=limit).update(torch.randn(40, 33))
    assert update.P.shape == (40, expected)
    assert update.starts_at_base == (expected == 0)
    assert KaSA(r=R, truncate_limit=limit).empty((40, 33)).Q.shape == (expected, 33)


def test_by_default_a_weight_of_fewer_than_sixteen_is_whole_and_a_large_one_loses_t():
    assert KaSA(r=8).empty((15, 400)).P.shape[1] == 0
    assert KaSA(r=8).empty((768, 768)).P.shape[1] == 8
    assert KaSA(r=8, truncate=20).empty((768, 768)).P.shape[1] == 20


def test_heads_stay_whole_and_load_again(tmp_path: Path):
    targets = ["lm_head", "q_proj"]
    model = tiny.trained(KaSA(r=R, target_modules=targets))
    dropped = {layer.name: update.P.shape[1] for layer, update in updates_of(model, "default")}
    assert dropped.pop("lm_head") == 0
    assert set(dropped.values()) == {2}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))
    everywhere = tiny.adapted(KaSA(r=R, untruncated=[], target_modules=targets))
    assert {update.P.shape[1] for _, update in updates_of(everywhere, "default")} == {2}
    nowhere = tiny.adapted(KaSA(r=R, untruncated=["self_attn"], target_modules=targets))
    assert [update.P.shape[1] for layer, update in updates_of(nowhere, "default") if layer.name != "lm_head"] == [0, 0]
