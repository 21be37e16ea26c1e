"""CorDA: the start from components of W C, with a dense computation and PEFT's CorDA as oracles."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig
from torch import Tensor, nn

from folklora import CorDA, PiSSA, Statistics, calibrate, export_lora, tiny
from folklora.adapters.host.layer import layers_of, updates_of

EPS32 = torch.finfo(torch.float32).eps
TARGETS = ["q", "v"]
R = 4
MODES = ["ipm", "kpm"]
# of the damped covariance of the layer q, rounded up
CONDITION = 700


def inputs(rows: int = 3) -> Tensor:
    """Rows of 60 positions whose directions differ in strength by ten."""
    generator = torch.Generator().manual_seed(2)
    mix = torch.logspace(0, -1, 32).unsqueeze(1) * torch.randn(32, 32, generator=generator)
    return torch.randn(rows, 60, 32, generator=generator) @ mix


def statistics(normalise: bool = False, base: nn.Module | None = None) -> Statistics:
    rows = [row.unsqueeze(0) for row in inputs()]
    return calibrate(base or tiny.TwoLayers(), rows, CorDA.needs, target_modules=TARGETS, normalise=normalise)


def adapted(base: nn.Module | None = None, found: Statistics | None = None, **options: Any) -> PeftModel:
    config = CorDA(**{"r": R, "target_modules": TARGETS} | options)
    base = base or tiny.TwoLayers()
    return get_peft_model(base, config.calibrated(found or statistics(base=base)))


def train(model: nn.Module, steps: int = 5, **options: Any) -> float:
    goal = torch.randn(3, 60, 36, generator=torch.Generator().manual_seed(9))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(model(inputs()), goal)
        loss.backward()
        optimizer.step()
    return loss.item()


def assert_close32(actual: Tensor, expected: Tensor, slack: int = 100) -> None:
    # sums of at most 36 terms in each of a few layers
    tolerance = slack * EPS32 * float(expected.detach().abs().max())
    torch.testing.assert_close(actual, expected.to(actual), rtol=0, atol=tolerance)


@pytest.fixture
def preprocess() -> Iterator[Any]:
    """PEFT's calibration; of the package attrs it wants only a decorator that the standard library has too."""
    missing = importlib.util.find_spec("attr") is None
    if missing:
        sys.modules["attr"] = dataclasses
    yield importlib.import_module("peft.tuners.lora.corda").preprocess_corda
    if missing:
        del sys.modules["attr"]


def pefts(preprocess: Any, mode: str, alpha: float | None = None, base: nn.Module | None = None) -> PeftModel:
    model = base or tiny.TwoLayers()
    config = LoraConfig(
        r=R,
        lora_alpha=alpha or R,
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=mode),
        target_modules=TARGETS,
    )
    preprocess(model, config, run_model=lambda: [model(row.unsqueeze(0)) for row in inputs()])
    return get_peft_model(model, config)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("alpha", [None, 10.0])
@pytest.mark.parametrize("mode", MODES)
def test_the_start_is_the_dense_formulas(mode: str, alpha: float | None, transposed: bool) -> None:
    model, found, plain = adapted(tiny.TwoLayers(transposed), mode=mode, alpha=alpha), statistics(), tiny.TwoLayers()
    for layer, update in updates_of(model, "default"):
        W = plain.get_submodule(layer.name).weight.detach().double()
        C = found[layer.name]["covariance"].double()
        M = C + 0.01 * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)
        U, S, Vh = torch.linalg.svd(W @ M, full_matrices=False)
        places = slice(0, R) if mode == "ipm" else slice(-R, None)
        U, S, Vhat = U[:, places], S[places], Vh[places] @ torch.linalg.inv(M)
        scale = 1.0 if alpha is None else alpha / R
        assert update.scale == scale
        product = scale * update.B0.double() @ update.A0.double()
        assert_close32(product, (U * S) @ Vhat)
        assert_close32(product, U @ U.T @ W)
        assert_close32(update.B0.double().T @ update.B0.double(), torch.diag(S / scale))


