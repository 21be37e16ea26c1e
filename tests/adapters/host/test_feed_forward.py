"""Feed-forward layers as a target: which modules are some, what they compute, and what cannot stand beside."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    T5Config,
    T5EncoderModel,
)

from folklora import FactorLLM, LoRA, tiny
from folklora.adapters.factorllm import FactorLLMUpdate
from folklora.adapters.host.layer import updates_of


class Chunked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 24), nn.Linear(8, 24), nn.Linear(24, 8)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def test_what_is_no_feed_forward_layer_or_not_free_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'0' \(Chunked\) computes more than its linear layers"):
        get_peft_model(nn.Sequential(Chunked()), FactorLLM(target_modules=["0"]))
    with pytest.raises(ValueError, match="factorllm adapts feed-forward layers; 'q' is a Linear"):
        get_peft_model(tiny.TwoLayers(), FactorLLM(target_modules=["q"]))
    config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    with pytest.raises(ValueError, match="no module of BertModel is a feed-forward layer by itself"):
        get_peft_model(BertModel(config), FactorLLM())
    with pytest.raises(ValueError, match=r"5 experts do not divide the 48 hidden units of 'model.layers.0.mlp'"):
        tiny.adapted(FactorLLM(experts=5))
    inside = get_peft_model(tiny.llama(), LoRA(r=2, target_modules=["up_proj"]))
    with pytest.raises(ValueError, match=r"layer 'model.layers.0.mlp.up_proj' carries adapters"):
        inside.add_adapter("experts", FactorLLM())
    factored = tiny.adapted(FactorLLM())
    with pytest.raises(ValueError, match=r"layer 'model.layers.0.mlp.up_proj' is a part of 'model.layers.0.mlp'"):
        factored.add_adapter("other", LoRA(r=2, target_modules=["q_proj", "up_proj"]))
    factored.add_adapter("rest", LoRA(r=2, target_modules="all-linear"))
    assert {name.rpartition(".")[2] for name in factored.peft_config["rest"].target_modules} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }
    with pytest.raises(ValueError, match="to_dense"):
        factored.merge_adapter(adapter_names=["default"])


def _models() -> dict[str, nn.Module]:
    small = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    gpt2 = GPT2Config(vocab_size=31, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    t5 = {"vocab_size": 31, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return {
        "gpt2": GPT2LMHeadModel(gpt2),
        "neox": GPTNeoXForCausalLM(GPTNeoXConfig(**small, intermediate_size=24, max_position_embeddings=8)),
        "t5": T5EncoderModel(T5Config(**t5)),
        "t5-gated": T5EncoderModel(T5Config(**t5, feed_forward_proj="gated-gelu")),
    }


@pytest.mark.parametrize("name", ["gpt2", "neox", "t5", "t5-gated"])
def test_other_architectures_are_exact_with_all_experts(name: str) -> None:
    torch.manual_seed(0)
    base = _models()[name].double().eval()
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=0.3)
    tokens = torch.randint(31, (2, 6))
    expected = base(input_ids=tokens)[0]
    model = get_peft_model(base, FactorLLM(experts=4, top_k=4)).double()
    # in training, where each expert is computed by itself; without the model's own dropout
    for module in model.modules():
        module.training = isinstance(module, FactorLLMUpdate)
    torch.testing.assert_close(model(input_ids=tokens)[0], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["gpt2", "t5-gated"])
def test_the_layers_own_dropout_is_kept(name: str) -> None:
    torch.manual_seed(0)
    model = get_peft_model(_models()[name], FactorLLM(top_k=2)).train()
    layer, _ = next(updates_of(model, "default"))
    x = torch.randn(2, 5, 16)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))
