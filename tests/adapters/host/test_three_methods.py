"""PiSSA, KaSA and LoRA on one model at once: switched, mixed over rows, and all together."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

from folklora import KaSA, LoRA, PiSSA, tiny
from folklora.adapters.host.layer import layers_of

CONFIGS = {
    "pissa": PiSSA(r=4, target_modules="all-linear"),
    "kasa": KaSA(r=4, target_modules="all-linear"),
    "lora": LoRA(r=4, target_modules="all-linear"),
}
IDS = torch.arange(12).view(3, 4)
# logits of a two-layer model of width 32, whose sums are taken in another order
TOLERANCE = {"rtol": 1e-5, "atol": 3e-5}


@pytest.fixture
def model() -> PeftModel:
    torch.manual_seed(0)
    made = get_peft_model(tiny.llama(), copy.deepcopy(CONFIGS["pissa"]), adapter_name="pissa")
    for name in ("kasa", "lora"):
        made.add_adapter(name, copy.deepcopy(CONFIGS[name]))
    with torch.no_grad():
        for layer in layers_of(made):
            for update in layer.folklora_updates.values():
                frozen = update.frozen_parameters() | {"base_sample"}
                for name, parameter in update.named_parameters():
                    if name not in frozen:
                        parameter.add_(0.1 * torch.randn_like(parameter))
    return made.eval()


@torch.no_grad()
def test_each_equals_itself_alone_and_together_they_add_up(model: PeftModel, tmp_path: Path) -> None:
    base, alone = tiny.llama(), {}
    for name in CONFIGS:
        model.save_pretrained(tmp_path, selected_adapters=[name], save_embedding_layers=False)
        alone[name] = PeftModel.from_pretrained(tiny.llama(), tmp_path / name).eval()(IDS).logits
        model.set_adapter(name)
        assert torch.equal(model(IDS).logits, alone[name]), name
        assert not torch.allclose(alone[name], base(IDS).logits, **TOLERANCE), name
    mixed = model(IDS, adapter_names=list(CONFIGS)).logits
    for row, name in enumerate(CONFIGS):
        torch.testing.assert_close(mixed[row], alone[name][row], **TOLERANCE)
    model.base_model.set_adapter(list(CONFIGS))
    summed = copy.deepcopy(base)
    for layer in layers_of(model):
        weight = summed.get_submodule(layer.name).weight
        weight += sum(update.factors().dense() for update in layer.folklora_updates.values())
    torch.testing.assert_close(model(IDS).logits, summed(IDS).logits, **TOLERANCE)
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, base(IDS).logits)
