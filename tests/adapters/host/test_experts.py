"""Adapters on mixture-of-experts weights in three dimensions: every forward, both layouts, against dense sums."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import folklora
from folklora import AMLoRA, CorDA, KaSA, LoRA, PiSSA, SVFit, check, methods, tiny
from folklora.adapters.host.experts import ExpertsLayer
from folklora.adapters.host.export import export_lora
from folklora.adapters.host.layer import layers_of
from folklora.adapters.host.stacks import call_with
from folklora.adapters.lora import LoRAUpdate

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
SMALL = {"vocab_size": tiny.VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2, "use_cache": False}


def _mixtral(**options: object) -> nn.Module:
    return hf.MixtralForCausalLM(hf.MixtralConfig(**SMALL, intermediate_size=24, num_local_experts=4, **options))


def _qwen3(**options: object) -> nn.Module:
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "intermediate_size": 24}
    return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**SMALL, **sizes, **options))


def _gpt_oss(**options: object) -> nn.Module:
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24}
    return hf.GptOssForCausalLM(hf.GptOssConfig(**SMALL, **sizes, **options))


def _llama4(**options: object) -> nn.Module:
    sizes = {"num_local_experts": 4, "intermediate_size": 24, "intermediate_size_mlp": 24}
    return hf.Llama4ForCausalLM(hf.Llama4TextConfig(**SMALL, **sizes, **options))


# the first two keep [experts, out, in], the others [experts, in, out]
MODELS = {"mixtral": _mixtral, "qwen3-moe": _qwen3, "gpt-oss": _gpt_oss, "llama4": _llama4}
FORWARDS = [(name, way) for name in list(MODELS)[:3] for way in ("eager", "batched_mm", "grouped_mm")]
METHODS = [LoRA(r=3), KaSA(r=3), PiSSA(r=3)]


def _base(name: str, forward: str | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    if forward is not None:
        model.set_experts_implementation(forward)
    return model


def _adapted(name: str, config: folklora.AdapterConfig, forward: str | None = None) -> PeftModel:
    config = copy.deepcopy(config)
    config.target_parameters = config.target_parameters or BOTH
    torch.manual_seed(1)
    return get_peft_model(_base(name, forward), config)


def _trained(name: str, config: folklora.AdapterConfig, forward: str | None = None) -> PeftModel:
    model = _adapted(name, config, forward)
    tiny.train(model)
    return model.eval()


def _summed(name: str, model: PeftModel) -> nn.Module:
    """The base in float64 with W + ΔW for its weights, computed expert by expert from the trained parameters."""
    base = _base(name, None if name == "llama4" else "eager").double()
    for layer in layers_of(model):
        experts, update = base.get_submodule(layer.name), layer.folklora_updates["default"]
        for key in update.names:
            own = update.get_submodule(key)
            for index, matrix in enumerate(getattr(experts, key).data):
                delta = _delta({name: value.detach()[index].double() for name, value in own.named_parameters()}, own)
                matrix += delta.T if getattr(experts, "is_transposed", True) else delta
    return base


def _delta(p: dict[str, Tensor], update: nn.Module) -> Tensor:
    if "P" in p:
        return update.eta * p["B"] @ torch.diag(p["d"]) @ p["A"] - p["P"] @ p["Q"]
    start = p["B0"] @ p["A0"] if "B0" in p else 0.0
    return update.scale * (p["B"] @ p["A"] - start)


@pytest.mark.parametrize("config", METHODS, ids=lambda config: config.method)
@pytest.mark.parametrize(("name", "forward"), [*FORWARDS, ("llama4", None)])
def test_every_forward_computes_with_the_sum(name: str, forward: str | None, config: folklora.AdapterConfig) -> None:
    model = _trained(name, config, forward)
    oracle = tiny.logits(_summed(name, model))
    assert not torch.allclose(tiny.logits(_base(name)).double(), oracle, atol=1e-2)
    tiny.close(tiny.logits(model).double(), oracle, 1e-4, "the logits with experts adapted and those of the sums")


@pytest.mark.parametrize("config", METHODS, ids=lambda config: config.method)
@pytest.mark.parametrize("name", MODELS)
def test_start_gradients_disabling_merging_saving(name: str, config: folklora.AdapterConfig, tmp_path: Path) -> None:
    base = tiny.logits(_base(name))
    model = _adapted(name, config)
    if config.method != "kasa":
        tiny.close(tiny.logits(model), base, 1e-5, "the logits at the start and the base's")
    weights = {key: value.clone() for key, value in tiny.base_parameters(model).items()}
    tiny.train(model)
    trained = tiny.logits(model)
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model), base)
    model.save_pretrained(tmp_path)
    with tiny.NoDecomposition():
        for options in ({}, {"low_cpu_mem_usage": True}):
            loaded = PeftModel.from_pretrained(_base(name), tmp_path, **options)
            assert torch.equal(tiny.logits(loaded), trained)
    model.merge_adapter(safe_merge=True)
    tiny.close(tiny.logits(model), trained, 1e-5, "the logits merged and unmerged")
    model.unmerge_adapter()
    assert torch.equal(tiny.logits(model), trained)
    for key, value in tiny.base_parameters(model).items():
        assert torch.equal(value, weights[key])
    merged = model.merge_and_unload()
    assert not any(isinstance(module, ExpertsLayer) for module in merged.modules())
    tiny.close(tiny.logits(merged), trained, 1e-5, "the logits merged for good and before")


FIXED = {m.name: m.factory for m in methods("adapters") if (m.name, "merge") not in check.EXCEPTIONS}
# state beside a weight's own parameters: bases or choices that layers share, a count of steps
WITH_MORE_STATE = {"codyra", "diffora", "randlora"}
WITHOUT_FACTORS = {"exssnet", "lt-sft"}
# its task vectors are files of single weights
NAMED_ON_DISK = {"atlas"}
UNFIT = WITH_MORE_STATE | WITHOUT_FACTORS | NAMED_ON_DISK


@pytest.mark.parametrize(
    "name",
    [n for n, one in FIXED.items() if "linear" in one.layer_kinds and not one.needs and n not in UNFIT],
)
def test_every_method_with_a_fixed_update_adapts_experts(name: str) -> None:
    options = {"r": 3} if "r" in {field.name for field in fields(FIXED[name])} else {}
    model = _adapted("mixtral", FIXED[name](**options))
    assert all(value.isfinite().all() for value in model.parameters())
    tiny.moved(model).eval()
    base = _base("mixtral", "eager").double()
    for layer in layers_of(model):
        experts, update = base.get_submodule(layer.name), layer.folklora_updates["default"]
        for key in update.names:
            own = update.get_submodule(key)
            for index, matrix in enumerate(getattr(experts, key).data):
                one = {name: value.detach()[index] for name, value in own.named_parameters()}
                matrix += call_with(own, "factors", one).dense().double()
    tiny.close(tiny.logits(model).double(), tiny.logits(base), 1e-4, "the logits with experts adapted and of the sums")


def test_the_grouped_product_that_stands_in_for_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(hf.integrations.moe, "_can_use_grouped_mm"):
        pytest.skip("this version of transformers has no such product")
    model = _trained("gpt-oss", KaSA(r=3), "grouped_mm")
    expected = tiny.logits(model)
    monkeypatch.setattr(hf.integrations.moe, "_can_use_grouped_mm", lambda *args: False)
    with _Largest() as seen:
        tiny.close(tiny.logits(model), expected, 1e-5, "the logits by the fallback and by the kernel")
    assert "transformers::grouped_mm_fallback" in seen.names


class _Largest(TorchDispatchMode):
    """The largest number of elements of a tensor that a pass computes or copies."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        result = func(*args, **(kwargs or {}))
        self.names.add(func.name())
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor) and not func.is_view:
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize("forward", ["eager", "grouped_mm"])
def test_no_dense_update_of_all_experts_is_formed(forward: str) -> None:
    model = _adapted("mixtral", LoRA(r=1, target_parameters=["experts.gate_up_proj"]), forward)
    layer = next(layers_of(model))
    stack = layer.get_base_layer().gate_up_proj
    x, ids, weights = torch.randn(2, 32), torch.tensor([[0, 1], [2, 1]]), torch.ones(2, 2)
    with _Largest() as largest:
        layer(x, ids, weights).sum().backward()
    assert largest.elements < stack.numel() // 4


