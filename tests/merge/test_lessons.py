"""What teachers said of texts, in the target's tokens: with real models of different tokenisers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5ForConditionalGeneration,
)

from folklora.merge.lessons import TARGET, Collator, Lessons, Reading, read_texts
from folklora.merge.tokenisations import TokenMap, align

TEXTS = ["a good film\nAnswer: yes", "a bad film", "Answer: no, a good one"]


@pytest.fixture(scope="module")
def other_tokenizer() -> PreTrainedTokenizerFast:
    """Words after a ▁, with a token before each text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=48, special_tokens=["<s>", "</s>", "<unk>"], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def other_model(other_tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    torch.manual_seed(5)
    # with rows that stand for no token
    size = len(other_tokenizer) + 5
    return GPT2LMHeadModel(GPT2Config(vocab_size=size, n_embd=16, n_layer=1, n_head=2, n_positions=64)).train()


@pytest.fixture(scope="module")
def own(tiny_llama: Callable[..., LlamaForCausalLM], tiny_tokenizer: PreTrainedTokenizerFast) -> Reading:
    return read_texts(tiny_llama(), tiny_tokenizer, TEXTS, top_k=4)


@pytest.fixture(scope="module")
def other(other_model: GPT2LMHeadModel, other_tokenizer: PreTrainedTokenizerFast) -> Reading:
    return read_texts(other_model, other_tokenizer, TEXTS, top_k=4)


def test_a_reading_is_what_the_model_says_of_each_text_alone(
    other: Reading, other_model: GPT2LMHeadModel, other_tokenizer: PreTrainedTokenizerFast
) -> None:
    assert other_model.training, "its own mode is restored"
    model = other_model.eval()
    for number, text in enumerate(TEXTS):
        tokens = torch.tensor([*other_tokenizer(text)["input_ids"], other_tokenizer.eos_token_id])
        assert torch.equal(other.tokens[number], tokens)
        logits = model(tokens[None]).logits[0, :, : len(other_tokenizer)].detach()
        best = logits.topk(4)
        torch.testing.assert_close(other.logits[number], best.values, rtol=0, atol=1e-5)
        assert torch.equal(
            logits.gather(1, other.ids[number]).argsort(1, descending=True), torch.arange(4).expand(len(tokens), 4)
        )
        torch.testing.assert_close(other.losses[number], F.cross_entropy(logits[:-1], tokens[1:]), rtol=0, atol=1e-5)
    model.train()


def test_long_texts_are_cut_and_short_ones_refused(
    tiny_llama: Callable[..., LlamaForCausalLM],
    tiny_tokenizer: PreTrainedTokenizerFast,
    tiny_t5: Callable[..., T5ForConditionalGeneration],
) -> None:
    read = read_texts(tiny_llama(), tiny_tokenizer, TEXTS, max_length=4)
    assert [len(row) for row in read.tokens] == [4, 4, 4]
    with pytest.raises(ValueError, match="text 1 has fewer than two tokens"):
        read_texts(tiny_llama(), tiny_tokenizer, [TEXTS[0], ""])
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        read_texts(tiny_llama(), tiny_tokenizer, TEXTS, top_k=0)
    with pytest.raises(ValueError, match="only decoders"):
        read_texts(tiny_t5(), tiny_tokenizer, TEXTS)


def test_the_targets_own_words_and_an_equal_teachers_are_unchanged(own: Reading) -> None:
    lessons = Lessons.of(own, {"twin": own})
    assert lessons.names == [TARGET, "twin"]
    assert lessons.aligned.all()
    for m in range(2):
        assert torch.equal(lessons.ids[:, m], torch.cat(own.ids))
        assert torch.equal(lessons.logits[:, m], torch.cat(own.logits))
    assert lessons.alignment_rates() == {TARGET: 1.0, "twin": 1.0}
    assert len(lessons) == 3
    assert [row["input_ids"].tolist() for row in lessons] == [row.tolist() for row in own.tokens]
    assert torch.equal(lessons[-1]["input_ids"], own.tokens[2])
    assert torch.equal(lessons[2]["teacher_losses"], own.losses[2].expand(2))


@pytest.mark.parametrize("alignment", ["soft", "hard"])
def test_another_tokenisers_words_are_the_mapped_ones_where_aligned(
    own: Reading, other: Reading, alignment: str
) -> None:
    lessons = Lessons.of(own, {"other": other}, alignment)
    tokens, begin = TokenMap(other.vocabulary, own.vocabulary), 0
    for number, row in enumerate(own.tokens):
        for i, j in enumerate(align(row, other.tokens[number], tokens, alignment).tolist()):
            assert bool(lessons.aligned[begin + i, 1]) == (j >= 0)
            if j >= 0:
                assert torch.equal(lessons.ids[begin + i, 1], tokens(other.ids[number][j]))
                assert torch.equal(lessons.logits[begin + i, 1], other.logits[number][j])
        begin += len(row)
    assert 0 < lessons.alignment_rates()["other"] < 1
    assert torch.equal(lessons.losses, torch.stack([own.losses, other.losses], 1))


def test_lessons_come_back_from_their_file(own: Reading, other: Reading, tmp_path: Path) -> None:
    lessons = Lessons.of(own, {"other": other})
    lessons.save(tmp_path / "lessons.safetensors")
    again = Lessons.load(tmp_path / "lessons.safetensors")
    assert again.names == lessons.names
    for part in ("tokens", "ends", "ids", "logits", "aligned", "losses"):
        assert torch.equal(getattr(again, part), getattr(lessons, part))
        assert getattr(again, part).dtype == getattr(lessons, part).dtype
    assert [path.name for path in tmp_path.iterdir()] == ["lessons.safetensors"]
    save_file({"tokens": torch.zeros(1)}, tmp_path / "else.safetensors")
    with pytest.raises(ValueError, match="holds no lessons"):
        Lessons.load(tmp_path / "else.safetensors")


def test_what_does_not_fit_together_is_refused(own: Reading, other: Reading) -> None:
    with pytest.raises(ValueError, match="name the source otherwise"):
        Lessons.of(own, {TARGET: other})
    fewer = replace(other, ids=other.ids[:2])
    with pytest.raises(ValueError, match="fewer read other texts"):
        Lessons.of(own, {"other": other, "fewer": fewer})
    with pytest.raises(IndexError, match="there are 3 texts"):
        Lessons.of(own, {})[3]


@pytest.mark.parametrize("fallback", ["gold", "drop"])
def test_a_batch_pads_and_teaches_the_next_token_where_nobody_else_does(
    own: Reading, other: Reading, fallback: str
) -> None:
    lessons = Lessons.of(own, {"other": other})
    batch = Collator(pad=1, fallback=fallback)(list(lessons))
    longest = max(len(row) for row in own.tokens)
    assert batch["input_ids"].shape == (3, longest)
    assert batch["teacher_ids"].shape == batch["teacher_logits"].shape == (3, longest, 2, 4)
    assert torch.equal(batch["labels"] == -100, batch["attention_mask"] == 0)
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 1).all()
    p = batch["teacher_logits"].softmax(-1).nan_to_num()
    for row, item in zip(range(3), lessons, strict=True):
        for i in range(len(item["input_ids"]) - 1):
            if item["teacher_logits"][i, 1].isfinite().all():
                torch.testing.assert_close(p[row, i, 1], item["teacher_logits"][i, 1].softmax(-1))
                assert torch.equal(batch["teacher_ids"][row, i, 1], item["teacher_ids"][i, 1])
            elif fallback == "gold":
                assert p[row, i, 1].tolist() == [1.0, 0.0, 0.0, 0.0]
                assert batch["teacher_ids"][row, i, 1, 0] == item["input_ids"][i + 1]
            else:
                assert p[row, i, 1].tolist() == [0.0] * 4
    with pytest.raises(ValueError, match="'gold' or 'drop'"):
        Collator(fallback="copy")
