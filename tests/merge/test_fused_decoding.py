"""Dynamic Logits Fusion while transformers decodes: against reading every text anew; what is read; what is refused."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LogitsProcessor,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
)

from folklora.adapters import AMLoRA, KaSA
from folklora.merge import DynamicLogitFusion
from folklora.merge.dynamic_logit_fusion import Shift, fuse, fusion_weights

PAD = 1
EXACT = 1e-6
TARGETS = ["q_proj", "v_proj", "down_proj"]
MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 0.8},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"do_sample": True, "num_beams": 2},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "ending": {"do_sample": True, "eos_token_id": list(range(40, 90))},
    "banned": {"do_sample": False, "suppress_tokens": list(range(5, 60)), "repetition_penalty": 1.3},
}


class Anew(LogitsProcessor):
    """The oracle: reads every text from its start, without its padding, by every model in full."""

    def __init__(self, mask: Tensor, models: list[Callable[..., Any]]) -> None:
        self.mask, self.models = mask, models

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        copies = len(input_ids) // len(self.mask)
        found = []
        for own, texts, score in zip(self.mask, input_ids.split(copies), scores.split(copies), strict=True):
            texts = texts[:, int((own == 0).sum()) :]
            small, *specialists = (model(texts)[:, -1] for model in self.models)
            change = Shift.between(small, torch.stack(specialists), banned=score.isneginf())
            found.append(fuse(score, change, fusion_weights(score, change, tolerance=EXACT)))
        return torch.cat(found)


@pytest.fixture
def large(tiny_llama) -> LlamaForCausalLM:
    return tiny_llama(1, hidden_size=48, num_hidden_layers=3, initializer_range=0.15, eos_token_id=None)


@pytest.fixture
def small(tiny_llama) -> LlamaForCausalLM:
    return tiny_llama(2, initializer_range=0.15, eos_token_id=None)


@pytest.fixture
def tuned(small) -> list[LlamaForCausalLM]:
    return [moved(copy.deepcopy(small), seed) for seed in (1, 2)]


@pytest.fixture
def prompt() -> tuple[Tensor, Tensor]:
    """Two rows, the second padded to 5 on the left."""
    ids = torch.randint(2, 128, (2, 5), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return ids.masked_fill(mask == 0, PAD), mask


def moved(model: nn.Module, seed: int, only: str = "") -> nn.Module:
    """The model with noise on its weights, or on those with `only` in their name."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if only in name:
                value += 0.05 * torch.randn(value.shape, generator=generator)
    return model.eval()


def adapted(small: nn.Module, make: Callable[[], Any]) -> nn.Module:
    """The small base with two adapters that have left their start."""
    model = get_peft_model(small, make(), "tales")
    model.add_adapter("rhymes", make())
    return moved(moved(model, 1, ".tales"), 2, ".rhymes")