def test_one_of_the_stacks_alone_and_patterns_of_rank() -> None:
    config = LoRA(
        r=3, target_parameters=["experts.down_proj"], target_modules=["q_proj"], rank_pattern={"down_proj": 5}
    )
    model = _adapted("mixtral", config)
    layers = {layer.name: layer for layer in layers_of(model)}
    assert sorted(name.rpartition(".")[2] for name in layers) == ["experts", "experts", "q_proj", "q_proj"]
    update = layers["model.layers.0.mlp.experts"].folklora_updates["default"]
    assert {key: tuple(value.shape) for key, value in update.named_parameters()} == {
        "down_proj.A": (4, 5, 24),
        "down_proj.B": (4, 32, 5),
        "base_sample": (64,),
    }
    by_module = get_peft_model(_base("mixtral"), LoRA(r=3, target_modules=["experts"]))
    assert [layer.folklora_updates["default"].names for layer in layers_of(by_module)] == [
        ("gate_up_proj", "down_proj")
    ] * 2


def test_two_methods_add_up() -> None:
    model = _trained("qwen3-moe", LoRA(r=2))
    model.add_adapter("other", KaSA(r=3, target_parameters=["experts.gate_up_proj"]))
    tiny.moved(model, "other").eval()
    layer = next(layers_of(model))
    x, ids, weights = torch.randn(6, 32), torch.randint(4, (6, 2)), torch.rand(6, 2)
    base = copy.deepcopy(layer.get_base_layer())
    layer.set_adapter(["default", "other"])
    both = layer(x, ids, weights)
    for name in ("default", "other"):
        for key in layer.folklora_updates[name].names:
            A, B = layer.folklora_updates[name].pair(key)
            getattr(base, key).data += B @ A
    tiny.close(both, base(x, ids, weights), 1e-5, "two methods at once and their sum")
    model.delete_adapter("other")
    model.set_adapter("default")
    assert list(layer.folklora_updates) == ["default"]