@pytest.mark.parametrize("mode", MODES)
def test_from_raw_inputs_to_the_trained_model_it_equals_pefts(mode: str, preprocess: Any) -> None:
    theirs = pefts(preprocess, mode, 10.0)
    model = adapted(found=statistics(normalise=True), mode=mode, alpha=10.0)
    for layer, update in updates_of(model, "default"):
        other = theirs.base_model.model.get_submodule(layer.name)
        A, B = other.lora_A["default"].weight, other.lora_B["default"].weight
        # theirs is a float32 inverse and decomposition; the signs of singular vectors are free
        assert_close32(update.B0 @ update.A0, B @ A, slack=10 * CONDITION)
        residual = layer.get_base_layer().weight - update.scale * update.B0 @ update.A0
        assert_close32(residual, other.get_base_layer().weight, slack=10 * CONDITION)
        assert_close32(update.B0.norm(dim=0), B.norm(dim=0), slack=10 * CONDITION)
        assert_close32(update.A0.norm(dim=1), A.norm(dim=1), slack=10 * CONDITION)
    torch.testing.assert_close(model(inputs()), theirs(inputs()), rtol=0, atol=1e-5)
    before = model(inputs()).detach()
    assert train(model) == pytest.approx(train(theirs), rel=1e-4)
    assert (model(inputs()) - before).abs().max() > 0.1
    torch.testing.assert_close(model(inputs()), theirs(inputs()), rtol=0, atol=1e-3)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_the_start_is_the_base_and_the_base_is_kept(mode: str, transposed: bool) -> None:
    model = adapted(tiny.TwoLayers(transposed), mode=mode)
    assert_close32(model(inputs()), tiny.TwoLayers()(inputs()))
    weights = [layer.get_base_layer().weight.detach().clone() for layer in layers_of(model)]
    starts = [(update.A0.clone(), update.B0.clone()) for _, update in updates_of(model, "default")]
    assert all(
        torch.equal(u.A, A) and torch.equal(u.B, B)
        for (_, u), (A, B) in zip(updates_of(model, "default"), starts, strict=True)
    )
    train(model, weight_decay=0.5)
    assert all(
        torch.equal(layer.get_base_layer().weight, w) for layer, w in zip(layers_of(model), weights, strict=True)
    )
    for (A0, B0), (_, update) in zip(starts, updates_of(model, "default"), strict=True):
        assert torch.equal(update.A0, A0)
        assert torch.equal(update.B0, B0)
        assert not torch.equal(update.A, A0)


def test_inputs_that_prefer_no_direction_give_pissa() -> None:
    even = Statistics({"q": {"covariance": 3 * torch.eye(32)}, "v": {"covariance": 3 * torch.eye(20)}})
    pairs = zip(
        updates_of(adapted(found=even), "default"),
        updates_of(get_peft_model(tiny.TwoLayers(), PiSSA(r=R, target_modules=TARGETS)), "default"),
        strict=True,
    )
    for (_, ours), (_, plain) in pairs:
        assert_close32(ours.B0 @ ours.A0, plain.B0 @ plain.A0)


@pytest.mark.parametrize("mode", MODES)
def test_neither_the_covariances_scale_nor_the_order_of_examples_matters(mode: str) -> None:
    found = statistics()
    scaled = Statistics({name: {"covariance": 16 * kinds["covariance"]} for name, kinds in found.items()})
    rows = [row.unsqueeze(0) for row in inputs().flip(0)]
    permuted = calibrate(tiny.TwoLayers(), rows, CorDA.needs, target_modules=TARGETS)
    models = [adapted(found=each, mode=mode) for each in (found, scaled, permuted)]
    first, second, third = ([u for _, u in updates_of(model, "default")] for model in models)
    for one, large, other in zip(first, second, third, strict=True):
        assert_close32(large.B0 @ large.A0, one.B0 @ one.A0)
        assert_close32(large.B0.norm(dim=0), 4 * one.B0.norm(dim=0))
        assert_close32(other.B0 @ other.A0, one.B0 @ one.A0)


@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize("mode", MODES)
def test_at_full_rank_nothing_is_left_of_the_weight(mode: str, power: float) -> None:
    for layer, update in updates_of(adapted(r=20, mode=mode, power=power), "default"):
        assert_close32(update.B0 @ update.A0, layer.get_base_layer().weight)


def test_kpm_takes_what_the_examples_need_least() -> None:
    x, change = inputs(), {}
    for mode in MODES:
        model = adapted(mode=mode)
        expected = model(x)
        with torch.no_grad():
            for _, update in updates_of(model, "default"):
                update.A.zero_()
        change[mode] = (model(x) - expected).square().mean().item()
    assert change["kpm"] < 0.05 * change["ipm"]


@pytest.mark.parametrize("mode", MODES)
def test_merging_and_export_compute_the_same(mode: str, tmp_path: Path) -> None:
    model = adapted(mode=mode, alpha=10.0)
    train(model)
    expected = model(inputs())
    assert export_lora(model, tmp_path / "lora") == dict.fromkeys(TARGETS, 2 * R)
    assert_close32(PeftModel.from_pretrained(tiny.TwoLayers(), tmp_path / "lora")(inputs()), expected)
    model.merge_adapter()
    assert_close32(model(inputs()), expected)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(inputs()), tiny.TwoLayers()(inputs()))


def test_trainable_count_and_rank_pattern() -> None:
    config = CorDA(r=R, target_modules=TARGETS, rank_pattern={"v": 2}, alpha=8.0)
    model = get_peft_model(tiny.TwoLayers(), config.calibrated(statistics()))
    assert model.get_nb_trainable_parameters()[0] == R * (32 + 20) + 2 * (20 + 36)
    assert [update.scale for _, update in updates_of(model, "default")] == [2.0, 4.0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "knowledge"}, "mode must be 'ipm' or 'kpm'"),
        ({"damping": 0.0}, "damping must be above 0"),
        ({"power": 2.0}, "power must be above 0 and at most 1"),
        ({"dropout": 0.1}, "no dropout"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CorDA(**options)
