from __future__ import annotations

import logging
import warnings

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from tokenizers.processors import TemplateProcessing
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from folklora.adapters.am_lora import AMLoRA
from folklora.stream import evaluate as module
from folklora.stream.evaluate import evaluate, generate_answers, normalise, rank_labels
from folklora.stream.tasks import Example, Task

PROMPTS = [
    "a good film\nAnswer:",
    "x:",
    "The quick brown fox jumps over the lazy dog; was it bad?\nAnswer:",
    "1 + 1 = 2, is it so?\nAnswer:",
    "no\nAnswer:",
]
LABELS = [" yes", " positive", " negative", " no", " of several words"]
# differences of float32 log-likelihoods of up to 20 tokens, each of size 10, summed in another order
TOLERANCE = 1e-4
LIVELY = {"initializer_range": 0.3}


def _with_bos(tokenizer):
    copy = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str()),
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        bos_token="@",
    )
    copy.backend_tokenizer.post_processor = TemplateProcessing(
        single="@ $A <|endoftext|>", special_tokens=[("@", copy.bos_token_id), ("<|endoftext|>", 0)]
    )
    return copy


def _one_by_one(model, tokenizer, prompts, labels, begin=(), end=()):
    """No batch, no padding, no cache: one forward a pair."""
    encoder_decoder = model.config.is_encoder_decoder
    scores = torch.empty(len(prompts), len(labels))
    for i, prompt in enumerate(prompts):
        for j, label in enumerate(labels):
            question = [*begin, *tokenizer(prompt, add_special_tokens=False).input_ids]
            answer = [*tokenizer(label, add_special_tokens=False).input_ids, *end]
            with torch.no_grad():
                if encoder_decoder:
                    read = torch.tensor([[1, *answer[:-1]]])
                    logits = model(input_ids=torch.tensor([question]), decoder_input_ids=read).logits[0]
                else:
                    logits = model(input_ids=torch.tensor([question + answer])).logits[0, len(question) - 1 : -1]
            chosen = logits.double().log_softmax(-1)[range(len(answer)), answer]
            scores[i, j] = chosen.sum()
    return scores


def _agree(scores, expected):
    assert scores.dtype == torch.float32
    assert scores.shape == expected.shape
    torch.testing.assert_close(scores, expected, atol=TOLERANCE, rtol=0)
    assert scores.argsort(dim=1).equal(expected.argsort(dim=1))


def _families(tiny_llama, tiny_t5):
    sizes = {"vocab_size": 128, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}
    torch.manual_seed(0)
    mistral = MistralConfig(
        **sizes,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
        **LIVELY,
    )
    mamba = MambaConfig(**sizes, hidden_size=16, state_size=4, num_hidden_layers=2, **LIVELY)
    return {
        "llama": lambda: tiny_llama(**LIVELY),
        "t5": lambda: tiny_t5(initializer_factor=2.0),
        "learned positions": lambda: GPT2LMHeadModel(GPT2Config(**sizes, n_embd=32, n_layer=2, n_head=4, **LIVELY)),
        "sliding window": lambda: MistralForCausalLM(mistral),
        "recurrent": lambda: MambaForCausalLM(mamba),
    }


@pytest.mark.parametrize("family", ["llama", "t5", "learned positions", "sliding window", "recurrent"])
@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_rank_labels_gives_the_likelihood_of_each_pair_read_alone(
    family, batch_size, tiny_llama, tiny_t5, tiny_tokenizer
):
    model = _families(tiny_llama, tiny_t5)[family]().eval()
    scores = rank_labels(model, tiny_tokenizer, PROMPTS, LABELS, batch_size=batch_size)
    _agree(scores, _one_by_one(model, tiny_tokenizer, PROMPTS, LABELS))
    assert scores.std() > 0.1  # the model tells the labels apart, so an order can be wrong


@pytest.mark.parametrize("family", ["llama", "learned positions", "sliding window"])
def test_continuing_from_the_cache_and_reading_all_again_agree(
    family, tiny_llama, tiny_t5, tiny_tokenizer, monkeypatch
):
    model = _families(tiny_llama, tiny_t5)[family]().eval()
    reread = []
    original = module._score_rows
    monkeypatch.setattr(module, "_score_rows", lambda *given: reread.append(1) or original(*given))
    scores = rank_labels(model, tiny_tokenizer, PROMPTS, LABELS)
    assert not reread
    reader = module._Reader.of(model, tiny_tokenizer)
    tokens = tiny_tokenizer(PROMPTS).input_ids, tiny_tokenizer(LABELS).input_ids
    with torch.no_grad():
        _agree(scores, original(reader, *tokens, 7))