def test_the_penalty_counts_every_expert_as_a_weight() -> None:
    model = _adapted("mixtral", KaSA(r=3, beta=0.1, gamma=0.2))
    torch.manual_seed(3)
    expected = []
    for layer in layers_of(model):
        update = layer.folklora_updates["default"]
        for key in update.names:
            stack = update.get_submodule(key)
            for index in range(4):
                single = KaSA(r=3, beta=0.1, gamma=0.2).empty((32, 24) if key == "down_proj" else (48, 32))
                single.load_state_dict({k: v[index] for k, v in stack.state_dict().items()})
                expected.append(single.penalty())
    assert len(expected) == 16
    tiny.close(folklora.penalty(model), torch.stack(expected).mean().detach(), 1e-5, "the penalty")
    before = {key: value.detach().clone() for key, value in model.named_parameters() if value.requires_grad}
    gradients = tiny.penalty_gradients(model)
    torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=1.0).step()
    for key, value in model.named_parameters():
        if key in before:
            expected_value = before[key] - gradients.get(key, 0.0) / 8
            tiny.close(value.detach(), expected_value, 1e-6, key)


@dataclass
class Halved(LoRA):
    method: str = "halved"

    def update(self, weight: Tensor) -> HalvedUpdate:
        plain = super().update(weight)
        return HalvedUpdate(plain.A, plain.B, plain.scale)


class HalvedUpdate(LoRAUpdate):
    def after_step(self) -> None:
        assert self.A.dim() == 2
        self.A.mul_(0.5)


def test_after_step_and_what_is_frozen_reach_every_expert() -> None:
    model = _adapted("mixtral", Halved(r=2))
    stack = next(layers_of(model)).folklora_updates["default"].gate_up_proj
    before = stack.A.detach().clone()
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    assert torch.equal(stack.A, before * 0.5)
    named = _adapted("mixtral", KaSA()).named_parameters()
    assert {name.rpartition(".")[2] for name, value in named if value.requires_grad} == {"A", "B", "d"}


@pytest.mark.parametrize("name", MODELS)
def test_export_in_pefts_form(name: str, tmp_path: Path) -> None:
    model = _trained(name, PiSSA(r=3, target_modules=["q_proj"], rank_pattern={"down_proj": 2}))
    export_lora(model, tmp_path / "lora")
    stock = PeftModel.from_pretrained(_base(name), tmp_path / "lora")
    assert not list(layers_of(stock))
    assert any(isinstance(module, peft.tuners.lora.layer.ParamWrapper) for module in stock.modules())
    tiny.close(tiny.logits(stock), tiny.logits(model), 1e-5, "the logits of the exported LoRA and of the adapter")


def test_training_in_bfloat16_checkpointed_and_compiled() -> None:
    model = _adapted("qwen3-moe", LoRA(r=3), "grouped_mm")
    tiny.moved(model).train()
    tiny.loss(model).backward()
    gradients = tiny.gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    tiny.loss(model).backward()
    for key, value in tiny.gradients(model).items():
        tiny.close(value, gradients[key], 1e-5, f"the gradient of {key} with checkpointing")
    half = model.to(torch.bfloat16)
    assert tiny.loss(half).isfinite()


