"""ScaLearn: its four forms against loops over files in float64, the wide bottleneck, LoRAs that merge, and learning."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from folklora import ATLAS, LoRA, ScaLearn, VLAdapter, check, export_lora, penalty, tiny
from folklora.adapters.host.layer import layers_of, updates_of
from folklora.adapters.scalearn import ScaLearnUpdate, fold

FORMS = [{"uniform": u, "share_layers": s} for s in (False, True) for u in (False, True)]
D, LAYERS = 32, 4
EPS32 = torch.finfo(torch.float32).eps


def composed(sources: dict[str, str], dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    return tiny.adapted(ScaLearn(sources=sources, **options), dtype=dtype).to(dtype).eval()


def updates(model: PeftModel) -> list[ScaLearnUpdate]:
    return [update for _, update in updates_of(model, "default")]


@torch.no_grad()
def put(model: PeftModel, values: Tensor | None = None, seed: int = 3) -> PeftModel:
    """ω set to `values` on all layers, or to noise."""
    generator = torch.Generator().manual_seed(seed)
    for update in updates(model):
        omega = update.scales()
        omega.copy_(torch.randn(omega.shape, generator=generator) if values is None else values)
    return model


def close(actual: Tensor, expected: Tensor) -> None:
    # two blocks of sums of at most 48 terms in float32
    torch.testing.assert_close(actual, expected, rtol=0, atol=200 * EPS32 * float(expected.abs().max()))


def step(model: PeftModel, optimizer: torch.optim.Optimizer) -> None:
    tiny.loss(model.train()).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_it_is_the_sum_of_scaled_adapters_in_double_precision(
    options: dict[str, bool], bottlenecks: dict[str, str], output_of: Any, by_hand: Any
) -> None:
    model = put(composed(bottlenecks, torch.float64, **options))
    scales = {layer.name: update.scales().detach() for layer, update in updates_of(model, "default")}
    assert len(scales) == LAYERS

    def added(layer: str, x: Tensor, y: Tensor) -> Tensor:
        total = torch.zeros_like(y)
        for row, folder in zip(scales[layer], bottlenecks.values(), strict=True):
            total = total + row * output_of(folder, layer, x, y)
        return total

    # Compacter's matrices were rounded to float32 once
    torch.testing.assert_close(tiny.logits(model), by_hand(added, list(scales)), rtol=0, atol=1e-5)


def test_one_row_of_ones_is_that_adapter_alone_and_zeros_are_the_base(bottlenecks: dict[str, str]) -> None:
    model = composed(bottlenecks)
    for number, folder in enumerate(bottlenecks.values()):
        put(model, torch.eye(3)[:, [number]])
        close(tiny.logits(model), tiny.logits(PeftModel.from_pretrained(tiny.llama(), folder)))
    assert torch.equal(tiny.logits(put(model, torch.zeros(3, 1))), tiny.logits(tiny.llama()))


def test_a_layer_is_linear_in_the_coefficients(bottlenecks: dict[str, str]) -> None:
    model = composed(bottlenecks, torch.float64)
    layer, x = next(layers_of(model)), torch.randn(2, 5, D, dtype=torch.float64)
    base = tiny.layer_output(layer, [], x)

    def added(values: Tensor) -> Tensor:
        return tiny.layer_output(next(layers_of(put(model, values))), ["default"], x) - base

    one, two = torch.randn(2, 3, D, dtype=torch.float64)
    torch.testing.assert_close(added(0.3 * one - 2 * two), 0.3 * added(one) - 2 * added(two), rtol=1e-9, atol=1e-12)


def test_as_many_numbers_as_the_paper_counts(bottlenecks: dict[str, str]) -> None:
    sources = {str(t): "x" for t in range(8)}
    shapes = {str(layer): (768, 3072) for layer in range(12)}
    counts = []
    for options in FORMS:
        config = ScaLearn(sources=sources, **options)
        counts.append(sum(map(config.trainable_count, shapes.values())) + config.shared_count(shapes))
    assert counts == [73_728, 96, 6_144, 8]
    found = [composed(bottlenecks, **options).get_nb_trainable_parameters()[0] for options in FORMS]
    assert found == [3 * D * LAYERS, 3 * LAYERS, 3 * D, 3]


def test_the_forms_contain_one_another(bottlenecks: dict[str, str]) -> None:
    rows = torch.tensor([[0.4], [-0.7], [1.5]])
    found = [tiny.logits(put(composed(bottlenecks, **options), rows)) for options in FORMS]
    for logits in found[1:]:
        close(logits, found[0])
    wide = torch.randn(3, D, generator=torch.Generator().manual_seed(1))
    own, shared = (tiny.logits(put(composed(bottlenecks, share_layers=s), wide)) for s in (False, True))
    assert torch.equal(own, shared)


def test_only_the_coefficients_and_the_head_are_trained(bottlenecks: dict[str, str]) -> None:
    model = composed(bottlenecks, modules_to_save=["lm_head"])
    tiny.loss(model).backward()
    trained = {name.rpartition("default")[2] for name in tiny.gradients(model)}
    assert trained == {".omega", ".weight"}
    assert sum(name.endswith("lm_head.modules_to_save.default.weight") for name in tiny.gradients(model)) == 1


def test_coefficients_start_at_twice_the_mean(bottlenecks: dict[str, str]) -> None:
    omega = torch.cat([update.omega for update in updates(composed(bottlenecks))]).detach()
    assert omega.mean(1).sub(2 / 3).abs().max() < 1e-3
    assert 0.0009 < float(omega.std()) < 0.0011
    assert float(updates(composed(bottlenecks, init=-0.5))[0].omega.mean().detach()) == pytest.approx(-0.5, abs=1e-3)


def test_the_order_of_sources_makes_no_difference(bottlenecks: dict[str, str]) -> None:
    values = torch.randn(3, D, generator=torch.Generator().manual_seed(1))
    expected = tiny.logits(put(composed(bottlenecks), values))
    backwards = dict(reversed(bottlenecks.items()))
    assert torch.equal(tiny.logits(put(composed(backwards), values)), expected)
    renamed = dict(zip("xyz", backwards.values(), strict=True))
    close(tiny.logits(put(composed(renamed), values.flip(0))), expected)


def test_dropout_takes_tasks_of_a_uniform_omega_and_single_outputs_of_another(bottlenecks: dict[str, str]) -> None:
    torch.manual_seed(0)
    uniform = updates(composed(bottlenecks, uniform=True, coefficient_dropout=0.5, init=1.0).train())[0]
    kept = torch.stack([(uniform.scales() != 0).flatten() for _ in range(400)])
    assert len(kept.unique(dim=0)) == 2**3
    # four deviations of a mean of 1200 draws
    assert float(kept.float().mean()) == pytest.approx(0.5, abs=4 * 0.5 / 1200**0.5)
    vector = updates(composed(bottlenecks).train())[0]
    dropped = vector.scales()
    assert 0.1 < float((dropped == 0).float().mean()) < 0.5
    torch.testing.assert_close(dropped[dropped != 0], vector.omega[dropped != 0] / 0.7)
    assert torch.equal(vector.eval().scales(), vector.omega)
    both = composed(bottlenecks, uniform=True, share_layers=True)
    assert torch.equal(updates(both.train())[0].scales(), updates(both.eval())[0].scales())


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_folded_into_one_wide_bottleneck_it_is_the_same(
    options: dict[str, bool], bottlenecks: dict[str, str], tmp_path: Path
) -> None:
    model = put(composed(bottlenecks, modules_to_save=["lm_head"], **options))
    with torch.no_grad():
        model.get_submodule("base_model.model.lm_head").modules_to_save["default"].weight.mul_(2)
    expected = tiny.logits(model)
    fold(model, "wide")
    model.set_adapter("wide")
    close(tiny.logits(model), expected)
    wide = model.peft_config["wide"]
    # 4 and 8 units, and 3 where there is a third
    assert isinstance(wide, VLAdapter)
    assert wide.bottleneck_size == 4 + 8 + 3
    model.save_pretrained(tmp_path, selected_adapters=["wide"])
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path / "wide")
    close(tiny.logits(loaded), expected)
    again = put(composed({"one": str(tmp_path / "wide")}), torch.ones(1, 1))
    # a source's head is not composed
    close(2 * tiny.logits(again), expected)
    with pytest.raises(ValueError, match="no ScaLearn adapter over bottlenecks named 'wide'"):
        fold(model, "other", "wide")


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_over_loras_it_merges_exports_and_is_what_others_compute(
    options: dict[str, bool], loras: dict[str, str], tmp_path: Path
) -> None:
    options = {**options, "target_modules": ["down_proj"]}
    model = put(composed(loras, **options))
    expected = tiny.logits(model)
    weights = {layer.name: update.scales().detach() for layer, update in updates_of(model, "default")}
    by_hand = tiny.llama()
    for number, folder in enumerate(loras.values()):
        one = PeftModel.from_pretrained(tiny.llama(), folder).merge_and_unload()
        for name, scales in weights.items():
            delta = one.get_submodule(name).weight - tiny.llama().get_submodule(name).weight
            by_hand.get_submodule(name).weight.data += scales[number].unsqueeze(1) * delta.detach()
    close(expected, tiny.logits(by_hand))
    export_lora(model, tmp_path / "lora")
    close(tiny.logits(PeftModel.from_pretrained(tiny.llama(), tmp_path / "lora")), expected)
    model.merge_adapter(safe_merge=True)
    close(tiny.logits(model), expected)


def test_uniform_over_loras_it_is_atlas_without_its_start(loras: dict[str, str]) -> None:
    ours, theirs = put(composed(loras, uniform=True)), tiny.adapted(ATLAS(vectors=loras))
    assert {layer.name for layer in layers_of(ours)} == {layer.name for layer in layers_of(theirs)}
    for own, (_, other) in zip(updates(ours), updates_of(theirs, "default"), strict=True):
        other.coefficients.data.copy_(own.omega)
    close(tiny.logits(ours), tiny.logits(theirs))


@pytest.mark.parametrize("name", ["frozen", "save", "unmerge", "rows", "mixing", "copies", "bfloat16"])
@pytest.mark.parametrize("shared", [False, True])
def test_over_loras_it_passes_what_a_lora_passes(name: str, shared: bool, loras: dict[str, str]) -> None:
    config = ScaLearn(sources=loras, share_layers=shared, target_modules=["down_proj"])
    # not by run_check, which expects some of them to fail as they do over bottlenecks
    check.CHECKS[name](config)


def test_the_regulariser_pulls_each_tasks_mean_to_one(bottlenecks: dict[str, str]) -> None:
    model = put(composed(bottlenecks, regularization=0.1))
    expected = sum(0.1 / 3 * ((1 - update.omega.mean(1)) ** 2).sum() for update in updates(model))
    assert float(penalty(model)) == pytest.approx(float(expected.detach()))
    with pytest.raises(ValueError, match="each layer has for itself"):
        ScaLearn(regularization=0.1, share_layers=True)


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_a_saved_run_goes_on_as_if_it_had_not_stopped(
    options: dict[str, bool], bottlenecks: dict[str, str], tmp_path: Path
) -> None:
    model = composed(bottlenecks, **options)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=6e-3)
    step(model, optimizer)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    named = {name.rpartition(".")[2] for name in saved}
    assert named == {"omega", "lengths", "base_sample"}
    resumed = PeftModel.from_pretrained(tiny.llama(), tmp_path, is_trainable=True)
    again = torch.optim.AdamW([p for p in resumed.parameters() if p.requires_grad], lr=6e-3)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, its in ((model, optimizer), (resumed, again)):
        torch.manual_seed(7)
        step(one, its)
    assert torch.equal(tiny.logits(resumed), tiny.logits(model))


@pytest.mark.parametrize("options", FORMS[1:2] + FORMS[3:], ids=str)
def test_it_finds_the_scales_that_made_a_teacher(options: dict[str, bool], bottlenecks: dict[str, str]) -> None:
    teacher = put(composed(bottlenecks, **options), torch.tensor([[0.3], [-0.5], [1.2]]))
    model = composed(bottlenecks, coefficient_dropout=0.0, **options)
    expected = tiny.logits(teacher)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.0)
    start = float((tiny.logits(model) - expected).square().mean())
    for number in range(60):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - number / 60)
        loss = (model(**tiny.batch()).logits - expected).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 1e-3 * start
    if options["share_layers"]:
        torch.testing.assert_close(updates(model)[0].scales(), updates(teacher)[0].scales(), rtol=0, atol=0.05)


def test_options_and_layers_that_do_not_fit_are_refused(bottlenecks: dict[str, str]) -> None:
    for options in ({"coefficient_dropout": 1.0}, {"regularization": -1.0}, {"dropout": 0.1}, {"train_bias": True}):
        with pytest.raises(ValueError):
            ScaLearn(sources=bottlenecks, **options)
    stage = VLAdapter(target_modules=["q_proj", "v_proj"])
    sources = tiny.source_adapters(tiny.llama(), stage.target_modules)
    with pytest.raises(ValueError, match=r"equally many outputs, and there are 32 \('.*q_proj'\), 16 \('.*v_proj'\)"):
        composed(sources, share_layers=True)
    assert composed(sources, share_layers=True, uniform=True).get_nb_trainable_parameters()[0] == 2
    with pytest.raises(ValueError, match="over bottlenecks"):
        fold(get_peft_model(tiny.llama(), LoRA(r=2)), "wide")