def test_prompts_are_read_once_and_all_labels_together(tiny_llama, tiny_tokenizer):
    model = tiny_llama()
    shapes = []
    model.register_forward_pre_hook(
        lambda _, args, given: shapes.append((tuple(given["input_ids"].shape), given["logits_to_keep"])),
        with_kwargs=True,
    )
    rank_labels(model, tiny_tokenizer, PROMPTS, [" yes", " no"])
    width = max(map(len, tiny_tokenizer(PROMPTS).input_ids))
    assert shapes == [((5, width), 1)]
    rank_labels(model, tiny_tokenizer, PROMPTS, [" yes", " positive", " negative"])
    longest = len(tiny_tokenizer(" negative").input_ids)
    assert shapes[1:] == [((5, width), 1), ((10, longest - 1), longest - 1)]


def test_the_encoder_reads_prompts_once(tiny_t5, tiny_tokenizer):
    model = tiny_t5()
    rows = []
    model.encoder.register_forward_pre_hook(
        lambda _, args, given: rows.append(given["input_ids"].shape[0]), with_kwargs=True
    )
    rank_labels(model, tiny_tokenizer, PROMPTS, LABELS, batch_size=2)
    assert rows == [2, 2, 1]


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_peft_models_rank_and_generate(kind, tiny_llama, tiny_t5, tiny_tokenizer):
    causal = kind == "llama"
    base = tiny_llama(**LIVELY) if causal else tiny_t5(initializer_factor=2.0)
    plain = rank_labels(base, tiny_tokenizer, PROMPTS, LABELS)
    config = LoraConfig(
        target_modules=["q_proj", "v_proj"] if causal else ["q", "v"],
        init_lora_weights=False,
        task_type=TaskType.CAUSAL_LM if causal else TaskType.SEQ_2_SEQ_LM,
    )
    torch.manual_seed(0)
    model = get_peft_model(base, config).eval()
    scores = rank_labels(model, tiny_tokenizer, PROMPTS, LABELS)
    assert (scores - plain).abs().max() > 0.1
    _agree(scores, _one_by_one(model, tiny_tokenizer, PROMPTS, LABELS))
    answers = generate_answers(model, tiny_tokenizer, PROMPTS, max_new_tokens=5)
    with model.disable_adapter():
        assert answers != generate_answers(model, tiny_tokenizer, PROMPTS, max_new_tokens=5)


def test_an_adapter_that_sees_the_whole_sequence_reads_every_pair_in_full(tiny_llama, tiny_tokenizer):
    torch.manual_seed(0)
    config = AMLoRA(r=2, target_modules=["q_proj", "v_proj"], granularity="sequence", task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(**LIVELY), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5)
    assert module._Reader.of(model, tiny_tokenizer).whole_sequence
    expected = torch.empty(len(PROMPTS), len(LABELS))
    for i, prompt in enumerate(tiny_tokenizer(PROMPTS).input_ids):
        for j, label in enumerate(tiny_tokenizer(LABELS).input_ids):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + label[:-1]])).logits[0, -len(label) :]
            expected[i, j] = logits.log_softmax(-1)[range(len(label)), label].sum()
    _agree(rank_labels(model, tiny_tokenizer, PROMPTS, LABELS), expected)
    alone = [generate_answers(model, tiny_tokenizer, [prompt], max_new_tokens=4)[0] for prompt in PROMPTS]
    assert generate_answers(model, tiny_tokenizer, PROMPTS, max_new_tokens=4) == alone


def test_prompt_tuning_is_ranked_with_its_virtual_tokens(tiny_llama, tiny_tokenizer):
    torch.manual_seed(0)
    config = PromptTuningConfig(num_virtual_tokens=3, task_type=TaskType.CAUSAL_LM)
    model = get_peft_model(tiny_llama(**LIVELY), config).eval()
    scores = rank_labels(model, tiny_tokenizer, PROMPTS, LABELS)
    expected = torch.empty(len(PROMPTS), len(LABELS))
    for i, prompt in enumerate(tiny_tokenizer(PROMPTS).input_ids):
        for j, label in enumerate(tiny_tokenizer(LABELS).input_ids):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + label])).logits[0, -len(label) - 1 : -1]
            expected[i, j] = logits.log_softmax(-1)[range(len(label)), label].sum()
    _agree(scores, expected)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_the_end_is_appended_only_where_one_label_begins_another(kind, tiny_llama, tiny_t5, tiny_tokenizer):
    model = tiny_llama(**LIVELY) if kind == "llama" else tiny_t5(initializer_factor=2.0)
    nested = [" no", " no, bad", " yes"]
    _agree(
        rank_labels(model, tiny_tokenizer, PROMPTS, nested),
        _one_by_one(model, tiny_tokenizer, PROMPTS, nested, end=[0]),
    )


