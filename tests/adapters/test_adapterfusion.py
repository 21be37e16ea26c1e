"""AdapterFusion: its attention against torch's own over the adapters' outputs, its start, penalty and temperature."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from folklora import AdapterFusion, check, penalty, tiny
from folklora.adapters.adapterfusion import AdapterFusionUpdate
from folklora.adapters.host.layer import layers_of, updates_of

D, LAYERS = 32, 4
EPS32 = torch.finfo(torch.float32).eps


def fused(sources: dict[str, str], dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    return tiny.adapted(AdapterFusion(sources=sources, **options), dtype=dtype).to(dtype).eval()


def updates(model: PeftModel) -> list[AdapterFusionUpdate]:
    return [update for _, update in updates_of(model, "default")]


def inputs(update: AdapterFusionUpdate) -> tuple[Tensor, Tensor]:
    """A layer's input and output, of the update's precision."""
    generator = torch.Generator().manual_seed(1)
    columns = update.branches.shape[1]
    dtype = update.query.weight.dtype
    return torch.randn(2, 5, columns, generator=generator).to(dtype), torch.randn(2, 5, D, generator=generator).to(
        dtype
    )


@torch.no_grad()
def outputs(update: AdapterFusionUpdate, x: Tensor, y: Tensor, folders: dict[str, str], output_of: Any) -> Tensor:
    """O [..., N, d]."""
    return torch.stack([output_of(folder, update.branches.layer, x, y) for folder in folders.values()], dim=-2)


def attended(update: AdapterFusionUpdate, y: Tensor, outs: Tensor) -> Tensor:
    """torch's own attention of each token over its N outputs."""
    q, K = update.query(y).unsqueeze(-2), update.key(outs)
    V = outs if update.value is None else update.value(outs)
    return F.scaled_dot_product_attention(q, K, V, scale=update.config.scale).squeeze(-2)


@pytest.mark.parametrize("fusion", ["dynamic", "static"])
def test_it_is_torchs_attention_over_the_adapters_outputs(
    fusion: str, bottlenecks: dict[str, str], output_of: Any, by_hand: Any
) -> None:
    model = tiny.moved(fused(bottlenecks, torch.float64, fusion=fusion, scale=1.7)).eval()
    own = {layer.name: update for layer, update in updates_of(model, "default")}
    assert len(own) == LAYERS

    @torch.no_grad()
    def added(layer: str, x: Tensor, y: Tensor) -> Tensor:
        return attended(own[layer], y, outputs(own[layer], x, y, bottlenecks, output_of))

    # Compacter's matrices were rounded to float32 once
    torch.testing.assert_close(tiny.logits(model), by_hand(added, list(own)), rtol=0, atol=1e-5)


def test_of_one_source_it_adds_the_value_of_its_output_whatever_the_scores(bottlenecks: dict[str, str]) -> None:
    folder = bottlenecks["art"]
    model = fused({"art": folder}, torch.float64)
    for update in updates(model):
        torch.nn.init.normal_(update.query.weight)
        torch.nn.init.normal_(update.key.weight)
        update.value.weight.data = torch.eye(D, dtype=torch.float64)
    alone = PeftModel.from_pretrained(tiny.llama(dtype=torch.float64), folder).double()
    torch.testing.assert_close(tiny.logits(model), tiny.logits(alone), rtol=0, atol=1e-10)


def test_of_equal_sources_the_attention_makes_no_difference(bottlenecks: dict[str, str]) -> None:
    model = fused(dict.fromkeys("abc", bottlenecks["bar"]), torch.float64)
    expected = tiny.logits(model)
    for update in updates(model):
        torch.nn.init.normal_(update.query.weight)
        torch.nn.init.normal_(update.key.weight)
    torch.testing.assert_close(tiny.logits(model), expected, rtol=0, atol=1e-10)