def reads(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda ids: model(ids, use_cache=False).logits.detach()


def generated(large: LlamaForCausalLM, prompt: tuple[Tensor, Tensor], processor: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    given = {"max_new_tokens": 6, "pad_token_id": PAD, "return_dict_in_generate": True, "output_scores": True}
    processors = [processor] if processor is not None else []
    return large.generate(prompt[0], attention_mask=prompt[1], logits_processor=processors, **given | options)


def same(found: Any, expected: Any) -> None:
    assert torch.equal(found.sequences, expected.sequences)
    for score, wanted in zip(found.scores, expected.scores, strict=True):
        torch.testing.assert_close(score, wanted, atol=1e-4, rtol=0)


def shapes_read(model: nn.Module) -> list[tuple[int, int]]:
    """[rows, positions] of each pass of a model from now on."""
    seen: list[tuple[int, int]] = []
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize("mode", MODES)
def test_models_with_caches_decode_as_if_every_text_were_read_anew(large, small, tuned, prompt, mode):
    fusion = DynamicLogitFusion(large, small, tuned, tolerance=EXACT).start(prompt[1])
    expected = generated(large, prompt, Anew(prompt[1], [reads(model) for model in (small, *tuned)]), **MODES[mode])
    passes = [shapes_read(model) for model in (small, *tuned)]
    found = generated(large, prompt, fusion, **MODES[mode])
    same(found, expected)
    assert not torch.equal(found.sequences, generated(large, prompt, None, **MODES[mode]).sequences)
    rows = 2 * (MODES[mode].get("num_beams") or MODES[mode].get("num_return_sequences") or 1)
    assert passes == [[(rows, 5), *[(rows, 1)] * 5]] * 3
    assert fusion.alpha.shape == (rows, 2)
    assert (fusion.alpha.count_nonzero(dim=1) == 1).all()


def test_beams_really_moved(large, small, tuned, prompt):
    fusion = DynamicLogitFusion(large, small, tuned, tolerance=EXACT).start(prompt[1])
    beams = generated(large, prompt, fusion, **MODES["beams"]).beam_indices
    assert any(len(set(row[row >= 0].tolist())) > 1 for row in beams)


@pytest.mark.parametrize(
    ("mode", "make"),
    [
        pytest.param("greedy", lambda: LoraConfig(r=4, target_modules=TARGETS), id="PEFT's LoRA"),
        pytest.param("beams", lambda: KaSA(r=4, target_modules=TARGETS), id="kasa"),
        pytest.param(
            "beams", lambda: AMLoRA(r=4, target_modules=TARGETS, granularity="prefix"), id="gates of the past"
        ),
    ],
)
def test_adapters_are_read_with_their_base_in_one_pass(large, small, prompt, mode, make):
    model = adapted(small, make)
    fusion = DynamicLogitFusion(large, model, ["tales", "rhymes"], tolerance=EXACT).start(prompt[1])

    def read(name: str | None) -> Callable[[Tensor], Tensor]:
        def logits(ids: Tensor) -> Tensor:
            if name is None:
                with model.disable_adapter():
                    return reads(model)(ids)
            model.set_adapter(name)
            return reads(model)(ids)

        return logits

    expected = generated(large, prompt, Anew(prompt[1], [read(None), read("tales"), read("rhymes")]), **MODES[mode])
    passes = shapes_read(model)
    same(generated(large, prompt, fusion, **MODES[mode]), expected)
    rows = 3 * 2 * MODES[mode].get("num_beams", 1)
    assert passes == [(rows, 5), *[(rows, 1)] * 5]


@pytest.mark.parametrize("mode", MODES)
def test_a_specialist_that_learnt_nothing_leaves_plain_decoding(large, small, prompt, mode):
    fusion = DynamicLogitFusion(large, small, [copy.deepcopy(small)]).start(prompt[1])
    found, plain = (generated(large, prompt, processor, **MODES[mode]) for processor in (fusion, None))
    assert torch.equal(found.sequences, plain.sequences)
    for score, wanted in zip(found.scores, plain.scores, strict=True):
        torch.testing.assert_close(score.log_softmax(-1), wanted.log_softmax(-1), atol=1e-5, rtol=0)


def test_a_large_model_that_is_the_small_base_decodes_as_the_specialist(small, tuned, prompt):
    fusion = DynamicLogitFusion(small, small, tuned[:1], tolerance=1e-7).start(prompt[1])
    found = generated(small, prompt, fusion)
    expected = generated(tuned[0], prompt, None)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(fusion.alpha, torch.ones(2, 1), atol=1e-3, rtol=0)


def test_a_large_model_says_what_a_small_one_was_taught(large, small):
    text = torch.tensor([[9, 17, 33, 64, 101] * 4])
    tuned = copy.deepcopy(small).train()
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        tuned(text, labels=text).loss.backward()
        optimizer.step()
    fusion = DynamicLogitFusion(large, small, [tuned.eval()])
    start = text[:, :7], torch.ones(1, 7, dtype=torch.long)
    assert torch.equal(generated(large, start, fusion).sequences, text[:, :13])
    assert not torch.equal(generated(large, start, None).sequences, text[:, :13])


@pytest.mark.parametrize("length", [1, 40])
def test_prompts_of_any_length_and_one_after_another(large, small, tuned, length):
    fusion = DynamicLogitFusion(large, small, tuned, tolerance=EXACT)
    models = [reads(model) for model in (small, *tuned)]
    for seed in (0, 1):
        ids = torch.randint(2, 128, (2, length), generator=torch.Generator().manual_seed(seed))
        prompt = ids, torch.ones_like(ids)
        same(generated(large, prompt, fusion), generated(large, prompt, Anew(prompt[1], models)))


def test_a_text_that_goes_on_after_an_answer_keeps_its_mask(large, small, tuned, prompt):
    fusion = DynamicLogitFusion(large, small, tuned, tolerance=EXACT).start(prompt[1])
    answered = generated(large, prompt, fusion).sequences
    ids = torch.cat([answered, torch.full((2, 2), 9)], dim=1)
    longer = ids, torch.cat([prompt[1], torch.ones(2, 8, dtype=torch.long)], dim=1)
    models = [reads(model) for model in (small, *tuned)]
    same(generated(large, longer, fusion), generated(large, longer, Anew(longer[1], models)))


@pytest.mark.parametrize("kind", ["learned positions", "no cache of keys"])
def test_other_architectures_are_read_rightly(large, prompt, kind):
    sizes = {"vocab_size": 128, "initializer_range": 0.15, "bos_token_id": None, "eos_token_id": None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "learned positions":
            small = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=16, **sizes)).eval()
        else:
            small = MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, **sizes)).eval()
    tuned = moved(copy.deepcopy(small), 1)
    expected = generated(large, prompt, Anew(prompt[1], [reads(small), reads(tuned)]), **MODES["beams"])
    passes = shapes_read(small)
    fusion = DynamicLogitFusion(large, small, [tuned], tolerance=EXACT).start(prompt[1])
    same(generated(large, prompt, fusion, **MODES["beams"]), expected)
    continued = kind == "learned positions"
    assert passes == [(6, 5), *[(6, 1 if continued else n) for n in range(6, 11)]]


