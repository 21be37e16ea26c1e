"""The layer over every kind of base layer: what it computes, what it leaves to the base, dropout."""

from __future__ import annotations

from typing import Any

import accelerate.hooks
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from folklora import LoRA, MixDA, check, methods, tiny
from folklora.adapters.base import AdapterConfig
from folklora.adapters.host.kinds import kind_of
from folklora.adapters.host.layer import layers_of

DENSE = {m.name: m.factory for m in methods("adapters") if (m.name, "merge") not in check.EXCEPTIONS}


class One(nn.Module):
    """A model that is one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def _over(layer: nn.Module, config: AdapterConfig, *inputs: Tensor) -> PeftModel:
    config.target_modules = ["layer"]
    model = One(layer)
    return tiny.moved(get_peft_model(model, tiny.calibrated(model, config, inputs))).eval()


def _small(method: str, **options: Any) -> AdapterConfig:
    rank = {"r": 2} if "r" in DENSE[method].__dataclass_fields__ else {}
    return DENSE[method](**rank, **options)


def _gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32, n_positions=16, tie_word_embeddings=False)
    return GPT2LMHeadModel(config).eval()


LAYERS = {
    "linear without bias": (lambda: nn.Linear(12, 8, bias=False), lambda: torch.randn(2, 3, 12)),
    "one row": (lambda: nn.Linear(12, 8), lambda: torch.randn(12)),
    "embedding": (lambda: nn.Embedding(20, 8), lambda: torch.randint(20, (2, 5))),
    "scaled embedding": (
        lambda: Gemma3TextScaledWordEmbedding(20, 8, padding_idx=0, embed_scale=3.0),
        lambda: torch.randint(20, (2, 5)),
    ),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), lambda: torch.randn(2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding=(1, 0), dilation=2), lambda: torch.randn(2, 4, 9, 8)),
    "conv2d same": (lambda: nn.Conv2d(4, 6, 3, padding="same"), lambda: torch.randn(2, 4, 6, 5)),
    "conv2d reflected": (
        lambda: nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="reflect"),
        lambda: torch.randn(2, 4, 6, 5),
    ),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), lambda: torch.randn(2, 4, 3, 4, 3)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("method", DENSE)
def test_forward_is_the_merged_layer(method: str, kind: str) -> None:
    torch.manual_seed(1)
    make, inputs = LAYERS[kind]
    layer, x = make(), inputs()
    if kind_of(layer, kind).name not in DENSE[method].layer_kinds:
        pytest.skip(f"{method} does not adapt {kind_of(layer, kind).name} layers")
    base = layer(x)
    model = _over(layer, _small(method), x)
    adapted = model(x)
    model.merge_adapter()
    tiny.close(adapted, model(x), 1e-5, "the layer adapted and merged")
    assert not torch.allclose(adapted, base)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x), base)


@pytest.mark.parametrize("method", DENSE)
def test_forward_is_the_merged_gpt2(method: str) -> None:
    tokens = torch.randint(32, (2, 6), generator=torch.Generator().manual_seed(0))
    targets = ["c_attn", "c_proj", "c_fc", "lm_head"]
    if "embedding" in DENSE[method].layer_kinds:
        targets.append("wte")
    config = tiny.calibrated(_gpt2(), _small(method, target_modules=targets), [{"input_ids": tokens}])
    model = tiny.moved(get_peft_model(_gpt2(), config)).eval()
    adapted = model(input_ids=tokens).logits
    start = _gpt2()(input_ids=tokens).logits
    merged = model.merge_and_unload()
    tiny.close(adapted, merged(input_ids=tokens).logits, 1e-5, "the logits adapted and merged")
    assert not torch.allclose(adapted, start)
    assert not list(layers_of(merged))


@pytest.mark.parametrize("kind", ["linear without bias", "embedding", "conv2d"])
def test_rows_have_their_own_adapters_on_every_kind(kind: str) -> None:
    torch.manual_seed(1)
    make, inputs = LAYERS[kind]
    model = _over(make(), LoRA(r=2))
    model.add_adapter("other", LoRA(r=3, target_modules=["layer"]))
    tiny.moved(model, "other")
    x = inputs()
    separate = []
    for name in ("other", "default"):
        model.set_adapter(name)
        separate.append(model(x))
    mixed = model(x, adapter_names=["other", "default"])
    tiny.close(mixed, torch.stack([separate[0][0], separate[1][1]]), 1e-6, "mixed and separate rows")


def test_rows_may_be_repeated_in_runs_as_beams_are() -> None:
    torch.manual_seed(1)
    model = _over(nn.Linear(6, 5), LoRA(r=2))
    x = torch.randn(2, 3, 6)
    expected = model(x, adapter_names=["default", "__base__"])
    beams = model(x.repeat_interleave(4, dim=0), adapter_names=["default", "__base__"])
    assert torch.allclose(beams[::4], expected, atol=1e-6)
    assert torch.allclose(beams[3::4], expected, atol=1e-6)


def test_names_that_do_not_fit_the_batch_are_refused() -> None:
    model = _over(nn.Linear(6, 5), LoRA(r=2))
    with pytest.raises(ValueError, match=r"adapter_names has 2 entries, and the batch has 3 rows"):
        model(torch.randn(3, 6), adapter_names=["default", "__base__"])


def test_hooks_on_the_base_layer_still_run() -> None:
    seen = []
    base = nn.Linear(6, 5)
    model = _over(base, LoRA(r=2))
    x = torch.randn(2, 6)
    plain = model(x)
    handles = [
        base.register_forward_hook(lambda module, args, output: output + 1),
        base.register_forward_pre_hook(lambda module, args: seen.append("before")),
        base.register_full_backward_hook(lambda module, inputs, outputs: seen.append("backward")),
    ]
    assert torch.allclose(model(x), plain + 1, atol=1e-6)
    model(x.requires_grad_()).sum().backward()
    assert seen == ["before", "before", "backward"]
    for handle in handles[:2]:
        handle.remove()
    assert torch.allclose(model(x), plain, atol=1e-6)


def test_a_forward_put_in_place_of_the_base_layers_still_runs() -> None:
    class Double(accelerate.hooks.ModelHook):
        # what offloading does with weights, this does with the output
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return 2 * output

    base = nn.Linear(6, 5)
    x = torch.randn(2, 6)
    start = base(x)
    accelerate.hooks.add_hook_to_module(base, Double())
    assert torch.allclose(get_peft_model(One(base), LoRA(target_modules=["layer"], r=2))(x), 2 * start)


def test_a_parametrised_base_layer_is_not_bypassed() -> None:
    base = torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 5))
    x = torch.randn(2, 6)
    start = base(x)
    model = get_peft_model(One(base), LoRA(target_modules=["layer"], r=2))
    assert torch.allclose(model(x), start)
    with pytest.raises(ValueError, match="computes its weight from other parameters"):
        model.merge_adapter()


def _identity(p: float, sign: float = 1.0) -> tuple[LoRA, Any]:
    """A LoRA on a 40 x 40 layer whose update is ± identity."""

    def fill(model: PeftModel, name: str) -> None:
        update = next(layers_of(model)).folklora_updates[name]
        update.A.data, update.B.data = torch.eye(40), sign * torch.eye(40)

    return LoRA(r=40, alpha=40, dropout=p, target_modules=["layer"]), fill


def _ghost(*wanted: tuple[float, float]) -> PeftModel:
    """A layer of weight 0 whose output is the sum of its dropped-out inputs times (p, sign)."""
    base = nn.Linear(40, 40, bias=False)
    nn.init.zeros_(base.weight)
    model = None
    for index, (p, sign) in enumerate(wanted):
        config, fill = _identity(p, sign)
        if model is None:
            model = get_peft_model(One(base), config, adapter_name="a0")
        else:
            model.add_adapter(f"a{index}", config)
        fill(model, f"a{index}")
    model.base_model.set_adapter([f"a{index}" for index in range(len(wanted))])
    return model.train()


def test_adapters_with_equal_dropout_lose_the_same_elements() -> None:
    torch.manual_seed(2)
    x = torch.randn(50, 40)
    assert torch.equal(_ghost((0.3, 1.0), (0.3, -1.0))(x), torch.zeros(50, 40))


def test_dropout_keeps_the_mean_and_is_off_in_evaluation() -> None:
    torch.manual_seed(2)
    model, x = _ghost((0.3, 1.0)), torch.ones(500, 40)
    y = model(x)
    deviation = (0.3 / 0.7 / y.numel()) ** 0.5
    assert abs(float(y.mean()) - 1) < 4 * deviation
    assert float((y == 0).float().mean()) == pytest.approx(0.3, abs=4 * (0.21 / y.numel()) ** 0.5)
    assert torch.equal(model.eval()(x), x)


def test_dropout_draws_anew_each_pass() -> None:
    torch.manual_seed(2)
    model, x = _ghost((0.5, 1.0)), torch.ones(5, 40)
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize("target", ["q", "v"])
def test_a_second_adapter_is_in_the_models_mode(target: str) -> None:
    # two passes drop the same of 64 hidden values by a chance of 2^-64
    wide = {"reduction": 2, "gate_hidden": 64, "gate_dropout": 0.5}
    model = get_peft_model(tiny.TwoLayers(), MixDA(**wide, target_modules=["q"]))
    assert all(layer.training for layer in layers_of(model))
    model.eval().add_adapter("second", MixDA(**wide, target_modules=[target]))
    assert not any(module.training for module in model.modules())
    tiny.moved(model, "second")
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    tiny.same(model(x), model(x), "two passes in evaluation")
    assert not torch.equal(model.train()(x), model(x))


def test_a_second_adapter_without_dropout_is_not_dropped() -> None:
    torch.manual_seed(2)
    y = _ghost((0.5, 1.0), (0.0, 1.0))(torch.ones(50, 40))
    assert {float(value) for value in y.unique()} == {1.0, 3.0}


def test_merging_one_of_two_adapters_and_then_the_other() -> None:
    torch.manual_seed(3)
    model = _over(nn.Linear(6, 5), LoRA(r=2))
    model.add_adapter("other", LoRA(r=3, target_modules=["layer"]))
    tiny.moved(model, "other")
    x, weight = torch.randn(2, 6), next(layers_of(model)).base_layer.weight
    model.base_model.set_adapter(["default", "other"])
    both = model(x)
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging other"):
        model.merge_adapter(["other"])
    tiny.close(model(x), both, 1e-5, "both adapters merged one by one")
    model.unmerge_adapter()
    assert next(layers_of(model)).base_layer.weight is weight
    assert torch.allclose(model(x), both)


def test_a_merge_that_is_not_finite_is_refused_and_changes_nothing() -> None:
    model = _over(nn.Linear(6, 5), LoRA(r=2))
    layer = next(layers_of(model))
    weight = layer.base_layer.weight.clone()
    layer.folklora_updates["default"].B.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="merging default into layer 'layer' gives values that are not finite"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, weight)
    assert not layer.merged


def test_mixed_rows_are_refused_while_merged() -> None:
    model = _over(nn.Linear(6, 5), LoRA(r=2))
    model.merge_adapter()
    with pytest.raises(ValueError, match="while default is merged"):
        model(torch.randn(1, 6), adapter_names=["default"])
