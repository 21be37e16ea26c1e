"""LoRA-SB: the start from the first full update, with autograd and dense float64 decompositions as oracles."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from folklora import LoRASB, LoRAXS, Statistics, calibrate, export_lora, tiny
from folklora.adapters.host.layer import updates_of

EPS32 = torch.finfo(torch.float32).eps
TARGETS = ["q", "v"]
R, ETA = 4, 0.01


class Dropped(tiny.TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.5, self.training))


def inputs() -> Tensor:
    return torch.randn(5, 7, 32, generator=torch.Generator().manual_seed(2))


def goal() -> Tensor:
    return torch.randn(5, 7, 36, generator=torch.Generator().manual_seed(9))


def loss(model: nn.Module, rows: Any = slice(None)) -> Tensor:
    weight = next(model.parameters())
    return F.mse_loss(model(inputs()[rows].to(weight)), goal()[rows].to(weight))


def statistics(factor: float = 1.0, base: nn.Module | None = None) -> Statistics:
    batches = [{"rows": slice(0, 2)}, {"rows": slice(2, 5)}]
    return calibrate(
        base or tiny.TwoLayers(),
        batches,
        LoRASB.needs,
        target_modules=TARGETS,
        loss=lambda m, b: factor * loss(m, b["rows"]),
    )


def adapted(base: nn.Module | None = None, found: Statistics | None = None, **options: Any) -> PeftModel:
    config = LoRASB(**{"r": R, "eta": ETA, "target_modules": TARGETS} | options)
    return get_peft_model(base or tiny.TwoLayers(), config.calibrated(found or statistics()))


def full_gradient(model: nn.Module, name: str) -> Tensor:
    weight = model.get_submodule(name).weight
    return torch.autograd.grad((loss(model, slice(0, 2)) + loss(model, slice(2, 5))) / 2, weight)[0]


def assert_close32(actual: Tensor, expected: Tensor) -> None:
    # sums of at most 36 terms in each of a few layers
    tolerance = 100 * EPS32 * float(expected.detach().abs().max())
    torch.testing.assert_close(actual, expected.to(actual), rtol=0, atol=tolerance)


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (16.0, 4.0)])
def test_the_start_is_the_first_update_cut_to_rank_r(alpha: float | None, scale: float) -> None:
    model, base = adapted(alpha=alpha), tiny.TwoLayers()
    for layer, update in updates_of(model, "default"):
        step = -ETA * full_gradient(base, layer.name).sign().double()
        U, S, Vh = torch.linalg.svd(step, full_matrices=False)
        A, B, R0 = (value.detach().double() for value in (update.A, update.B, update.R))
        assert update.scale == scale
        delta = scale * B @ R0 @ A
        assert_close32(delta, (U[:, :R] * S[:R]) @ Vh[:R])
        assert_close32(update.factors().dense().double(), delta)
        assert_close32(B.T @ B, torch.eye(R))
        assert_close32(A @ A.T, torch.eye(R))
        assert torch.equal(R0, torch.diag(R0.diagonal()))
        assert_close32(R0.diagonal(), S[:R] / scale)
        assert (R0.diagonal() >= 0).all()
        assert (R0.diagonal().diff() <= 0).all()
        assert torch.equal(layer.get_base_layer().weight, base.get_submodule(layer.name).weight)


def test_the_start_descends() -> None:
    base, model = tiny.TwoLayers(), adapted(eta=1e-3)
    for layer, update in updates_of(model, "default"):
        delta, G = update.factors().dense().detach().double(), full_gradient(base, layer.name).double()
        assert (delta * G).sum() < 0
        # exactly so against the signs: the energy of what was kept
        against_signs = -update.R.detach().double().diagonal().square().sum() / 1e-3
        assert (delta * G.sign()).sum().item() == pytest.approx(against_signs.item(), rel=1e-4)
    assert not torch.allclose(model(inputs()), base(inputs()))
    assert not any(update.starts_at_base for _, update in updates_of(model, "default"))
    assert loss(model) < loss(base)


def test_a_step_on_r_is_the_full_gradient_projected() -> None:
    h, model = 0.1, adapted(tiny.TwoLayers().double()).double()
    # the base with the start written into its weights, whose full gradient counts
    dense = tiny.TwoLayers().double()
    with torch.no_grad():
        for layer, update in updates_of(model, "default"):
            dense.get_submodule(layer.name).weight += update.factors().dense()
    gradients = {layer.name: full_gradient(dense, layer.name) for layer, _ in updates_of(model, "default")}
    before = {layer.name: update.factors().dense().detach() for layer, update in updates_of(model, "default")}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=h)
    ((loss(model, slice(0, 2)) + loss(model, slice(2, 5))) / 2).backward()
    optimizer.step()
    for layer, update in updates_of(model, "default"):
        A, B = update.A.detach(), update.B.detach()
        expected = -h * B @ B.T @ gradients[layer.name] @ A.T @ A
        moved = update.factors().dense().detach() - before[layer.name]
        torch.testing.assert_close(moved, expected, rtol=0, atol=1e-8 * float(expected.abs().max()))
        assert expected.abs().max() > 1e-5


def test_the_losss_scale_and_dropout_do_not_matter() -> None:
    first, second = adapted(), adapted(found=statistics(0.25))
    noisy = adapted(found=statistics(base=Dropped().train()))
    for (_, one), (_, two), (_, three) in zip(*(updates_of(m, "default") for m in (first, second, noisy)), strict=True):
        for key in ("A", "B", "R"):
            assert torch.equal(getattr(one, key), getattr(two, key))
            assert torch.equal(getattr(one, key), getattr(three, key))


def test_eta_scales_the_start_and_nothing_else() -> None:
    small, large = adapted(eta=2.0**-20), adapted(eta=2.0**-10)
    for (_, one), (_, two) in zip(updates_of(small, "default"), updates_of(large, "default"), strict=True):
        assert torch.equal(one.A, two.A)
        assert torch.equal(one.B, two.B)
        assert torch.equal(1024 * one.R, two.R)


def test_units_without_a_gradient_get_no_update() -> None:
    found = {name: {"gradient": kinds["gradient"].clone()} for name, kinds in statistics().items()}
    found["q"]["gradient"][:7] = 0
    model = adapted(found=Statistics(found))
    update = next(update for layer, update in updates_of(model, "default") if layer.name == "q")
    delta = update.factors().dense().detach()
    assert delta[:7].abs().max() <= 10 * EPS32 * delta.abs().max()
    assert delta[7:].abs().max() > ETA / 10


def test_only_r_squared_numbers_are_trained_and_it_computes_what_lora_xs_does() -> None:
    model = adapted()
    assert model.get_nb_trainable_parameters()[0] == 2 * R**2
    before = [(update.A.clone(), update.B.clone(), update.R.clone()) for _, update in updates_of(model, "default")]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    twin = get_peft_model(tiny.TwoLayers(), LoRAXS(r=R, target_modules=TARGETS))
    pairs = zip(before, updates_of(model, "default"), updates_of(twin, "default"), strict=True)
    with torch.no_grad():
        for (A, B, R0), (_, update), (_, other) in pairs:
            assert torch.equal(update.A, A)
            assert torch.equal(update.B, B)
            assert (update.R - R0).abs().max() > 0.01
            for key in ("A", "B", "R"):
                getattr(other, key).copy_(getattr(update, key))
    assert torch.equal(model(inputs()), twin(inputs()))


def test_merged_exported_and_loaded_it_computes_the_same(tmp_path: Path) -> None:
    model = adapted()
    expected = model(inputs())
    model.save_pretrained(tmp_path / "saved")
    # with no gradient at hand
    assert torch.equal(PeftModel.from_pretrained(tiny.TwoLayers(), tmp_path / "saved")(inputs()), expected)
    assert export_lora(model, tmp_path / "lora") == dict.fromkeys(TARGETS, R)
    assert_close32(PeftModel.from_pretrained(tiny.TwoLayers(), tmp_path / "lora")(inputs()), expected)
    model.merge_adapter()
    assert_close32(model(inputs()), expected)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(inputs()), tiny.TwoLayers()(inputs()))


def classifier(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 8))


def fit(model: nn.Module, x: Tensor, y: Tensor, steps: int, rate: float) -> nn.Module:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    for step in range(steps):
        rows = torch.arange(128 * step, 128 * (step + 1)) % len(x)
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return model


def test_it_learns_more_than_lora_xs_at_the_same_size() -> None:
    """A classifier that was trained on a random teacher is adapted to one that differs from it."""
    teacher = classifier(100)
    x, unseen = torch.randn(8000, 32), torch.randn(4000, 32)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter *= 2
        old = teacher(x).argmax(1)
        for parameter in teacher.parameters():
            parameter += 0.6 * parameter.std() * torch.randn_like(parameter)
        new, answers = teacher(x).argmax(1), teacher(unseen).argmax(1)
    base = fit(classifier(0), x, old, 1000, 2e-3)

    def right(model: nn.Module) -> float:
        return (model(unseen).argmax(1) == answers).double().mean().item()

    batches = zip(x[:1280].split(128), new[:1280].split(128), strict=True)
    options: dict[str, Any] = {"r": 8, "target_modules": ["0", "2"]}
    silver = LoRASB(eta=1e-3, **options)
    found = calibrate(
        base, batches, silver.needs, target_modules=silver, loss=lambda model, b: F.cross_entropy(model(b[0]), b[1])
    )
    scores = {}
    for config in (LoRAXS(**options), silver.calibrated(found)):
        model = get_peft_model(copy.deepcopy(base), config)
        assert model.get_nb_trainable_parameters()[0] == 2 * 8**2
        scores[config.method] = right(fit(model, x, new, 300, 4e-3))
    # 4000 answers: the standard error of a share is below 0.8 %
    assert right(base) + 0.04 < scores["lora-xs"] + 0.01 < scores["lora-sb"], (right(base), scores)


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match="eta must be above 0"):
        LoRASB(eta=0.0)
    with pytest.raises(ValueError, match=r"(?s)rank 21 is above 20.*'q'.*'v'"):
        adapted(r=21)