def test_bos_leads_the_prompt_and_survives_the_cut(tiny_llama, tiny_tokenizer):
    model, tokenizer = tiny_llama(**LIVELY), _with_bos(tiny_tokenizer)
    bos = [tokenizer.bos_token_id]
    expected = _one_by_one(model, tokenizer, PROMPTS, LABELS, begin=bos)
    _agree(rank_labels(model, tokenizer, PROMPTS, LABELS), expected)
    _agree(rank_labels(model, tokenizer, ["@" + PROMPTS[0], *PROMPTS[1:]], LABELS), expected)
    longest = max(map(len, tokenizer(LABELS, add_special_tokens=False).input_ids))
    cut = [tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids[-6:]) for text in PROMPTS]
    assert cut != PROMPTS
    expected = _one_by_one(model, tokenizer, cut, LABELS, begin=bos)
    _agree(rank_labels(model, tokenizer, PROMPTS, LABELS, max_length=longest + 7), expected)


def test_an_encoder_reads_its_special_tokens_and_the_end_of_a_long_prompt(tiny_t5, tiny_tokenizer):
    model, tokenizer = tiny_t5(initializer_factor=2.0), _with_bos(tiny_tokenizer)
    cut = [tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids[-6:]) for text in PROMPTS]
    expected = _one_by_one(model, tiny_tokenizer, ["@" + text + "<|endoftext|>" for text in cut], LABELS)
    _agree(rank_labels(model, tokenizer, PROMPTS, LABELS, max_length=8), expected)


