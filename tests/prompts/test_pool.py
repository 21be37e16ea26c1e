"""A pool of prompts with keys: what is chosen, by what, and where the gradients go."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model

from folklora.prompts import PromptPool, prompts_of
from folklora.prompts.pool import PromptPoolVectors
from folklora.prompts.question import mean_of, question_mask

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def pool(top_k: int, count: int = 5) -> PromptPoolVectors:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return PromptPoolVectors(torch.randn(count, 2, 8), top_k)


@pytest.fixture
def pooled(make_base):
    """`pooled(kind)`: a model with a pool of 5 prompts of 2 positions, of which a row takes 2."""

    def make(kind: str):
        base = make_base(kind)
        task_type = "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"
        torch.manual_seed(6)
        return get_peft_model(base, PromptPool(pool_size=5, top_k=2, prompt_length=2, task_type=task_type)).eval()

    return make


def test_a_query_equal_to_a_key_chooses_it():
    one = pool(top_k=1)
    found = one.vectors(one.keys.detach() * 3)
    assert torch.equal(found, one.embeddings)


def test_all_are_chosen_where_the_pool_holds_no_more_in_the_order_of_similarity():
    whole, query = pool(top_k=5), torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    similarity = torch.nn.functional.cosine_similarity(query[:, None].double(), whole.keys.double(), dim=-1)
    for row, found in zip(similarity, whole.vectors(query), strict=True):
        order = sorted(range(5), key=lambda j: -row[j].item())
        assert torch.equal(found, torch.cat([whole.embeddings[j] for j in order]))


def test_keys_learn_by_the_pull_alone_and_what_is_not_chosen_has_no_gradient():
    one = pool(top_k=2).train()
    query = one.keys.detach()[[0, 0]] + 0.1 * one.keys.detach()[[3, 3]]
    one.vectors(query).square().sum().backward()
    assert one.keys.grad is None
    chosen = one.embeddings.grad.flatten(1).any(dim=1)
    assert chosen.sum() == 2
    pull = one.pull()
    assert -2 <= pull.item() <= 2
    picked = torch.nn.functional.cosine_similarity(query[:1].double(), one.keys.double(), dim=1)[chosen]
    assert pull.item() == pytest.approx(picked.sum().item(), abs=1e-5)
    pull.backward()
    assert torch.equal(one.keys.grad.any(dim=1), chosen)
    assert one.pull() is None, "a pass is taken once"
    assert torch.equal(one.chosen > 0, chosen)
    assert one.chosen.sum() == 4


def test_training_alone_counts_and_is_turned_away_from_keys_chosen_before():
    one, query = pool(top_k=1), pool(top_k=1).keys.detach()[:1]
    one.frequency = torch.tensor([0.9, 0.025, 0.025, 0.025, 0.025])
    similarity = torch.nn.functional.cosine_similarity(query + 0.3, one.keys, dim=1)[None]
    assert one.eval().choose(similarity).item() == similarity.argmax().item() == 0
    distances = (1 - similarity[0]) * one.frequency
    assert one.train().choose(similarity).item() == distances.argmin().item() != 0
    with torch.no_grad():
        one.vectors(query)
    one.eval().vectors(query)
    assert one.chosen.sum() == 0
    assert one.pull() is None
    one.train().vectors(query)
    copy.deepcopy(one)  # although its graph was not taken


def test_a_question_is_what_is_not_learnt():
    rows = torch.zeros(4, 5)
    mask = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    labels = torch.full((4, 5), -100)
    labels[0, 2:4], labels[1, 4], labels[3] = 7, 7, 7
    expected = [[1, 1, 0, 0, 0], [0, 1, 1, 1, 0], [1] * 5, [1] * 5]
    assert question_mask(rows, mask, labels).tolist() == expected
    assert question_mask(rows, mask, None).tolist() == mask.tolist()
    assert question_mask(rows, None, labels[:, :3]).tolist() == torch.ones(4, 5).tolist()
    states = torch.arange(20.0).view(4, 5, 1)
    assert mean_of(states, question_mask(rows, mask, labels)).flatten().tolist() == [0.5, 7.0, 12.0, 17.0]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_each_row_chooses_by_the_frozen_models_reading_of_its_question(kind, pooled, make_base, rows):
    model, base = pooled(kind), make_base(kind)
    ids, mask = rows(left=True)
    part = base.get_encoder() if base.config.is_encoder_decoder else base.base_model
    start = {"decoder_input_ids": ids[:, :1]} if kind == "t5" else {}
    held = prompts_of(model)["default"]
    part_of_ours = model.get_base_model().get_encoder() if kind == "t5" else model.get_base_model().base_model
    embedded: list[torch.Tensor] = []
    part_of_ours.register_forward_pre_hook(
        lambda _, a, given: embedded.append(given["inputs_embeds"]), with_kwargs=True
    )
    # dropout must not matter to the choice
    model.train()(input_ids=ids, attention_mask=mask, **start)
    for row in range(3):
        real = mask[row].bool()
        states = part(input_ids=ids[row : row + 1, real])[0][0]
        cosine = torch.nn.functional.cosine_similarity(states.mean(0), held.keys, dim=1)
        first, second = cosine.topk(2).indices.tolist()
        expected = torch.cat([held.embeddings[first], held.embeddings[second]])
        begin = int((~real).sum())
        torch.testing.assert_close(embedded[-1][row, begin : begin + 4], expected)
    assert embedded[-1].shape[1] == 4 + ids.shape[1]


def test_the_answer_does_not_choose(pooled, rows):
    model = pooled("llama")
    held = prompts_of(model)["default"]
    ids, mask = rows(left=False)
    model.train()

    def similarity(answer: int) -> torch.Tensor:
        whole = torch.cat([ids[:1], torch.full((1, 3), answer)], dim=1)
        labels = whole.clone()
        labels[:, :6] = -100
        model(input_ids=whole, attention_mask=torch.ones_like(whole), labels=labels)
        return held.pull()

    torch.testing.assert_close(similarity(50), similarity(90))
    model(input_ids=ids[:1], attention_mask=mask[:1])
    torch.testing.assert_close(held.pull(), similarity(50), **CLOSE)


def test_generation_and_scores_agree_with_and_without_cache(pooled, rows, tiny_tokenizer):
    from folklora.stream.evaluate import _Reader, _score_rows, rank_labels

    model = pooled("llama")
    ids, mask = rows(left=True)
    asked = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    cached = model.generate(input_ids=ids, attention_mask=mask, **asked)
    assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **asked), cached)
    beams = [
        model.generate(input_ids=ids, attention_mask=mask, use_cache=use, num_beams=2, **asked) for use in (True, False)
    ]
    assert torch.equal(*beams)
    alone = model.generate(input_ids=ids[1:2, 2:], attention_mask=mask[1:2, 2:], **asked)
    assert torch.equal(alone[0, 4:], cached[1, 6:])
    prompts, labels = ["xx: abc\nAnswer:", "a\nAnswer:", "abcdefgh"], [" yes", " positive", " negative"]
    found = rank_labels(model, tiny_tokenizer, prompts, labels)
    torch.testing.assert_close(found, rank_labels(model, tiny_tokenizer, prompts, labels, batch_size=1), **CLOSE)
    # what a model that keeps no cache is scored by
    reader = _Reader.of(model, tiny_tokenizer)
    tokens = [tiny_tokenizer(texts)["input_ids"] for texts in (prompts, labels)]
    with torch.no_grad():
        torch.testing.assert_close(_score_rows(reader, *tokens, 4), found, **CLOSE)


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="top_k 6 is above pool_size 5"):
        PromptPool(pool_size=5, top_k=6)
    with pytest.raises(ValueError, match=r"pool_size must be a whole number of at least 1, not 2\.5"):
        PromptPool(pool_size=2.5)
