"""Exported as a LoRA, an adapter computes the same in stock PEFT, whatever it was written over."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForSequenceClassification

from folklora import AMLoRA, KaSA, LoRA, PiSSA, export_lora, tiny
from folklora.adapters.host.layer import layers_of


class _Pixels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 6, (3, 2), stride=2, padding=1)
        self.long = nn.Conv1d(6, 4, 2, groups=2)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.long(self.wide(x).flatten(2)).mean(-1))


def _pixels() -> _Pixels:
    torch.manual_seed(0)
    return _Pixels().eval()


def _gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32, n_positions=16, tie_word_embeddings=False)
    return GPT2LMHeadModel(config).eval()


def _check_export(
    make: Callable[[], nn.Module], config: Any, folder: Path, call: Callable[[nn.Module], Tensor]
) -> None:
    model = tiny.moved(get_peft_model(make(), config)).eval()
    ranks = export_lora(model, folder / "lora")
    stock = PeftModel.from_pretrained(make(), folder / "lora")
    tiny.close(call(stock), call(model), 1e-5, "what the export and the adapter compute")
    assert not torch.allclose(call(stock), call(make()))
    carried = {
        name.removeprefix("base_model.model."): module.r["default"]
        for name, module in stock.named_modules()
        if isinstance(module, LoraLayer)
    }
    assert carried == ranks
    assert all(s == 1 for m in stock.modules() if isinstance(m, LoraLayer) for s in m.scaling.values())


@pytest.mark.parametrize("method", [LoRA, KaSA, PiSSA])
def test_transposed_layers_and_embeddings(method: type, tmp_path: Path) -> None:
    tokens = torch.randint(32, (2, 5), generator=torch.Generator().manual_seed(0))
    for index, targets in enumerate((["c_attn", "c_fc"], ["wte", "wpe"], ["c_proj", "lm_head", "wte"])):
        config = method(r=3, target_modules=targets)
        _check_export(_gpt2, config, tmp_path / str(index), lambda model: model(input_ids=tokens).logits)


@pytest.mark.parametrize("method", [LoRA, KaSA, PiSSA])
def test_convolutions(method: type, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    config = method(r=2, target_modules=["wide", "long", "head"], rank_pattern={"long": 3})
    _check_export(_pixels, config, tmp_path, lambda model: model(x))


def test_a_convolution_that_peft_does_not_compute_is_refused(tmp_path: Path) -> None:
    model = get_peft_model(nn.Sequential(nn.Conv1d(4, 4, 3, dilation=2)), LoRA(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match=r"'0' is a convolution with dilation \(2,\) and padding mode 'zeros', which"):
        export_lora(model, tmp_path / "lora")
    assert list(tmp_path.iterdir()) == []


def test_ranks_and_alphas_that_differ_by_layer(tmp_path: Path) -> None:
    config = KaSA(
        r=3,
        target_modules=["q_proj", "v_proj", "up_proj"],
        rank_pattern={"layers.0.self_attn.q_proj": 5, "v_proj": 1},
        alpha_pattern={"up_proj": 2},
        truncate=2,
        truncate_limit=1.0,
    )
    _check_export(tiny.llama, config, tmp_path, tiny.logits)
    saved = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (saved["peft_type"], saved["r"], saved["inference_mode"]) == ("LORA", 5, True)
    assert sorted(saved["rank_pattern"].values()) == [3, 3, 7]


def test_an_encoder_and_a_decoder_with_layers_of_one_name(tmp_path: Path, tiny_t5: Callable[..., nn.Module]) -> None:
    tokens = torch.randint(2, 128, (2, 5), generator=torch.Generator().manual_seed(0))
    config = PiSSA(r=2, target_modules=["q", "wo"], rank_pattern={r"decoder\.block\.0.*\.q": 3})
    _check_export(
        tiny_t5, config, tmp_path, lambda model: model(input_ids=tokens, decoder_input_ids=tokens.flip(1)).logits
    )


def test_one_of_several_adapters(tmp_path: Path) -> None:
    model = tiny.trained(LoRA(r=4, target_modules=["q_proj"]))
    model.add_adapter("other", KaSA(r=2, truncate_limit=1.0, target_modules=["v_proj"]))
    tiny.moved(model, "other")
    model.set_adapter("default")
    assert export_lora(model, tmp_path / "lora", "other") == {f"model.layers.{i}.self_attn.v_proj": 4 for i in (0, 1)}
    model.set_adapter("other")
    stock = PeftModel.from_pretrained(tiny.llama(), tmp_path / "lora")
    tiny.close(tiny.logits(stock), tiny.logits(model), 1e-5, "the logits of the export and of the adapter")


def test_modules_trained_beside_the_adapter_come_along(tmp_path: Path) -> None:
    def classifier() -> LlamaForSequenceClassification:
        config = tiny.llama().config
        config.num_labels, config.pad_token_id = 3, 0
        torch.manual_seed(0)
        return LlamaForSequenceClassification(config).eval()

    for index, config in enumerate(
        (
            PiSSA(r=4, target_modules=["q_proj"], modules_to_save=["score"]),
            PiSSA(r=4, target_modules=["q_proj"], task_type="SEQ_CLS"),
        )
    ):
        _check_export(classifier, config, tmp_path / str(index), tiny.logits)


def test_a_model_adapted_by_transformers_itself(tmp_path: Path) -> None:
    model = tiny.llama()
    model.add_adapter(PiSSA(r=4, target_modules=["q_proj"]))
    for layer in layers_of(model):
        layer.folklora_updates["default"].B.data += 0.1
    export_lora(model, tmp_path / "lora")
    stock = tiny.llama()
    stock.load_adapter(str(tmp_path / "lora"))
    tiny.close(tiny.logits(stock), tiny.logits(model), 1e-5, "the logits of the export and of the adapter")


def test_the_precision_can_be_chosen(tmp_path: Path) -> None:
    model = tiny.trained(LoRA(r=4, target_modules=["q_proj"]))
    export_lora(model, tmp_path / "own")
    export_lora(model, tmp_path / "half", dtype=torch.bfloat16)
    kinds = [
        {value.dtype for value in load_file(tmp_path / name / "adapter_model.safetensors").values()}
        for name in ("own", "half")
    ]
    assert kinds == [{torch.float32}, {torch.bfloat16}]


def test_refusals_are_in_words_and_leave_nothing_behind(tmp_path: Path) -> None:
    model = tiny.trained(AMLoRA(r=4, target_modules=["q_proj"]))
    with pytest.raises(
        ValueError, match="adapter 'default' has no plain LoRA form: its update depends on each layer's input"
    ):
        export_lora(model, tmp_path / "lora")
    with pytest.raises(ValueError, match="carries no Folklora adapter named 'nobody'"):
        export_lora(model, tmp_path / "lora", "nobody")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "lora").mkdir()
    with pytest.raises(FileExistsError, match="is there already; choose a new folder"):
        export_lora(tiny.trained(LoRA(r=4, target_modules=["q_proj"])), tmp_path / "lora")
    assert list((tmp_path / "lora").iterdir()) == []


def test_an_adapter_that_waits_for_its_values_is_not_exported(tmp_path: Path) -> None:
    tiny.trained(KaSA(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path / "saved")
    waiting = get_peft_model(tiny.llama(), KaSA.from_pretrained(tmp_path / "saved"))
    with pytest.raises(RuntimeError, match="was made from a saved configuration"):
        export_lora(waiting, tmp_path / "lora")
    with pytest.raises(RuntimeError, match="was made from a saved configuration"):
        waiting.merge_adapter()
    assert not (tmp_path / "lora").exists()
