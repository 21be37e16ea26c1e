"""torch's own attention and encoder layers: what they compute with an adapter on them, in every way that they take."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from folklora import AMLoRA, CorDA, KaSA, LoRA, PiSSA, RandLoRA, SVFit, calibrate, tiny
from folklora.adapters.host.export import export_lora
from folklora.adapters.host.layer import layers_of

WIDTH = 16
METHODS = [LoRA(r=3), PiSSA(r=3), KaSA(r=3, truncate=2, truncate_limit=1.0), SVFit()]


class Attends(nn.Module):
    """An attention, over itself or over a sequence of another width, and a linear layer."""

    def __init__(self, other: int | None = None, batch_first: bool = True) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=batch_first, kdim=other, vdim=other)
            self.head = nn.Linear(WIDTH, 3)
        self.other = other

    def forward(self, x: Tensor) -> Tensor:
        """[batch, positions, width] to [batch, positions, 3]."""
        y = x if self.other is None else x[..., : self.other]
        return self.head(self.attention(x, y, y)[0])


def _moved(base: nn.Module, config: LoRA, **options: object) -> PeftModel:
    torch.manual_seed(1)
    return tiny.moved(get_peft_model(base, copy.deepcopy(config).changed(**options))).eval()


def _summed(model: PeftModel, base: nn.Module) -> nn.Module:
    """The base with W + ΔW in float64, added by hand from the factors of each weight."""
    base = base.double()
    for layer in layers_of(model):
        update = layer.folklora_updates["default"]
        for key in update.names:
            A, B = (part[0].double() for part in update.pair(key))
            base.get_parameter(f"{layer.name}.{key}").data += B @ A
    return base


@pytest.mark.parametrize("other", [None, 10])
@pytest.mark.parametrize("config", METHODS, ids=lambda config: config.method)
@torch.no_grad()
def test_attention_computes_with_the_sum_and_comes_back(config: LoRA, other: int | None) -> None:
    x, base = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(2)), Attends(other)
    frozen = copy.deepcopy(base).requires_grad_(False).eval()
    before = copy.deepcopy(base.state_dict())
    model = _moved(base, config, target_modules=["attention"])
    expected = _summed(model, Attends(other).eval())(x.double())
    assert (expected - frozen(x)).abs().max() > 0.01
    tiny.close(model(x), expected, 1e-5, "the adapted attention and the sum")
    model.merge_adapter(safe_merge=True)
    tiny.close(model(x), expected, 1e-5, "the merged attention and the sum")
    with model.disable_adapter():
        tiny.same(model(x), frozen(x), "disabled while merged, and the base")
    model.unmerge_adapter()
    for name, value in tiny.base_parameters(model).items():
        tiny.same(value, before[name], name)
    merged = model.merge_and_unload()
    assert type(merged.attention) is nn.MultiheadAttention
    tiny.close(merged(x), expected, 1e-5, "unloaded and the sum")


@pytest.mark.parametrize("config", METHODS, ids=lambda config: config.method)
def test_both_weights_of_an_attention_are_trained_saved_and_loaded(config: LoRA, tmp_path: Path) -> None:
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(2))
    model = _moved(Attends(), config, target_modules="all-linear")
    assert model.peft_config["default"].target_modules == ["attention", "head"]
    model.train()(x).square().sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {"in_proj_weight", "out_proj_weight"} <= {name.split(".")[-2] for name in trained}
    assert all(p.grad is not None and p.grad.any() for p in trained.values())
    model.zero_grad()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Attends(), tmp_path).eval()
    with torch.no_grad():
        tiny.same(loaded(x), model.eval()(x), "loaded and saved")
        tiny.same(pickle.loads(pickle.dumps(model))(x), model(x), "pickled and saved")


@pytest.mark.parametrize("config", METHODS, ids=lambda config: config.method)
@torch.no_grad()
def test_flat_parameters_of_fsdp_are_seen(config: LoRA, one_process: None) -> None:
    """While they are whole, plain tensors lie over the parameters, of the attention and of its update."""
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(2))
    model = _moved(Attends(), config, target_modules=["attention"])
    expected = model(x)
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id="cpu")
    tiny.close(wrapped(x), expected, 1e-6, "sharded and not")


def test_one_projection_alone() -> None:
    model = get_peft_model(Attends(), LoRA(r=3, target_parameters=["attention.out_proj.weight"]))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2
    assert [(layer.in_features, layer.out_features) for layer in layers_of(model)] == [(WIDTH, 3 * WIDTH)]
    assert all(".out_proj_weight." in name for name in trained)


def test_pefts_lora_adds_the_update_of_the_output_twice_so_none_is_exported(tmp_path: Path) -> None:
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(2))
    stock = get_peft_model(Attends(), LoraConfig(r=3, target_modules=["attention"], init_lora_weights=False)).eval()
    attention = stock.base_model.model.attention
    once = Attends().eval()
    once.attention.in_proj_weight.data += attention.get_delta_weight("default").detach()
    once.attention.out_proj.weight.data += attention.base_layer.out_proj.get_delta_weight("default").detach()
    # the day that this is mended, attention can be exported
    assert not torch.allclose(stock(x), once(x), atol=1e-3)
    with pytest.raises(ValueError, match="torch's attention 'attention', to whose output projection PEFT's LoRA adds"):
        export_lora(_moved(Attends(), LoRA(r=3), target_modules=["attention"]), tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def _encoder(nested: bool) -> nn.TransformerEncoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 24, batch_first=True, dropout=0.0)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).requires_grad_(False).eval()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("targets", [["linear1", "linear2"], ["self_attn"], "all-linear"], ids=str)
@torch.no_grad()
def test_torchs_fast_path_does_not_go_past_an_adapter(targets: list[str] | str, nested: bool) -> None:
    """In evaluation torch's encoder layers read their parts' weights, and call none of them."""
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(2))
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    base = _encoder(nested)(x, src_key_padding_mask=padding)
    model = _moved(_encoder(nested), LoRA(r=4), target_modules=targets)
    found = model(x, src_key_padding_mask=padding)[~padding]
    # the same in training mode, which has no fast path (dropout is 0)
    tiny.close(found, model.train()(x, src_key_padding_mask=padding)[~padding], 1e-5, "evaluation and training")
    model.eval()
    assert (found - base[~padding]).abs().max() > 0.01
    with model.disable_adapter():
        tiny.same(model(x, src_key_padding_mask=padding), base, "disabled and the base")
    model.merge_adapter()
    tiny.close(model(x, src_key_padding_mask=padding)[~padding], found, 1e-5, "merged and not")


def test_what_cannot_be_is_refused_in_words() -> None:
    with pytest.raises(
        ValueError, match=r"am-lora reads each layer's input, which is hidden inside the attention 'att"
    ):
        get_peft_model(Attends(), AMLoRA(r=3, dropout=0.0, target_modules=["attention"]))
    with pytest.raises(
        ValueError, match=r"corda needs statistics of each layer, which are hidden inside the attention"
    ):
        get_peft_model(Attends(), CorDA(r=3, target_modules=["attention"]))
    with pytest.raises(ValueError, match=r"randlora keeps more than each weight's own parameters"):
        get_peft_model(Attends(), RandLoRA(r=3, target_modules=["attention"]))
    with pytest.raises(ValueError, match=r"the attention 'attention' can have no adapter dropout"):
        get_peft_model(Attends(), LoRA(r=3, dropout=0.1, target_modules=["attention"]))
    with pytest.raises(
        ValueError, match=r"reads its weight without calling it.*name the attention 'attention' as a who"
    ):
        get_peft_model(Attends(), LoRA(r=3, target_modules=["out_proj"]))
    with pytest.raises(ValueError, match=r"'attention' holds attention, which calibration does not see"):
        calibrate(Attends(), [torch.zeros(1, 2, WIDTH)], {"covariance"}, target_modules=["attention"])
    model = get_peft_model(Attends(), LoRA(r=3, target_modules=["attention"]))
    model.add_adapter("other", LoRA(r=3, target_modules=["attention"]))
    with pytest.raises(ValueError, match=r"adapter_names cannot choose adapters of the attention 'attention'"):
        model(torch.zeros(2, 5, WIDTH), adapter_names=["default", "other"])
