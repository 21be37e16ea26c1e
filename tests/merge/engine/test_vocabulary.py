"""Models with other tokenizers: every token keeps its row, whatever its number is in each model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from folklora.merge import average
from folklora.merge.engine import merge_models
from folklora.merge.engine.config import Reference
from folklora.merge.engine.vocabulary import arranged

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def with_tokens(tokenizer, added: list[str]) -> PreTrainedTokenizerFast:
    """A copy of a tokenizer that knows more tokens."""
    twin = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str()),
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
    )
    twin.add_tokens(added)
    return twin


@pytest.fixture(scope="module")
def models(tiny_llama, tiny_tokenizer, tmp_path_factory) -> Path:
    """base: 128 tokens in 130 rows; a: <x> and <y> after them; b: <y> and <z>."""
    root = tmp_path_factory.mktemp("models")
    added = {"base": [], "a": ["<x>", "<y>"], "b": ["<y>", "<z>"]}
    for seed, (name, tokens) in enumerate(added.items()):
        rows = 130 if name == "base" else 128 + len(tokens)
        tiny_llama(seed, vocab_size=rows, tie_word_embeddings=False).save_pretrained(root / name)
        with_tokens(tiny_tokenizer, tokens).save_pretrained(root / name)
    return root


def test_tokenizers_that_differ_are_refused_and_named(models, asked, tmp_path):
    with pytest.raises(ValueError, match=r"tokenizers of .*a and .*b differ \('<x>', '<y>', '<z>'\)"):
        merge_models(asked(models, "average", "a", "b"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_union_has_every_models_tokens_with_their_rows(models, asked, stored, tmp_path):
    config = asked(models, "average", "a", "b", base="base", tokenizer_source="union", dtype="float32")
    out = merge_models(config, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(out)
    vocabulary = tokenizer.get_vocab()
    assert [vocabulary[token] for token in ("<x>", "<y>", "<z>")] == [128, 129, 130]
    assert tokenizer("<z><x>")["input_ids"] == [130, 128]
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.vocab_size == 131
    assert model.config.eos_token_id == 0
    a, b = (stored(models / name) for name in ("a", "b"))
    for name in (EMBEDDING, HEAD):
        merged = dict(model.named_parameters())[name]
        assert torch.equal(merged[:128], average([a[name][:128], b[name][:128]]))
        # what one model lacks, it takes from the one that has it
        assert torch.equal(merged[128], a[name][128])
        assert torch.equal(merged[129], average([a[name][129], b[name][128]]))
        assert torch.equal(merged[130], b[name][129])
    other = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(stored(out)[other], average([a[other], b[other]]))


def test_the_bases_tokens_alone_keep_its_spare_rows(models, asked, stored, tmp_path):
    config = asked(models, "task_arithmetic", "a", base="base", tokenizer_source="base")
    merged = stored(merge_models(config, tmp_path / "out"))
    base, a = stored(models / "base"), stored(models / "a")
    assert merged[HEAD].shape[0] == 130
    assert torch.equal(merged[HEAD][128:], base[HEAD][128:])
    torch.testing.assert_close(merged[HEAD][:128], a[HEAD][:128], rtol=1e-6, atol=1e-6)


def test_a_models_tokens_in_another_order(models, asked, stored, tiny_llama, tiny_tokenizer, tmp_path):
    # two tokens change their numbers, one of them the end of text
    text = json.loads(tiny_tokenizer.backend_tokenizer.to_str())
    numbers = text["model"]["vocab"]
    numbers["<|endoftext|>"], numbers["a"] = numbers["a"], numbers["<|endoftext|>"]
    for entry in text["added_tokens"]:
        entry["id"] = numbers[entry["content"]]
    twin = PreTrainedTokenizerFast(
        tokenizer_object=type(tiny_tokenizer.backend_tokenizer).from_str(json.dumps(text)),
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
    )
    tiny_llama(5, tie_word_embeddings=False).save_pretrained(tmp_path / "c")
    twin.save_pretrained(tmp_path / "c")
    source = str(tmp_path / "c")
    config = asked(models, "passthrough", "a", tokenizer={"source": source, "pad_to_multiple_of": 16})
    merged, a = stored(merge_models(config, tmp_path / "out")), stored(models / "a")
    end, letter = numbers["<|endoftext|>"], numbers["a"]
    assert (end, letter) != (0, end)
    assert merged[HEAD].shape[0] == 128
    assert torch.equal(merged[HEAD][end], a[HEAD][0])
    assert torch.equal(merged[HEAD][0], a[HEAD][end])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == end
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == end


def test_missing_rows_come_from_the_base_then_from_the_mean():
    names = [Reference(name) for name in ("base", "a", "b")]
    matrices = {name: torch.arange(8.0).view(4, 2) + 10 * i for i, name in enumerate(names)}
    rows = dict(zip(names, torch.tensor([[0, 1, -1, -1, -1], [1, -1, 2, 3, -1], [3, -1, 0, -1, -1]]), strict=True))
    base, a, b = (arranged(matrices, rows, names[0])[name] for name in names)
    assert a[0].tolist() == [12, 13]
    assert a[1].tolist() == b[1].tolist() == base[1].tolist() == [2, 3]
    assert base[2].tolist() == [17, 18]
    assert b[3].tolist() == base[3].tolist() == [16, 17]
    # nobody has the last: the mean of what the others have in common
    common = torch.stack([base[0], base[1], base[2], base[3]]).mean(0)
    assert torch.equal(base[4], common)
    assert torch.equal(a[4], b[4])


def test_a_union_is_not_written_twice_by_a_tied_model(tiny_llama, tiny_tokenizer, asked, tmp_path):
    for seed, (name, tokens) in enumerate({"a": ["<x>"], "b": ["<y>"]}.items()):
        tiny_llama(seed, vocab_size=129, tie_word_embeddings=True).save_pretrained(tmp_path / name)
        with_tokens(tiny_tokenizer, tokens).save_pretrained(tmp_path / name)
    out = merge_models(asked(tmp_path, "average", "a", "b", tokenizer_source="union"), tmp_path / "out")
    assert HEAD not in load_file(out / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.shape[0] == 130
