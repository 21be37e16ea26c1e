"""Tokens of two tokenisers: distances, warping and alignment against what is written out by hand."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Sequence

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from folklora.merge.tokenisations import TokenMap, align, edit_distances, nearest_strings, plain_tokens, warp

TEXTS = ["the small ship is in the harbour", "the ship is small", "a letter to the harbour", "it is naïve, is it?"]


def levenshtein(a: str, b: str) -> int:
    @functools.cache
    def at(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(at(i - 1, j) + 1, at(i, j - 1) + 1, at(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    return at(len(a), len(b))


def words(count: int, seed: int, longest: int = 6) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices("abcä", k=draw.randint(0, longest))) for _ in range(count)]


def least_cost(cost: Tensor) -> int:
    """The least cost of a path, over all paths."""

    @functools.cache
    def at(i: int, j: int) -> int:
        before = [at(a, b) for a, b in ((i - 1, j), (i, j - 1), (i - 1, j - 1)) if a >= 0 and b >= 0]
        return int(cost[i, j]) + (min(before) if before else 0)

    return at(cost.shape[0] - 1, cost.shape[1] - 1)


def test_edit_distances_are_those_of_the_recursion(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = words(30, 0), words(40, 1, longest=9)
    expected = torch.tensor([[levenshtein(a, b) for b in second] for a in first])
    assert torch.equal(edit_distances(first, second).long(), expected)
    assert torch.equal(edit_distances(second, first).long(), expected.T)
    # a few rows at a time
    monkeypatch.setattr("folklora.merge.tokenisations._HELD", 900)
    assert torch.equal(edit_distances(first, second).long(), expected)
    assert edit_distances([], second).shape == (0, 40)


@pytest.mark.parametrize("shortest", ["", "c", "caaaaaaaaaaaab"])
def test_the_nearest_string_is_the_first_of_the_nearest(shortest: str) -> None:
    first, second = words(40, 2), [shortest, *(f"{word}abcaba{shortest}" for word in words(60, 3, longest=9))]
    expected = [min(range(len(second)), key=lambda j: levenshtein(a, second[j])) for a in first]
    assert nearest_strings(first, second).tolist() == expected


@pytest.mark.parametrize("seed", range(8))
def test_a_warped_path_has_the_least_cost_and_goes_on_step_by_step(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    n, m = (int(torch.randint(1, 9, (), generator=draw)) for _ in range(2))
    cost = torch.randint(0, 4, (n, m), generator=draw)
    path, total = warp(cost)
    assert total == least_cost(cost) == sum(int(cost[place]) for place in path)
    assert warp(cost.T)[1] == total
    assert (path[0], path[-1]) == ((0, 0), (n - 1, m - 1))
    steps = {(c - a, d - b) for (a, b), (c, d) in itertools.pairwise(path)}
    assert steps <= {(0, 1), (1, 0), (1, 1)}


def test_warping_costs_nothing_for_equal_rows_alone() -> None:
    def total(one: Sequence[str], other: Sequence[str]) -> int:
        return warp(edit_distances(one, other))[1]

    rows = [list(row) for row in ("ab", "abc", "acb", "ba", "cab")]
    for one, other in itertools.product(rows, repeat=2):
        assert (total(one, other) == 0) == (one == other)
    path, _ = warp(edit_distances(["a", "b", "c"], ["a", "b", "c"]))
    assert path == [(0, 0), (1, 1), (2, 2)]


def wordpiece() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=60, special_tokens=["[PAD]", "[UNK]", "[SEP]"], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[SEP]")


def metaspace() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<s>", "</s>", "<unk>"], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|end|>")


@pytest.mark.parametrize("make", [wordpiece, metaspace, byte_level])
def test_tokens_are_the_text_with_a_space_where_a_word_begins(make: type) -> None:
    tokenizer = make()
    plain = plain_tokens(tokenizer)
    assert len(plain) == len(tokenizer)
    assert plain[tokenizer.eos_token_id] == "\0eos"
    for text in TEXTS[:3]:
        tokens = [plain[i] for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
        assert "".join(tokens).strip() == text
        assert sum(token.startswith(" ") for token in tokens) in (text.count(" "), text.count(" ") + 1)


def test_bytes_that_are_no_character_stay_apart() -> None:
    plain = plain_tokens(byte_level())
    assert len(set(plain)) == len(plain)
    assert " harbour" in plain
    assert "naïve".removeprefix("na")[0] in "".join(plain)


def test_single_bytes_of_other_tokenisers_are_the_same_characters() -> None:
    tokenizer = metaspace()
    tokenizer.add_tokens(["<0x0A>", "<0xC3>"])
    assert plain_tokens(tokenizer)[-2:] == ["\n", "<0xC3>"]
    assert "\n" in plain_tokens(byte_level())


def test_a_vocabulary_maps_to_itself_and_to_what_is_nearest() -> None:
    plain = plain_tokens(metaspace())
    ids = torch.arange(len(plain)).view(1, -1)
    assert torch.equal(TokenMap(plain, plain)(ids), ids)
    tokens = TokenMap([" ship", " ships", "\0eos", "zzz"], ["\0eos", "zz", " ship", " shop"])
    assert tokens(torch.tensor([[0, 1], [2, 3]])).tolist() == [[2, 2], [0, 1]]


def test_one_tokeniser_is_aligned_with_itself_everywhere() -> None:
    tokenizer = metaspace()
    plain, ids = plain_tokens(tokenizer), torch.tensor(tokenizer(TEXTS[0])["input_ids"])
    for alignment in ("hard", "soft"):
        assert align(ids, ids, TokenMap(plain, plain), alignment).tolist() == list(range(len(ids)))
    with pytest.raises(ValueError, match="one of soft, hard"):
        align(ids, ids, TokenMap(plain, plain), "none")


def test_what_is_one_token_in_both_is_aligned_and_what_is_cut_otherwise_is_not() -> None:
    target, source = [" the", " harbou", "r", "!", "\0eos"], [" the", " harbour", " !", "\0eos", "\0bos"]
    ids, others = torch.tensor([0, 1, 2, 3, 4]), torch.tensor([4, 0, 1, 2, 3])
    # " harbou" and "r" meet what they are not; to the source's " harbour" and " !" they and "!" are nearest
    assert align(ids, others, TokenMap(source, target), "hard").tolist() == [1, -1, -1, -1, 4]
    assert align(ids, others, TokenMap(source, target), "soft").tolist() == [1, 2, -1, 3, 4]
    # the other way round it meets two at once, and nothing meets what stands before the text
    assert align(others, ids, TokenMap(target, source), "hard").tolist() == [-1, 0, -1, -1, 4]
    both = torch.tensor([4, 0, 1, 2, 3, 4])
    assert align(both, both[1:], TokenMap(target, target), "hard").tolist() == [-1, 0, 1, 2, 3, 4]


def test_a_token_is_not_drawn_to_a_likeness_across_a_place_where_both_read_the_same() -> None:
    target, source = [" the", " harbour", " ", "x", "q"], [" the", " har", "bour", " x", "z", "y"]
    # "har" is nearer to "the" than to "harbour"
    cost = edit_distances(["the", "harbour"], ["the", "har", "bour"])
    assert warp(cost)[0] == [(0, 0), (0, 1), (1, 2)]
    found = align(torch.arange(5), torch.arange(6), TokenMap(source, target), "hard")
    assert found.tolist() == [0, -1, -1, -1, -1]
    # after the last such place the rest is warped as a whole
    twin = align(torch.arange(5), torch.tensor([0, 1, 3, 4]), TokenMap(target, target), "hard")
    assert twin.tolist() == [0, 1, -1, 2, 3]
    unlike = ["a", "b", "c", "d", "b"]
    other = align(torch.arange(5), torch.arange(1, 5), TokenMap(unlike, unlike), "hard")
    assert other.tolist() == [-1, 0, 1, 2, 3]


@pytest.mark.parametrize("makes", list(itertools.permutations([wordpiece, metaspace, byte_level], 2)))
def test_an_aligned_token_ends_the_same_text_in_both(makes: tuple[type, type]) -> None:
    target, source = (make() for make in makes)
    whole = [plain_tokens(target), plain_tokens(source)]
    for text in TEXTS[:3]:
        ids, others = (torch.tensor(t(text, add_special_tokens=False)["input_ids"]) for t in (target, source))
        found = align(ids, others, TokenMap(whole[1], whole[0]), "hard").tolist()
        assert max(found) >= 0
        for i, j in enumerate(found):
            if j >= 0:
                heads = (whole[0][t] for t in ids[: i + 1]), (whole[1][t] for t in others[: j + 1])
                assert "".join(heads[0]).strip() == "".join(heads[1]).strip()
