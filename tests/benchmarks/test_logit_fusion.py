"""What benchmarks/logit_fusion.py sets beside dynamic weights, and how it computes the share of the gap."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def logit_fusion(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import logit_fusion

    return logit_fusion


def llama(seed: int, width: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, initializer_range=0.5, pad_token_id=0, **sizes)).eval()


@torch.no_grad()
def test_static_weights_add_what_the_specialists_differ_by(logit_fusion):
    large, small, first, second = llama(0, 16), llama(1, 8), llama(2, 8), llama(3, 8)
    tokens = torch.tensor([[3, 4, 5], [6, 7, 8]])
    plain, base, one, two = (model(tokens).logits[:, -1] for model in (large, small, first, second))
    found = logit_fusion.Static(large, small, [first, second], weight=0.7)(tokens, plain)
    expected = (plain + 0.7 * (one - base) + 0.7 * (two - base)).log_softmax(dim=-1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_gap_is_that_to_the_model_which_knows_as_much(logit_fusion):
    worth = {
        "larger": 20.0, "larger, fine-tuned on the task": 80.0, "larger, fine-tuned on all tasks": 60.0,
        "larger + specialist of the task, dynamic": 50.0, "larger + all specialists, dynamic": 50.0,
    }  # fmt: skip
    scores = {name: {task: {"exact": value} for task in logit_fusion.LABELS} for name, value in worth.items()}
    found = [{"scores": scores}]
    assert logit_fusion.gap(found, "larger + specialist of the task, dynamic", "exact") == "50.0"
    assert logit_fusion.gap(found, "larger + all specialists, dynamic", "exact") == "75.0"
    assert logit_fusion.gap(found, "larger", "exact") == ""
    scores["larger, fine-tuned on all tasks"] = scores["larger"]
    assert logit_fusion.gap(found, "larger + all specialists, dynamic", "exact") == "none"
