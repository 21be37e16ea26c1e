"""Token ids of prompts, labels and whole examples, the same for training and for scoring."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from folklora.stream.tasks import Example

IGNORED = -100
"""The label of a position that is not learnt."""


def label_tokens(tokenizer: PreTrainedTokenizerBase, labels: Sequence[str]) -> list[list[int]]:
    """Token ids of labels; where one label begins another, all end with the end-of-text token.

    Raises:
        ValueError: There are no labels, one has no tokens, two have the same, or they cannot be told apart.
    """
    if not labels:
        raise ValueError("there are no labels to rank")
    tokens = [list(row) for row in tokenizer(list(labels), add_special_tokens=False, verbose=False)["input_ids"]]
    if empty := [label for label, row in zip(labels, tokens, strict=True) if not row]:
        raise ValueError(f"the label {empty[0]!r} has no tokens in this tokenizer")
    neighbours = list(itertools.pairwise(sorted(zip(tokens, labels, strict=True))))
    if same := [(one, other) for (first, one), (second, other) in neighbours if first == second]:
        raise ValueError(f"the labels {same[0][0]!r} and {same[0][1]!r} have the same tokens")
    # in sorted order a row that begins any other begins its neighbour
    if any(second[: len(first)] == first for (first, _), (second, _) in neighbours):
        if tokenizer.eos_token_id is None:
            raise ValueError("one label begins another, and the tokenizer has no end-of-text token to part them")
        tokens = [[*row, tokenizer.eos_token_id] for row in tokens]
    return tokens


def prompt_tokens(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], room: int, *, encoder_decoder: bool
) -> list[list[int]]:
    """Token ids of prompts, cut on the left to fit; what the tokenizer puts before a text (BOS) stays.

    Args:
        tokenizer: The model's.
        prompts: Texts.
        room: Tokens that a prompt may have.
        encoder_decoder: Whether the prompt goes to an encoder, which also sees what the tokenizer puts after a text.

    Raises:
        ValueError: No room is left, or a prompt has no tokens.
    """
    if not prompts:
        return []
    before, after = _surroundings(tokenizer, prompts[0])
    after = after if encoder_decoder else []
    space = room - len(before) - len(after)
    if space < 1:
        raise ValueError(f"max_length is too small by {1 - space}: no room is left for a prompt")
    tokens = []
    for row in map(list, tokenizer(list(prompts), add_special_tokens=False, verbose=False)["input_ids"]):
        bare = row[len(before) :] if before and row[: len(before)] == before else row
        tokens.append([*before, *bare[-space:], *after])
    if not all(tokens):
        raise ValueError(f"prompt {tokens.index([])} ({prompts[tokens.index([])]!r}) has no tokens")
    return tokens


def encode(
    tokenizer: PreTrainedTokenizerBase, example: Example, max_length: int, encoder_decoder: bool = False
) -> dict[str, list[int]]:
    """Token ids of one example; the prompt gives way at its start where both do not fit.

    Args:
        tokenizer: The model's.
        example: Prompt and answer.
        max_length: Tokens in all (of each side for encoder-decoder models).
        encoder_decoder: Whether prompt and answer go to different sides.

    Returns:
        input_ids and labels; for causal models the prompt's labels are -100.

    Raises:
        ValueError: The answer alone fills the length.
    """
    answer = list(tokenizer(example.completion, add_special_tokens=False)["input_ids"])
    if tokenizer.eos_token_id is not None:
        answer.append(tokenizer.eos_token_id)
    room = max_length if encoder_decoder else max_length - len(answer)
    if room < 1 or len(answer) > max_length:
        raise ValueError(
            f"an answer of {len(answer)} tokens leaves no room for its prompt within max_length={max_length}"
        )
    (prompt,) = prompt_tokens(tokenizer, [example.prompt], room, encoder_decoder=encoder_decoder)
    if encoder_decoder:
        return {"input_ids": prompt, "labels": answer}
    return {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}


def _surroundings(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text."""
    bare = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    full = list(tokenizer(text, verbose=False)["input_ids"])
    begin = next((k for k in range(len(full)) if full[k : k + len(bare)] == bare), 0)
    return full[:begin], full[begin + len(bare) :]