def test_guesses_that_are_taken_back_are_read_again(large, small, tuned):
    ids = torch.tensor([[7, 8, 9, 7, 8, 9, 7, 8]])
    fusion = DynamicLogitFusion(large, small, tuned, tolerance=EXACT)
    # an end of text that is never said: lower versions of transformers look for guesses that hold one
    plain = generated(large, (ids, torch.ones_like(ids)), fusion, eos_token_id=0)
    guessed = generated(large, (ids, torch.ones_like(ids)), fusion, prompt_lookup_num_tokens=3, eos_token_id=0)
    assert not (plain.sequences == 0).any()
    same(guessed, plain)


def test_padding_after_the_shared_vocabulary_is_never_said(tiny_llama, small, tuned, prompt):
    large = tiny_llama(1, vocab_size=136, initializer_range=0.15, eos_token_id=None)
    wider = tiny_llama(3, vocab_size=130, initializer_range=0.15)
    fusion = DynamicLogitFusion(large, small, [*tuned, wider], vocabulary=128).start(prompt[1])
    found = generated(large, prompt, fusion)
    for score in found.scores:
        assert score.shape == (2, 136)
        assert score[:, 128:].isneginf().all()
        assert score[:, :128].isfinite().all()
    assert found.sequences.max() < 128
    with pytest.raises(ValueError, match="the prompt has token 130, but the models share 128 tokens"):
        large.generate(torch.tensor([[130]]), logits_processor=[fusion.start()], max_new_tokens=1)


