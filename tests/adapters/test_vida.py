"""ViDA: the start, both scales against dense sums, scales of rows, merging, where it goes."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from folklora import LoRA, ViDA, export_lora, tiny
from folklora.adapters.host.layer import FolkloraLayer, layers_of, updates_of
from folklora.adapters.vida import ViDAUpdate, scaled

EPS64, EPS32 = torch.finfo(torch.float64).eps, torch.finfo(torch.float32).eps
IN, OUT, LOW, HIGH = 20, 16, 2, 6


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.Linear(IN, OUT), nn.Linear(OUT, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def adapted(moved: bool = True, **options: Any) -> PeftModel:
    torch.manual_seed(1)
    model = get_peft_model(net(), ViDA(**{"r": HIGH, "low_rank": LOW, "target_modules": ["attention"]} | options))
    if moved:
        with torch.no_grad():
            for value in model.parameters():
                if value.requires_grad:
                    value.copy_(torch.randn_like(value))
    return model


def the_layer(model: nn.Module) -> tuple[FolkloraLayer, ViDAUpdate]:
    return next(updates_of(model, "default"))


def inputs(rows: int = 4) -> Tensor:
    return torch.randn(rows, 5, IN, generator=torch.Generator().manual_seed(2))


def dense(update: ViDAUpdate, low: float, high: float) -> Tensor:
    A, B = update.A.detach().double(), update.B.detach().double()
    return low * B[:, :LOW] @ A[:LOW] + high * B[:, LOW:] @ A[LOW:]


def test_the_first_pass_is_the_base() -> None:
    model, x = adapted(moved=False), inputs()
    for scales in (contextlib.nullcontext(), scaled(model, 0.3, 1.7)):
        with scales:
            torch.testing.assert_close(model(x), net()(x), rtol=0, atol=4 * IN * EPS32)
    _, update = the_layer(model)
    assert not update.B.any()


def test_each_rank_has_its_own_start() -> None:
    update = ViDA(r=8, low_rank=2).update(torch.empty(16, 20_000))
    assert update.A[:2].std().item() == pytest.approx(1 / 4, rel=0.02)
    assert update.A[2:].std().item() == pytest.approx(1 / 64, rel=0.02)
    even = ViDA(r=8, low_rank=2, start="kaiming").update(torch.empty(16, 400))
    assert even.A.abs().max() <= 1 / 20
    assert even.A[:2].std().item() == pytest.approx(1 / 20 / 3**0.5, rel=0.05)


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (0.4, 1.6), (1.3, 0.7), (0.0, 2.0)])
def test_forward_is_the_dense_sum(low: float, high: float) -> None:
    model = adapted()
    layer, update = the_layer(model.double())
    x = inputs().double()
    expected = net().double().attention(x) + x @ dense(update, low, high).T
    with scaled(model, low, high):
        found = layer(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=8 * (IN + HIGH) * 40 * EPS64)
    if (low, high) == (1.0, 1.0):
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=8 * (IN + HIGH) * 40 * EPS64)


def test_both_scales_change_the_output() -> None:
    model, x = adapted(), inputs()
    found = {}
    for name, scales in {"one": (1.0, 1.0), "low": (1.5, 1.0), "high": (1.0, 1.5)}.items():
        with scaled(model, *scales):
            found[name] = the_layer(model)[0](x)
    assert (found["low"] - found["one"]).abs().min(-1).values.max() > 0.01
    assert (found["high"] - found["one"]).abs().min(-1).values.max() > 0.01
    assert not torch.allclose(found["low"], found["high"], atol=0.01)


def test_rows_with_scales_of_their_own_are_separate_passes() -> None:
    model, x = adapted(), inputs()
    low = torch.tensor([0.0, 0.5, 1.0, 1.8])
    with scaled(model, low, 2 - low):
        together, gradient = model(x), torch.autograd.grad(model(x).square().sum(), the_layer(model)[1].A)[0]
    apart, total = [], torch.zeros_like(gradient)
    for row, value in zip(x, low.tolist(), strict=True):
        with scaled(model, value, 2 - value):
            apart.append(model(row[None]))
            total += torch.autograd.grad(model(row[None]).square().sum(), the_layer(model)[1].A)[0]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradient, total, rtol=1e-4, atol=1e-4 * float(total.abs().max()))


def test_scales_end_with_their_block() -> None:
    model, x = adapted(), inputs()
    before = model(x)
    with scaled(model, 0.0, 0.0):
        assert not torch.allclose(model(x), before)
        with scaled(model, 2.0, 0.5):
            assert not torch.allclose(model(x), net()(x))
        torch.testing.assert_close(model(x), net()(x), rtol=0, atol=4 * IN * EPS32)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("scales", [None, (0.4, 1.6)])
def test_merged_weight_equals_forward_at_fixed_scales(scales: tuple[float, float] | None) -> None:
    model, x = adapted(), inputs()
    layer, update = the_layer(model)
    with scaled(model, *scales) if scales else contextlib.nullcontext():
        before = model(x)
        model.merge_adapter()
    expected = net().attention.weight.double() + dense(update, *(scales or (1.0, 1.0)))
    torch.testing.assert_close(layer.get_base_layer().weight.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(layer.get_base_layer().weight, net().attention.weight)


def test_export_takes_the_scales_of_its_block(tmp_path: Path) -> None:
    model = tiny.moved(tiny.adapted(ViDA(r=4, low_rank=2, target_modules=tiny.TARGETS))).eval()
    with scaled(model, 0.4, 1.6):
        expected = tiny.logits(model)
        export_lora(model, tmp_path / "lora")
    stock = PeftModel.from_pretrained(tiny.llama(), tmp_path / "lora")
    assert not list(layers_of(stock))
    torch.testing.assert_close(tiny.logits(stock), expected, rtol=1e-5, atol=1e-5)


def test_scales_of_rows_have_no_single_weight() -> None:
    model = adapted()
    rows = torch.ones(4)
    with scaled(model, rows, rows), pytest.raises(ValueError, match="scales of each row"):
        model.merge_adapter()


def test_parameters_are_counted() -> None:
    model = adapted()
    count = sum(value.numel() for value in model.parameters() if value.requires_grad)
    assert count == (LOW + HIGH) * (IN + OUT)


def test_linear_layers_inside_attention_are_taken_where_none_are_named() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    model = hf.ViTForImageClassification(hf.ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=4))
    expected = {
        name for name, part in model.named_modules() if isinstance(part, nn.Linear) and ".attention." in f".{name}."
    }
    assert len(expected) == 8
    model = get_peft_model(model, ViDA(r=4))
    assert {layer.name for layer in layers_of(model)} == expected
    model.add_adapter("second", ViDA(r=4))
    assert {layer.name for layer, _ in updates_of(model, "second")} == expected
    with pytest.raises(ValueError, match="inside attention: name the layers"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), ViDA(r=2))


def test_experts_hear_the_scales() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = hf.MixtralConfig(**sizes, vocab_size=tiny.VOCABULARY, intermediate_size=24, num_local_experts=4)
    model = get_peft_model(hf.MixtralForCausalLM(config), ViDA(r=4, target_parameters=["experts.down_proj"]))
    tiny.moved(model).eval()
    plain = tiny.logits(model)
    with scaled(model, 0.0, 0.0):
        silent = tiny.logits(model)
    with model.disable_adapter():
        torch.testing.assert_close(silent, tiny.logits(model), rtol=0, atol=1e-5)
    assert not torch.allclose(silent, plain, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "rank r must be"),
        ({"r": 4, "low_rank": 5}, "from 1 to the high rank r = 4"),
        ({"low_rank": 0}, "low_rank must be"),
        ({"start": "zero"}, "start must be"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViDA(**options)


def test_scales_are_checked() -> None:
    model = adapted()
    with pytest.raises(ValueError, match=r"shapes \[4\] and \[\]"), scaled(model, torch.ones(4), 1.0):
        pass
    other = get_peft_model(net(), LoRA(r=2, target_modules=["attention"]))
    with pytest.raises(ValueError, match="carries no ViDA"), scaled(other, 1.0, 1.0):
        pass
    rows = torch.ones(3)
    with (
        scaled(model, rows, rows),
        pytest.raises(ValueError, match="list of scales has 3 entries, and the batch of 4 rows"),
    ):
        model(inputs(4))
    with pytest.raises(ValueError, match="rank 64 is above 16"):
        adapted(r=64)
