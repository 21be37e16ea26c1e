"""Adapters on layers that bitsandbytes or torchao have quantised; skipped where the package is not installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from folklora import AMLoRA, KaSA, LoRA, PiSSA, tiny
from folklora.adapters.base import AdapterConfig
from folklora.adapters.host.layer import layers_of

METHODS = [LoRA(r=4), KaSA(r=4), PiSSA(r=4), AMLoRA(r=4, dropout=0.0)]


def _llama() -> LlamaForCausalLM:
    # bitsandbytes quantises in blocks of 64
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=tiny.VOCABULARY, **sizes, num_key_value_heads=2, initializer_range=0.15)
    torch.manual_seed(11)
    return LlamaForCausalLM(config).eval()


def _replace(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(part, name, make(child))
    return model


def _bitsandbytes_4(linear: nn.Linear) -> nn.Module:
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
    )
    layer.load_state_dict(linear.state_dict())
    # where the CPU has bfloat16, passes without gradients would be computed in that
    layer.support_avx512bf16_for_cpu = False
    return layer.to("cpu")


def _bitsandbytes_8(linear: nn.Linear) -> nn.Module:
    import bitsandbytes

    layer = bitsandbytes.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def _torchao(name: str, **options: object) -> Callable[[nn.Linear], nn.Module]:
    def make(linear: nn.Linear) -> nn.Module:
        from torchao import quantization

        holder = nn.Sequential(linear)
        quantization.quantize_(holder, getattr(quantization, name)(**options))
        return holder[0]

    return make


def _grouped_4() -> Callable[[nn.Linear], nn.Module]:
    from torchao.quantization import PerGroup

    return _torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=PerGroup(16))


WAYS = {
    "bitsandbytes 4 bits": ("bitsandbytes", lambda: _bitsandbytes_4),
    "bitsandbytes 8 bits": ("bitsandbytes", lambda: _bitsandbytes_8),
    "torchao 8 bits": ("torchao", lambda: _torchao("Int8WeightOnlyConfig")),
    "torchao 4 bits": ("torchao", _grouped_4),
}


@pytest.fixture(params=WAYS)
def quantise(request: pytest.FixtureRequest) -> Callable[[], nn.Module]:
    """Makes the tiny Llama with its blocks' linear layers quantised."""
    package, make = WAYS[request.param]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    return lambda: _replace(_llama(), make())


def _adapted(quantise: Callable[[], nn.Module], config: AdapterConfig) -> PeftModel:
    torch.manual_seed(5)
    return get_peft_model(quantise(), type(config)(**{**_options(config), "target_modules": tiny.TARGETS}))


def _options(config: AdapterConfig) -> dict[str, object]:
    return {"r": config.r, "dropout": config.dropout}


@pytest.mark.parametrize("config", METHODS, ids=lambda config: config.method)
def test_a_quantised_model_is_adapted_trained_and_saved(
    quantise: Callable[[], nn.Module], config: AdapterConfig, tmp_path: Path
) -> None:
    base = tiny.logits(quantise())
    assert not torch.equal(base, tiny.logits(_llama()))
    model = _adapted(quantise, config)
    if config.method != "kasa":
        tiny.close(tiny.logits(model), base, 1e-5, "the logits at the start and the quantised base's")
    tiny.train(model)
    trained = tiny.logits(model)
    assert not torch.allclose(trained, base, atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model), base)
    model.save_pretrained(tmp_path)
    with tiny.NoDecomposition():
        loaded = PeftModel.from_pretrained(quantise(), tmp_path)
    assert torch.equal(tiny.logits(loaded), trained)


def test_the_start_is_derived_from_the_dequantised_weight(quantise: Callable[[], nn.Module]) -> None:
    layer = next(layers_of(_adapted(quantise, PiSSA(r=4))))
    W = _dequantised(layer.get_base_layer())
    update = layer.folklora_updates["default"]
    U, S, Vh = torch.linalg.svd(W.double())
    strongest = (U[:, :4] * S[:4]) @ Vh[:4]
    tiny.close((update.B0 @ update.A0).double(), strongest, 1e-5, "the frozen start and the top singular triplets")


def _dequantised(base: nn.Module) -> Tensor:
    """The weight that the layer computes with, read off its outputs on the unit vectors one at a time."""
    unit = torch.eye(base.in_features)
    return torch.cat([base(row[None]).detach() for row in unit]).T


def test_the_base_computes_with_its_own_kernel(quantise: Callable[[], nn.Module]) -> None:
    layer = next(layers_of(tiny.moved(_adapted(quantise, LoRA(r=4)))))
    x = torch.randn(3, 64)
    A, B = layer.folklora_updates["default"].factors().to_lora()
    seen: list[Tensor] = []
    layer.get_base_layer().register_forward_hook(lambda module, args, output: seen.append(output))
    y = layer(x)
    assert len(seen) == 1
    tiny.close(y, seen[0] + (x @ A.T) @ B.T, 1e-5, "the layer's output and its base's plus the update")


def test_a_pass_without_gradients_does_not_change_what_is_decomposed(quantise: Callable[[], nn.Module]) -> None:
    fresh, used = quantise(), quantise()
    for module in used.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = True
    tiny.logits(used)
    weights = list(used.parameters())
    matrices = []
    for base in (fresh, used):
        model = get_peft_model(base, PiSSA(r=4, target_modules=tiny.TARGETS))
        matrices.append([layer.kind.matrix(layer.get_base_layer()).float() for layer in layers_of(model)])
    for one, other in zip(*matrices, strict=True):
        # bitsandbytes rounds scales and what it multiplies by them to bfloat16 there, by 2^-9 of their size each
        tiny.close(other, one, 2**-8 * float(one.abs().max()), "the weight after a pass and before")
    assert all(one is other for one, other in zip(weights, _base_weights(used), strict=True))


def _base_weights(model: nn.Module) -> list[nn.Parameter]:
    return [value for name, value in model.named_parameters() if ".folklora_updates." not in name]


def test_merging_is_refused_in_words(quantise: Callable[[], nn.Module]) -> None:
    model = _adapted(quantise, LoRA(r=4))
    with pytest.raises(ValueError, match=r"q_proj' is quantised; merging would need its weight in floating point"):
        model.merge_adapter()


def test_an_adapter_of_the_unquantised_base_fits_and_one_of_another_does_not(
    quantise: Callable[[], nn.Module], tmp_path: Path
) -> None:
    get_peft_model(_llama(), LoRA(r=4, target_modules=tiny.TARGETS)).save_pretrained(tmp_path / "same")
    PeftModel.from_pretrained(quantise(), tmp_path / "same")
    other = _llama()
    for value in other.parameters():
        nn.init.normal_(value)
    get_peft_model(other, LoRA(r=4, target_modules=tiny.TARGETS)).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="made for another base model's weights"):
        PeftModel.from_pretrained(quantise(), tmp_path / "other")