def test_the_attention_is_a_distribution_and_flat_without_query_and_key(bottlenecks: dict[str, str]) -> None:
    update = updates(tiny.moved(fused(bottlenecks)))[0].eval()
    x, y = inputs(update)
    a = update.attention(x, y)
    assert a.shape == (2, 5, 3)
    assert a.min() >= 0
    torch.testing.assert_close(a.sum(-1), torch.ones(2, 5), rtol=0, atol=4 * EPS32)
    assert float(a.detach().std()) > 0.01
    for part in (update.query, update.key):
        for parameter in part.parameters():
            torch.nn.init.zeros_(parameter)
    assert torch.equal(update.attention(x, y), torch.full((2, 5, 3), 1 / 3))


def test_at_the_start_it_is_nearly_a_convex_mixture_of_the_outputs(bottlenecks: dict[str, str], output_of: Any) -> None:
    update = updates(fused(bottlenecks, torch.float64))[0]
    x, y = inputs(update)
    outs = outputs(update, x, y, bottlenecks, output_of)
    mixture = (update.attention(x, y).unsqueeze(-1) * outs).sum(-2)
    # 31 entries of 1e-6 a row, and Compacter's float32
    torch.testing.assert_close(update.function(x, y), mixture, rtol=0, atol=32e-6 * float(outs.abs().max()))
    assert 0.019 < float(update.query.weight.detach().std()) < 0.021
    assert float(update.query.bias.abs().max()) == float(update.key.bias.abs().max()) == 0


def test_as_many_parameters_as_the_paper_counts(bottlenecks: dict[str, str]) -> None:
    shape = (768, 3072)
    assert 12 * AdapterFusion(sources={"a": "x"}).trainable_count(shape) == 21_252_096
    assert AdapterFusion(sources={"a": "x"}, fusion="static").trainable_count(shape) == 2 * 768**2 + 2 * 768
    assert fused(bottlenecks).get_nb_trainable_parameters()[0] == LAYERS * (3 * D**2 + 2 * D)


def test_attention_goes_with_the_sources_in_any_order(bottlenecks: dict[str, str]) -> None:
    model = tiny.moved(fused(bottlenecks)).eval()
    renamed = tiny.moved(fused(dict(zip("xyz", reversed(bottlenecks.values()), strict=True)))).eval()
    one, other = updates(model)[0], updates(renamed)[0]
    x, y = inputs(one)
    torch.testing.assert_close(other.attention(x, y), one.attention(x, y).flip(-1), rtol=0, atol=50 * EPS32)
    torch.testing.assert_close(tiny.logits(renamed), tiny.logits(model), rtol=0, atol=1e-4)


def test_the_regulariser_keeps_values_near_the_identity(bottlenecks: dict[str, str]) -> None:
    model = fused(bottlenecks)
    assert float(penalty(model)) == pytest.approx(LAYERS * 0.01 * (D**2 - D) * 1e-12, rel=1e-5)
    tiny.moved(model)
    expected = sum(0.01 * (torch.eye(D) - update.value.weight).pow(2).sum() for update in updates(model))
    assert float(penalty(model)) == pytest.approx(float(expected.detach()), rel=1e-5)
    for options in ({"fusion": "static"}, {"value_penalty": 0.0}):
        assert float(penalty(fused(bottlenecks, **options))) == 0


def test_only_the_attention_and_the_head_are_trained(bottlenecks: dict[str, str]) -> None:
    model = fused(bottlenecks, modules_to_save=["lm_head"]).train()
    tiny.loss(model).backward()
    found = {name.rpartition(".default.")[2] for name in tiny.gradients(model)}
    assert found == {"query.weight", "query.bias", "key.weight", "key.bias", "value.weight", "weight"}


def test_scores_are_dropped_in_training_alone(bottlenecks: dict[str, str]) -> None:
    update = updates(tiny.moved(fused(bottlenecks, score_dropout=0.5)))[0]
    x, y = inputs(update)
    torch.manual_seed(0)
    one, two = update.train().attention(x, y), update.attention(x, y)
    assert not torch.allclose(one, two)
    update.eval()
    assert torch.equal(update.attention(x, y), update.attention(x, y))


