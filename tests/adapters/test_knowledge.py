"""What a domain adapter learns from: slots are masked to the token, a domain is learnt and general text kept."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from folklora import MixDA
from folklora.adapters.knowledge import domain_loss, knowledge_loss, mask_slots

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "the", "heart", "beats", "blood", "pump", "s", "a"]


def tokenizer(mask: bool = True) -> PreTrainedTokenizerFast:
    own = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[PAD]"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    own.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=own, pad_token="[PAD]", mask_token="[MASK]" if mask else None, padding_side="right"
    )


def test_slots_alone_are_masked() -> None:
    sentences = [("the {} beats a {}", ["heart", "heart"]), ("heart {}", ["blood pump"])]
    batch = mask_slots(tokenizer(), sentences)
    assert batch["input_ids"].tolist() == [[1, 4, 3, 6, 10, 3, 2], [1, 5, 3, 3, 2, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 5, -100, -100, 5, -100], [-100, -100, 7, 8, -100, -100, -100]]
    assert batch["attention_mask"].tolist()[1] == [1, 1, 1, 1, 1, 0, 0]
    # a causal model reads the words that it is to predict
    plain = mask_slots(tokenizer(mask=False), sentences)
    assert plain["input_ids"].tolist()[0] == [1, 4, 5, 6, 10, 5, 2]
    assert torch.equal(plain["labels"], batch["labels"])
    assert mask_slots(tokenizer(), sentences, max_length=4)["input_ids"].shape == (2, 4)


def test_slots_and_words_must_agree() -> None:
    with pytest.raises(ValueError, match=r"'the \{\} beats' has 1 slots, and there are 2 words"):
        mask_slots(tokenizer(), [("the {} beats", ["a", "heart"])])


MASK, GENERAL, DOMAIN = 14, 0, 7


def texts(first: int, rows: int, seed: int) -> dict[str, Tensor]:
    """Rows that say one of seven words again and again, with one word in four masked and labelled."""
    generator = torch.Generator().manual_seed(seed)
    tokens = (first + torch.randint(7, (rows, 1), generator=generator)).expand(-1, 8)
    masked = torch.rand(tokens.shape, generator=generator) < 0.25
    return {"input_ids": tokens.masked_fill(masked, MASK), "labels": tokens.masked_fill(~masked, -100)}


@pytest.fixture(scope="module")
def reader() -> BertForMaskedLM:
    """An encoder that knows the general words."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=MASK + 1,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        initializer_range=0.1,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForMaskedLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(100):
        model(**texts(GENERAL, 16, step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def losses(base: BertForMaskedLM, knowledge_alone: bool, **options: object) -> tuple[float, float]:
    """The masked words' loss on the domain and on general text, after learning the domain."""
    torch.manual_seed(1)
    fresh = BertForMaskedLM(base.config)
    fresh.load_state_dict(base.state_dict())
    model = get_peft_model(fresh, MixDA(reduction=2, gate_hidden=32, gate_bias=2.0, **options)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(50):
        domain, general = texts(DOMAIN, 16, 1000 + step), texts(GENERAL, 16, 5000 + step)
        loss = knowledge_loss(model, domain) if knowledge_alone else domain_loss(model, domain, general)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        return tuple(float(knowledge_loss(model, texts(first, 128, 9000))) for first in (DOMAIN, GENERAL))


def test_a_domain_is_learnt_and_general_text_kept(reader: BertForMaskedLM) -> None:
    with torch.no_grad():
        domain, general = (reader(**texts(first, 128, 9000)).loss.item() for first in (DOMAIN, GENERAL))
    learnt, kept = losses(reader, False)
    forgetful, lost = losses(reader, True)
    # measured: from 6.7 to 2.1; and from 0.04 to 0.2, or 4.4 without L_S
    assert learnt < domain / 2
    assert forgetful < domain / 2
    assert kept - general < (lost - general) / 4
