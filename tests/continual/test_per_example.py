"""Gradients and scores of examples in batches are those of single examples, whatever the adapter computes."""

from __future__ import annotations

import peft
import pytest
import torch
import torch.nn.functional as F
from transformers import MixtralConfig, MixtralForCausalLM, OPTConfig, OPTForCausalLM

from folklora import LTSFT, AMLoRA, FactorLLM, GenerativeAdapter, KaSA, LoRA, MixDA, SMoRA, VLAdapter
from folklora.adapters.generative_adapter import GenerativeUpdate
from folklora.continual import AdaptInfty
from folklora.continual.answers import answer_of, answers_of
from folklora.continual.per_example import ExampleGradients, batches
from folklora.continual.scores import Measure, block_parameters
from folklora.stream.tasks import Example
from folklora.stream.tokens import encode

# logits are read in float32: sums of at most 128 terms (positions, vocabulary), each off by a unit in the last place
CLOSE = 128 * torch.finfo(torch.float32).eps
LAYERS = ["q_proj", "v_proj"]
EXAMPLES = [
    Example("xx: a\nAnswer:", " yes"),
    Example("xx: what a long and winding text that is\nAnswer:", " negative"),
    Example("yy: so it is said\nAnswer:", " no"),
    Example("xx: b c d\nAnswer:", " positive"),
    Example("zz: so it is said\nAnswer:", " no"),
]


def moved(model, adapter):
    torch.manual_seed(0)
    adapted = AdaptInfty(adapter=adapter).start(model)
    generator = torch.Generator().manual_seed(0)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return adapted


def counted(model):
    calls = []
    model.get_base_model().register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def encoded(model, tokenizer):
    return [encode(tokenizer, example, 64, model.config.is_encoder_decoder) for example in EXAMPLES]


def check_gradients(model, tokenizer, block=None):
    """Of all examples at once, beside autograd's own of each; whether they were taken together."""
    parameters, rows = block_parameters(model.eval(), block), encoded(model, tokenizer)
    read_gradients = ExampleGradients(model, parameters, rows[0])
    found, read = read_gradients(rows)
    for gradient, (logits, answer), example in zip(found, read, EXAMPLES, strict=True):
        alone, expected = answer_of(model, tokenizer, example, 64)
        parts = torch.autograd.grad(F.cross_entropy(alone, expected), parameters, materialize_grads=True)
        own = torch.cat([part.flatten().float() for part in parts])
        assert own.norm() > 0
        assert (gradient - own).norm() <= CLOSE * own.norm()
        assert torch.equal(answer, expected)
        torch.testing.assert_close(logits, alone.detach(), rtol=CLOSE, atol=CLOSE)
    return read_gradients.together