def test_the_temperature_falls_by_steps_and_is_saved(bottlenecks: dict[str, str], tmp_path: Path) -> None:
    model = fused(bottlenecks, start_temperature=50.0, score_dropout=0.0)
    update = updates(model)[0]
    x, y = inputs(update)
    hot = update.attention(x, y)
    assert float(update.temperature) == 50
    tiny.train(model)
    assert float(update.temperature) == pytest.approx(50 - 3 * 0.05)
    model.save_pretrained(tmp_path)
    assert torch.equal(updates(PeftModel.from_pretrained(tiny.llama(), tmp_path))[0].temperature, update.temperature)
    for _ in range(1000):
        update.after_step()
    assert float(update.temperature) == 1
    tiny.moved(model)
    assert update.eval().attention(x, y).std() > hot.std()


@pytest.mark.parametrize("start_temperature", [1.0, 50.0])
def test_a_saved_run_goes_on_as_if_it_had_not_stopped(
    start_temperature: float, bottlenecks: dict[str, str], tmp_path: Path
) -> None:
    model = fused(bottlenecks, start_temperature=start_temperature)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    tiny.loss(model.train()).backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {name.rpartition(".branches.")[2] for name in saved if ".branches." in name} == {"lengths"}
    resumed = PeftModel.from_pretrained(tiny.llama(), tmp_path, is_trainable=True).train()
    again = torch.optim.AdamW([p for p in resumed.parameters() if p.requires_grad], lr=1e-3)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, its in ((model, optimizer), (resumed, again)):
        torch.manual_seed(7)
        its.zero_grad()
        tiny.loss(one).backward()
        its.step()
    assert torch.equal(tiny.logits(resumed), tiny.logits(model))


def test_over_loras_it_attends_over_their_outputs(loras: dict[str, str]) -> None:
    model = tiny.moved(fused(loras, torch.float64)).eval()
    single = [PeftModel.from_pretrained(tiny.llama(dtype=torch.float64), folder).double() for folder in loras.values()]
    for layer, update in updates_of(model, "default"):
        x = torch.randn(2, 5, update.branches.shape[1], dtype=torch.float64)
        parts = [one.get_submodule(f"base_model.model.{layer.name}") for one in single]
        with torch.no_grad():
            y = layer.get_base_layer()(x)
            outs = torch.stack([part(x) - y for part in parts], dim=-2)
            torch.testing.assert_close(layer(x), y + attended(update, y, outs), rtol=0, atol=1e-6)
    assert any(layer.name.endswith("q_proj") for layer in layers_of(model))
    for name in ("save", "frozen", "rows", "mixing"):
        assert check.run_check(AdapterFusion(sources=loras, target_modules=["down_proj"]), name).outcome == "passed"


def test_tokens_learn_to_read_the_source_that_helps_them(bottlenecks: dict[str, str]) -> None:
    teacher = PeftModel.from_pretrained(tiny.llama(), bottlenecks["bar"])
    model, expected = fused(bottlenecks), tiny.logits(teacher)
    start = float((tiny.logits(model) - expected).square().mean())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.0)
    for _ in range(60):
        loss = (model(**tiny.batch()).logits - expected).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.05 * start


def test_options_that_do_not_fit_are_refused() -> None:
    for options, words in (
        ({"fusion": "both"}, "dynamic or static"),
        ({"score_dropout": 1.0}, "score_dropout must be"),
        ({"start_temperature": 0.5}, "start_temperature at least 1"),
        ({"rank_pattern": {"q": 2}}, "stay as they were trained"),
    ):
        with pytest.raises(ValueError, match=words):
            AdapterFusion(sources={"a": "x"}, **options)