def test_a_tokenizer_without_padding_gives_the_same(tiny_llama, tiny_tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    assert bare.pad_token_id is None
    model = tiny_llama(**LIVELY)
    expected = rank_labels(model, tiny_tokenizer, PROMPTS, LABELS)
    assert rank_labels(model, bare, PROMPTS, LABELS).equal(expected)
    answers = generate_answers(model, bare, PROMPTS, max_new_tokens=5)
    assert answers == generate_answers(model, tiny_tokenizer, PROMPTS, max_new_tokens=5)


@pytest.mark.parametrize(
    ("labels", "given", "words"),
    [
        ([], {}, "no labels"),
        ([" yes", ""], {}, "no tokens"),
        ([" yes", " yes"], {}, "same tokens"),
        ([" yes", " no"], {"max_length": 1}, "max_length is too small"),
        ([" yes", " no"], {"batch_size": 0}, "batch_size"),
    ],
)
def test_what_cannot_be_ranked_is_said(labels, given, words, tiny_llama, tiny_tokenizer):
    with pytest.raises(ValueError, match=words):
        rank_labels(tiny_llama(), tiny_tokenizer, PROMPTS, labels, **given)


def test_an_empty_prompt_is_said(tiny_llama, tiny_tokenizer):
    with pytest.raises(ValueError, match="prompt 1"):
        rank_labels(tiny_llama(), tiny_tokenizer, ["x", ""], [" yes", " no"])


def test_no_prompts_give_no_scores(tiny_llama, tiny_tokenizer):
    assert rank_labels(tiny_llama(), tiny_tokenizer, [], [" yes", " no"]).shape == (0, 2)
    assert generate_answers(tiny_llama(), tiny_tokenizer, []) == []


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_greedy_answers_are_those_of_a_loop_by_hand(kind, tiny_llama, tiny_t5, tiny_tokenizer):
    causal = kind == "llama"
    model = tiny_llama(seed=3, **LIVELY) if causal else tiny_t5(seed=3, initializer_factor=2.0)
    expected = []
    for prompt in PROMPTS:
        question = tiny_tokenizer(prompt).input_ids
        answer: list[int] = []
        while len(answer) < 8 and 0 not in answer:
            with torch.no_grad():
                if causal:
                    logits = model(input_ids=torch.tensor([question + answer])).logits
                else:
                    read = torch.tensor([[1, *answer]])
                    logits = model(input_ids=torch.tensor([question]), decoder_input_ids=read).logits
            answer.append(int(logits[0, -1].argmax()))
        expected.append(tiny_tokenizer.decode([token for token in answer if token > 1]))
    assert generate_answers(model, tiny_tokenizer, PROMPTS, max_new_tokens=8, batch_size=2) == expected
    assert len(set(expected)) > 1


def test_generating_is_quiet(tiny_llama, tiny_tokenizer, caplog, monkeypatch):
    model = tiny_llama(pad_token_id=None)
    model.generation_config.temperature = 0.6
    model.generation_config.top_p, model.generation_config.top_k = 0.9, 20
    model.generation_config.do_sample = True
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate_answers(model, tiny_tokenizer, PROMPTS, max_new_tokens=3)
    assert not caplog.records


def test_an_answer_ends_at_any_end_of_text_token(tiny_llama, tiny_tokenizer):
    model = tiny_llama(seed=3, **LIVELY)
    whole = generate_answers(model, tiny_tokenizer, PROMPTS[:1], max_new_tokens=8)[0]
    first = tiny_tokenizer(whole, add_special_tokens=False).input_ids[0]
    model.generation_config.eos_token_id = [0, first]
    assert generate_answers(model, tiny_tokenizer, PROMPTS[:1], max_new_tokens=8) == [""]


def test_normalise_is_the_benchmarks_exact_match():
    assert normalise("Science or technology.") == normalise("Science or Technology")
    assert normalise("  a\tB,\n c ") == "a b c"
    assert normalise("yes") != normalise("no")
    assert normalise(" + ") == "+"
    assert normalise("+") != normalise("-")


def _task(labels):
    answers = [" yes", " no", " yes", " yes", " no"]
    examples = tuple(Example(prompt, answer) for prompt, answer in zip(PROMPTS, answers, strict=True))
    return Task("t", train=examples[:2], test=examples, labels=labels, validation=())


def test_rank_accuracy_counts_the_most_likely_label(tiny_llama, tiny_tokenizer):
    model = tiny_llama(seed=1, **LIVELY)
    task = _task((" no", " positive", " yes"))
    best = rank_labels(model, tiny_tokenizer, PROMPTS, task.labels).argmax(1).tolist()
    right = sum(task.labels[index] == example.completion for index, example in zip(best, task.test, strict=True))
    assert evaluate(model, tiny_tokenizer, task, batch_size=2) == pytest.approx(20.0 * right)
    assert evaluate(model, tiny_tokenizer, task, metric="rank", split="train") in (0.0, 50.0, 100.0)


def test_scores_of_a_model_that_knows_the_answers(tiny_llama, tiny_tokenizer):
    model = tiny_llama(tie_word_embeddings=False)
    yes, end = tiny_tokenizer(" yes").input_ids[0], 0
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.model.norm.weight.fill_(1.0)
        embedding = model.model.embed_tokens.weight
        embedding[yes] = 100.0 * torch.randn(32, generator=torch.Generator().manual_seed(0))
        final = model.model(input_ids=torch.tensor([[*tiny_tokenizer("x").input_ids, yes]])).last_hidden_state[0, -1]
        others = model.model(input_ids=torch.tensor([tiny_tokenizer("\nAnswer:").input_ids])).last_hidden_state[0, -1]
        model.lm_head.weight[end] = final - others
        model.lm_head.weight[yes] = others - final
    examples = tuple(
        Example(f"{text}\nAnswer:", answer) for text, answer in [("a", " yes"), ("b", " Yes."), ("c", " no")]
    )
    task = Task("t", (), examples, None)
    assert generate_answers(model, tiny_tokenizer, [e.prompt for e in examples]) == [" yes"] * 3
    assert evaluate(model, tiny_tokenizer, task) == pytest.approx(200 / 3)
    labelled = Task("t", (), (examples[0], examples[2]), (" no", " yes"))
    assert evaluate(model, tiny_tokenizer, labelled) == 50.0
    assert evaluate(model, tiny_tokenizer, labelled, metric="exact") == 50.0


@pytest.mark.parametrize(
    ("labels", "given", "words"),
    [
        (None, {"metric": "rank"}, "no labels to rank"),
        ((" no", " maybe"), {}, "' yes' is none of its labels"),
        ((" no", " yes"), {"split": "validation"}, "no validation examples"),
        ((" no", " yes"), {"split": "dev"}, "split must be"),
        ((" no", " yes"), {"metric": "f1"}, "metric must be"),
    ],
)
def test_what_cannot_be_evaluated_is_said(labels, given, words, tiny_llama, tiny_tokenizer):
    with pytest.raises(ValueError, match=words):
        evaluate(tiny_llama(), tiny_tokenizer, _task(labels), **given)


def test_the_model_is_left_as_it_was(tiny_llama, tiny_tokenizer):
    model = tiny_llama(attention_dropout=0.5)
    model.train()
    model.model.layers[0].eval()
    before = {name: part.training for name, part in model.named_modules()}
    first = rank_labels(model, tiny_tokenizer, PROMPTS, LABELS)
    assert first.equal(rank_labels(model, tiny_tokenizer, PROMPTS, LABELS))  # no dropout
    assert {name: part.training for name, part in model.named_modules()} == before
    handle = model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    with pytest.raises(RuntimeError, match="stop"):
        rank_labels(model, tiny_tokenizer, PROMPTS, LABELS)
    handle.remove()
    assert {name: part.training for name, part in model.named_modules()} == before
    ids = torch.tensor([tiny_tokenizer(PROMPTS[0]).input_ids])
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.lm_head.weight.grad is not None