ADAPTERS = {
    "lora": LoRA(r=2, dropout=0.5, target_modules=LAYERS),
    "kasa with biases": KaSA(r=2, target_modules=LAYERS, train_bias=True),
    "lora on the embedding": LoRA(r=2, target_modules=["embed_tokens", "q_proj"]),
    # gates of each token
    "smora": SMoRA(r=4, target_modules=LAYERS),
    # a gate of the whole prompt, from which padding must stay away
    "am-lora": AMLoRA(r=2, tasks=2, granularity="sequence", target_modules=LAYERS),
    "lt-sft, dense": LTSFT(target_modules=LAYERS),
    "mixda, a function": MixDA(target_modules=["down_proj"], gate_hidden=8, reduction=4),
    "factorllm with trained experts": FactorLLM(target_modules=["mlp"], train_experts=True),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_batches_measure_what_single_examples_do(tiny_llama, tiny_tokenizer, name):
    model = moved(tiny_llama(1, attention_bias=True), ADAPTERS[name]).double().train()
    calls = counted(model)
    found = Measure(64).of(model, tiny_tokenizer, EXAMPLES, [None] * 5)
    assert len(calls) == 2, "one to see what reads the parameters, and one for all examples"
    assert model.training
    single = Measure(64, tokens=1).of(model, tiny_tokenizer, EXAMPLES, [None] * 5)
    assert len(calls) == 2 + 1 + 5
    torch.testing.assert_close(found.vectors, single.vectors, rtol=0, atol=CLOSE)
    for key in ("perplexity", "el2n", "entropy", "grand"):
        torch.testing.assert_close(found.scores[key], single.scores[key], rtol=CLOSE, atol=CLOSE)
    assert check_gradients(model, tiny_tokenizer)


def test_a_network_that_other_blocks_read_is_differentiated_in_all_of_them(tiny_llama, tiny_tokenizer):
    adapter = VLAdapter(form="hyperformer", target_modules=["o_proj", "down_proj"])
    assert check_gradients(moved(tiny_llama(1), adapter).double(), tiny_tokenizer, block=0)


class OwnWriter(GenerativeUpdate):
    """Each row writes for itself: what enters the block makes the row's own M."""

    def function(self, x, y, mask=None):
        M = self.normalise(self.statistic(self._entering(x), mask))
        return self._applied(x, M).to(y.dtype)


class OwnWriting(GenerativeAdapter):
    def update(self, weight):
        return OwnWriter(self, tuple(weight.shape), weight)


def test_what_entered_a_block_is_taken_row_by_row(tiny_llama, tiny_tokenizer):
    adapter = OwnWriting(r=4, norm="frobenius", target_modules=["q_proj", "o_proj"])
    for block in (0, 1):
        assert check_gradients(moved(tiny_llama(1), adapter).double(), tiny_tokenizer, block)


@pytest.mark.parametrize("block", [0, None])
def test_both_sides_of_an_encoder_decoder(tiny_t5, tiny_tokenizer, block):
    model = moved(tiny_t5(1), AMLoRA(r=2, tasks=2, granularity="sequence", target_modules=["q", "v"]))
    model = model.double()
    assert check_gradients(model, tiny_tokenizer, block)


def test_what_has_no_rows_is_read_one_at_a_time(tiny_llama, tiny_tokenizer):
    sizes = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    # here the feed-forward layers are called with the tokens of all rows
    opt = OPTForCausalLM(OPTConfig(**sizes, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64))
    assert not check_gradients(moved(opt, LoRA(r=2, target_modules=["q_proj", "fc1"])), tiny_tokenizer)
    experts = MixtralConfig(**sizes, intermediate_size=48, num_key_value_heads=2, num_local_experts=2)
    model = moved(MixtralForCausalLM(experts), LoRA(r=2, target_modules=["q_proj", "experts"]))
    assert not check_gradients(model, tiny_tokenizer)
    for options in ({}, {"modules_to_save": ["lm_head"]}):
        own = peft.LoraConfig(r=2, target_modules=LAYERS, init_lora_weights=False, **options)
        assert not check_gradients(AdaptInfty(adapter=own).start(tiny_llama()), tiny_tokenizer)


def test_a_loss_that_nothing_trained_takes_part_in_is_refused(tiny_llama, tiny_tokenizer):
    model = moved(tiny_llama(1), FactorLLM(target_modules=["mlp"]))
    with pytest.raises(ValueError, match="does not depend on what is trained"):
        Measure(64).of(model, tiny_tokenizer, EXAMPLES, [None] * 5)


def test_batches_hold_no_more_than_they_may(tiny_llama, tiny_tokenizer):
    model = moved(tiny_llama(1), LoRA(r=2, target_modules=LAYERS)).eval()
    rows = encoded(model, tiny_tokenizer)
    for tokens in (1, 64, 100):
        found = batches(rows, 3, tokens)
        assert sorted(i for batch in found for i in batch) == list(range(5))
        for batch in found:
            longest = max(len(rows[i]["input_ids"]) for i in batch)
            assert len(batch) == 1 or (len(batch) <= 3 and len(batch) * longest <= tokens)
    lengths = [len(answer) for _, answer in answers_of(model, rows)]
    assert lengths == [sum(label != -100 for label in row["labels"]) for row in rows]


def test_a_question_without_its_passage_is_read_once(tiny_llama, tiny_tokenizer):
    model = moved(tiny_llama(1), LoRA(r=2, target_modules=LAYERS))
    calls = counted(model)
    bare = [Example("xx:\nAnswer:", example.completion) for example in EXAMPLES[:4]]
    found = Measure(64, tokens=1).of(model, tiny_tokenizer, [*EXAMPLES[:4], EXAMPLES[2]], [*bare, bare[2]])
    assert len(calls) == 1 + 5 + 4
    assert found.scores["grounding"][2] == found.scores["grounding"][4]
    assert found.scores["grounding"].isfinite().all()