def test_a_compiled_experts_module_computes_the_same() -> None:
    model = tiny.moved(_adapted("mixtral", LoRA(r=3), "grouped_mm"))
    layer = next(layers_of(model))
    x, ids, weights = torch.randn(6, 32), torch.randint(4, (6, 2)), torch.rand(6, 2)
    compiled = torch.compile(layer, backend="aot_eager")
    tiny.close(compiled(x, ids, weights), layer(x, ids, weights), 1e-5, "compiled and eager experts")


def test_what_a_file_leaves_out_is_made_again_expert_by_expert(tmp_path: Path) -> None:
    model = _trained("gpt-oss", SVFit(r=None, energy=0.5))
    model.save_pretrained(tmp_path)
    assert not any(key.endswith(".U") for key in load_file(tmp_path / "adapter_model.safetensors"))
    for options in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(_base("gpt-oss"), tmp_path, **options)
        assert torch.equal(tiny.logits(loaded), tiny.logits(model))


def test_a_correction_of_the_base_counts_once() -> None:
    model = _trained("mixtral", KaSA(r=2))
    model.add_adapter("other", KaSA(r=3, target_parameters=BOTH))
    layer = next(layers_of(model))
    expected = {}
    for key in ("gate_up_proj", "down_proj"):
        learned, larger = layer.folklora_updates["default"], layer.folklora_updates["other"]
        A, B = learned.pair(key, corrects=False)
        C, D = larger.pair(key)
        expected[key] = getattr(layer.get_base_layer(), key) + B @ A + D @ C
    model.base_model.set_adapter(["default", "other"])
    layer.merge()
    for key, value in expected.items():
        tiny.close(getattr(layer.get_base_layer(), key), value, 1e-5, key)


def test_what_cannot_be_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match=r"am-lora reads each layer's input, which is hidden inside the experts"):
        _adapted("mixtral", AMLoRA(dropout=0.0))
    with pytest.raises(ValueError, match=r"corda needs statistics of each layer, which are hidden inside the experts"):
        _adapted("mixtral", CorDA())
    with pytest.raises(
        ValueError, match=r"holds experts, which calibration does not see weight by weight; leave it out"
    ):
        folklora.calibrate(_base("mixtral"), [tiny.batch()], {"covariance"}, target_modules=["experts"])
    with pytest.raises(
        ValueError, match=r"can have no adapter dropout, for the inputs are hidden inside: set dropout=0"
    ):
        _adapted("mixtral", LoRA(dropout=0.1))
    with pytest.raises(
        ValueError, match=r"rank 25 is above 24, the largest for layer 'model.layers.0.mlp.experts.down"
    ):
        _adapted("mixtral", LoRA(r=25))
    for name in WITH_MORE_STATE:
        with pytest.raises(ValueError, match=f"{name} keeps more than each weight's own parameters, for which"):
            _adapted("mixtral", FIXED[name](r=3))
    for name in WITHOUT_FACTORS:
        with pytest.raises(ValueError, match=f"{name} changes entries of weights, for which there is no room"):
            _adapted("mixtral", FIXED[name]())
    with pytest.raises(ValueError, match=r"'w1' matches no weight; weights here: .*experts.down_proj, experts.gate_up"):
        _adapted("mixtral", LoRA(r=2, target_parameters=["w1"]))
    model = _adapted("mixtral", LoRA(r=2))
    model.add_adapter("other", LoRA(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"adapter_names cannot choose adapters of the experts"):
        model(**tiny.batch(), adapter_names=["default", "other", "other", "__base__"])


def test_weights_that_come_in_just_before_the_forward_are_refused() -> None:
    layer = next(layers_of(_adapted("mixtral", LoRA(r=2))))
    base, inputs = layer.get_base_layer(), (torch.randn(6, 32), torch.randint(4, (6, 2)), torch.rand(6, 2))
    base.gate_up_proj = nn.Parameter(base.gate_up_proj.to("meta"), requires_grad=False)
    with pytest.raises(ValueError, match=r"experts 'model.layers.0.mlp.experts' has offloaded"):
        layer(*inputs)


def test_a_saved_adapter_of_other_experts_is_refused(tmp_path: Path) -> None:
    _trained("mixtral", LoRA(r=3)).save_pretrained(tmp_path)
    other = _base("mixtral")
    other.model.layers[1].mlp.experts.down_proj.data += 0.1
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts': the adapter was made for another base model"):
        PeftModel.from_pretrained(other, tmp_path)
