"""Prompts before their question's last token: what tokens there would be to the model, in training and after it."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from folklora.prompts import PromptPool, SoftPrompt, prompts_of
from folklora.prompts.question import question_length
from folklora.stream.evaluate import _Reader, _score_rows, rank_labels

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def late(make_base, tokens):
    """`late(kind)`: a model whose soft prompt, before the question's last token, is what it embeds of `tokens`."""

    def make(kind):
        base = make_base(kind)
        task_type = "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"
        model = get_peft_model(base, SoftPrompt(prompt_length=3, place="answer", task_type=task_type)).eval()
        part = base.get_encoder() if base.config.is_encoder_decoder else base
        with torch.no_grad():
            prompts_of(model)["default"].embedding.copy_(part.get_input_embeddings()(tokens))
        return model

    return make


def put(row: list[int], at: int, tokens: torch.Tensor) -> torch.Tensor:
    return torch.tensor([[*row[:at], *tokens.tolist(), *row[at:]]])


@pytest.mark.parametrize("learnt", [0, 2])
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom"])
def test_the_answer_is_told_as_by_tokens_there(kind, left, learnt, late, make_base, rows, tokens):
    model, base = late(kind), make_base(kind)
    ids, mask = rows(left)
    labels = torch.full_like(ids, -100)
    given = {} if kind == "bloom" else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    lengths = mask.sum(1).tolist()
    first = [kept.index(1) for kept in mask.tolist()]
    if learnt:
        for row in (0, 1):
            end = first[row] + lengths[row]
            labels[row, end - learnt : end] = ids[row, end - learnt : end]
    found = model(input_ids=ids, attention_mask=mask, labels=labels, **given)
    for row, (start, count) in enumerate(zip(first, lengths, strict=True)):
        question = count - learnt if row < 2 else count
        own = ids[row, start : start + count].tolist()
        expected = base(input_ids=put(own, question - 1, tokens)).logits[0]
        kept = torch.cat([expected[: question - 1], expected[question + 2 :]])
        torch.testing.assert_close(found.logits[row, start : start + count], kept, **CLOSE)


def test_generation_agrees_with_and_without_cache_and_with_tokens(late, make_base, rows, tokens):
    model, base = late("llama"), make_base("llama")
    ids, mask = rows(left=True)
    asked = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    cached, plain = (
        model.generate(input_ids=ids, attention_mask=mask, **asked, use_cache=use) for use in (True, False)
    )
    assert torch.equal(cached, plain)
    beams = [
        model.generate(input_ids=ids, attention_mask=mask, num_beams=2, use_cache=use, **asked) for use in (False, True)
    ]
    assert torch.equal(*beams)
    for row, count in enumerate((6, 4, 1)):
        whole = put(ids[row, 6 - count :].tolist(), count - 1, tokens)
        theirs = base.generate(input_ids=whole, attention_mask=torch.ones_like(whole), **asked)
        assert torch.equal(cached[row, 6:], theirs[0, count + 3 :])
        theirs = base.generate(input_ids=whole, attention_mask=torch.ones_like(whole), num_beams=2, **asked)
        assert torch.equal(beams[0][row, 6:], theirs[0, count + 3 :])


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_an_encoder_reads_the_prompt_before_its_last_token(kind, left, late, make_base, rows, tokens):
    model, base = late(kind), make_base(kind)
    ids, mask = rows(left and kind == "t5")
    asked = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2, "pad_token_id": 1, "eos_token_id": None}
    decoded, found = torch.tensor([[0, 9, 8]]), model.generate(input_ids=ids, attention_mask=mask, **asked)
    read = model(input_ids=ids, attention_mask=mask, decoder_input_ids=decoded.expand(len(ids), -1)).logits
    for row, kept in enumerate(mask.bool()):
        own = ids[row, kept].tolist()
        whole = put(own, len(own) - 1, tokens)
        expected = base(input_ids=whole, decoder_input_ids=decoded).logits[0]
        torch.testing.assert_close(read[row], expected, **CLOSE)
        theirs = base.generate(input_ids=whole, attention_mask=torch.ones_like(whole), **asked)
        assert torch.equal(found[row], theirs[0])


@pytest.mark.parametrize("config", [SoftPrompt, PromptPool])
def test_labels_are_ranked_alike_from_the_cache_and_in_whole_rows(config, make_base, tiny_tokenizer):
    model = get_peft_model(make_base("llama"), config(prompt_length=3, place="answer", task_type="CAUSAL_LM")).eval()
    prompts, labels = ["xx: abc\nAnswer:", "a\nAnswer:", "abcdefgh"], [" yes", " positive", " negative"]
    found = rank_labels(model, tiny_tokenizer, prompts, labels)
    torch.testing.assert_close(found, rank_labels(model, tiny_tokenizer, prompts, labels, batch_size=1), **CLOSE)
    reader = _Reader.of(model, tiny_tokenizer)
    ids = [tiny_tokenizer(texts)["input_ids"] for texts in (prompts, labels)]
    with torch.no_grad():
        torch.testing.assert_close(_score_rows(reader, *ids, 4), found, **CLOSE)


def test_a_question_ends_before_the_first_token_that_is_learnt():
    rows = torch.zeros(4, 5)
    mask = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    labels = torch.full((4, 5), -100)
    labels[0, 2:4], labels[1, 4], labels[2, 1], labels[3] = 7, 7, 7, 7
    assert question_length(rows, mask, labels).tolist() == [2, 3, 1, 0]
    assert question_length(rows, mask, None).tolist() == [4, 4, 5, 5]
    assert question_length(rows, None, labels[:, :3]).tolist() == [5] * 4


def test_what_cannot_be_is_refused_in_words(late, make_base):
    with pytest.raises(ValueError, match="place must be front or answer, not 'end'"):
        SoftPrompt(place="end")
    model = late("llama")
    with pytest.raises(ValueError, match="stand at one place: at 'answer', not at 'front'"):
        model.add_adapter("other", SoftPrompt(prompt_length=2, task_type="CAUSAL_LM"))
    ids, mask = torch.full((1, 4), 5), torch.tensor([[1, 0, 1, 1]])
    with pytest.raises(ValueError, match="the attention mask has a hole"):
        model(input_ids=ids, attention_mask=mask)