def test_vocabularies_that_differ_are_refused_before_anything_runs(tiny_llama, tiny_tokenizer, large, small, tuned):
    other = tiny_llama(1, vocab_size=130)
    listed = "the large model has 130, the small base has 128, specialist 1 has 128, specialist 2 has 128"
    with pytest.raises(ValueError, match=f"one vocabulary, but of tokens {listed}"):
        DynamicLogitFusion(other, small, tuned)
    with pytest.raises(
        ValueError, match=r"the large model has 128, the small base has 128, specialist 1 has 130; .* say"
    ):
        DynamicLogitFusion(large, small, [other])
    with pytest.raises(ValueError, match="vocabulary is 129, but of tokens the large model has 130"):
        DynamicLogitFusion(other, small, tuned, vocabulary=129)
    words = {token: i for token, i in tiny_tokenizer.get_vocab().items() if i != 100}
    fewer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="a")))
    longer = copy.deepcopy(tiny_tokenizer)
    longer.add_tokens(["<new>"])
    DynamicLogitFusion(large, small, tuned, tokenizers=[tiny_tokenizer, longer])
    DynamicLogitFusion(large, small, tuned, tokenizers=[tiny_tokenizer, fewer], vocabulary=100)
    missing = repr(tiny_tokenizer.convert_ids_to_tokens(100))
    with pytest.raises(ValueError, match=f"token 100 is {missing} for the first tokenizer and None for number 2"):
        DynamicLogitFusion(large, small, tuned, tokenizers=[tiny_tokenizer, fewer])


def test_example_of_the_docstring_runs(capsys):
    example = inspect.cleandoc(DynamicLogitFusion.__doc__).partition("\nExample:\n")[2].partition("\nArgs:\n")[0]
    exec(inspect.cleandoc(example), {"__name__": "__main__"})
    assert capsys.readouterr().out.count("tensor(") == 2


def test_models_that_cannot_be_read_are_refused(tiny_t5, large, small, tuned):
    def fused(base: Any, specialists: Any, **options: Any) -> DynamicLogitFusion:
        return DynamicLogitFusion(large, base, specialists, **options)

    with pytest.raises(ValueError, match="at least one specialist"):
        fused(small, [])
    with pytest.raises(ValueError, match="all models or all names"):
        fused(small, [tuned[0], "tales"])
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        fused(small, [tiny_t5()])
    with pytest.raises(ValueError, match="training mode"):
        fused(small, [copy.deepcopy(small).train()])
    with pytest.raises(ValueError, match="has no adapter tales; it has none"):
        fused(small, ["tales"])
    with pytest.raises(ValueError, match="objective is 'both', but must be one of symmetric, forward, reverse"):
        fused(small, tuned, objective="both")
    with pytest.raises(ValueError, match="must be above 0, but are 0 and"):
        fused(small, tuned, alpha_max=0)
    virtual = get_peft_model(
        copy.deepcopy(small), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    ).eval()
    with pytest.raises(ValueError, match="virtual tokens"):
        fused(small, [virtual])
    inside = get_peft_model(small, LoraConfig(r=2, target_modules=TARGETS)).eval()
    with pytest.raises(ValueError, match="the very layers of the small base"):
        fused(small, [inside])
    with pytest.raises(ValueError, match="has no adapter tales; it has default"):
        fused(inside, ["default", "tales"])


def test_prompts_and_masks_that_do_not_fit_are_refused(tiny_llama, large, small, tuned, prompt):
    fusion = DynamicLogitFusion(large, small, tuned)
    with pytest.raises(ValueError, match="begins with a padding token"):
        generated(large, prompt, fusion)
    with pytest.raises(ValueError, match="pad prompts on the left"):
        fusion.start(prompt[1].flip(1))
    with pytest.raises(ValueError, match=r"attention_mask is \[2, 4\], but the prompt is \[2, 5\]"):
        generated(large, prompt, fusion.start(prompt[1][:, 1:]))
    generated(large, prompt, fusion.start(prompt[1]))
    with pytest.raises(ValueError, match="another prompt than the last"):
        generated(large, (prompt[0].flip(0), prompt[1].flip(0)), fusion)
    with pytest.raises(ValueError, match="has 128 tokens, and the one that generates 130"):
        generated(tiny_llama(1, vocab_size=130), prompt, fusion.start(prompt[1]))
    short = tiny_llama(2, max_position_embeddings=8)
    with pytest.raises(ValueError, match="a text of 9 tokens is longer than the 8 positions of LlamaForCausalLM"):
        generated(large, prompt, DynamicLogitFusion(large, short, tuned).start(prompt[1]))
