"""Two tokenisers' tokens side by side: which token is nearest to which, and where two rows of a text's tokens meet.

rapidfuzz and dtaidistance would do parts of this. Each is a compiled dependency for one step that is done once; one
token against a whole vocabulary is a few operations on tensors, and so is a row of a dynamic programme.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import torch
from tokenizers import decoders
from torch import Tensor
from transformers import PreTrainedTokenizerBase

Alignment = Literal["soft", "hard"]
_SPIECE, _BYTES, _PIECES = "▁", "Ġ", "##"
# a line's end, say, is such a byte; those above 7F are parts of characters
_BYTE = re.compile(r"<0x([0-7][0-9A-F])>")
_ROLES = ("pad", "unk", "bos", "eos")
_BEGINNINGS = ("\0bos", "\0eos")
# numbers of a table of edit distances that are held at once
_HELD = 2**23


def plain_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What each token stands for, by its number: a space where a word begins, whatever the tokeniser writes there.

    Tokens that end, begin or pad a text, or stand for the unknown, are named by that. A token that is no whole
    character is left as the tokeniser writes it.
    """
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    marks = {mark: sum(str(token).startswith(mark) for token in tokens) for mark in (_SPIECE, _BYTES, _PIECES)}
    mark = max(marks, key=marks.__getitem__) if any(marks.values()) else ""
    bytes_decoder = decoders.ByteLevel()
    plain = []
    for number, token in enumerate(tokens):
        if token is None:
            plain.append(f"\0{number}")
        elif mark == _SPIECE:
            byte = _BYTE.fullmatch(token)
            plain.append(chr(int(byte[1], 16)) if byte else token.replace(_SPIECE, " "))
        elif mark == _PIECES:
            plain.append(token.removeprefix(_PIECES) if token.startswith(_PIECES) else f" {token}")
        else:
            text = bytes_decoder.decode([token]) if mark == _BYTES else token
            plain.append(token if "\N{REPLACEMENT CHARACTER}" in text else text)
    # of several roles of one token, the end of a text counts
    for role in _ROLES:
        number = getattr(tokenizer, f"{role}_token_id")
        if number is not None:
            plain[number] = f"\0{role}"
    return plain


def edit_distances(first: Sequence[str], second: Sequence[str]) -> Tensor:
    """Levenshtein's distance of each string to each other one, [first, second] int32."""
    found = torch.zeros(len(first), len(second), dtype=torch.int32)
    codes, lengths = _codes(second)
    # the longest first, so that those that are finished stand at the end
    order = torch.tensor(sorted(range(len(first)), key=lambda i: -len(first[i])), dtype=torch.int64)
    step = torch.arange(codes.shape[1] + 1, dtype=torch.int32)[:, None, None]
    for rows in order.split(max(1, _HELD // (len(step) * max(1, len(second))))):
        own, sizes = _codes([first[i] for i in rows.tolist()])
        row, alive = step.expand(-1, len(rows), len(second)), len(rows)
        for i in range(own.shape[1] + 1):
            longer = int((sizes > i).sum())
            found[rows[longer:alive]] = row[:, longer:].gather(0, lengths.expand(1, alive - longer, -1))[0]
            if not longer:
                break
            row, alive = row[:, :longer], longer
            # from the row before: a change or none, a deletion; then insertions, along the row
            changed = row[:-1] + (own[:longer, i, None] != codes.mT[:, None]).int()
            row = torch.cat([row[:1] + 1, torch.minimum(changed, row[1:] + 1)])
            row = (row - step).cummin(0).values + step
    return found


def _codes(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Characters as numbers [texts, longest], -1 after the end, and the lengths [texts]."""
    lengths = torch.tensor([len(text) for text in texts], dtype=torch.int64)
    width = max(map(len, texts), default=0)
    rows = [[*map(ord, text), *[-1] * (width - len(text))] for text in texts]
    return torch.tensor(rows, dtype=torch.int64).view(len(texts), width), lengths


def nearest_strings(first: Sequence[str], second: Sequence[str]) -> Tensor:
    """For each string the number of the other one of least edit distance, of equals the first, [first] int64."""
    found = torch.zeros(len(first), dtype=torch.int64)
    shortest = min(map(len, second))
    for length in sorted({len(text) for text in first}):
        rows = [i for i, text in enumerate(first) if len(text) == length]
        # the shortest is at most this far, and what is longer by more is farther
        within = length + max(length, shortest)
        near = [j for j, text in enumerate(second) if len(text) <= within]
        distances = edit_distances([first[i] for i in rows], [second[j] for j in near])
        # of equals the first: argmin may give any
        places = torch.arange(len(near)).expand_as(distances)
        best = places.masked_fill(distances > distances.amin(1, keepdim=True), len(near)).amin(1)
        found[rows] = torch.tensor(near)[best]
    return found


class TokenMap:
    """Each token of a source as one of the target: the same where there is one, else that of least edit distance.

    A token that has no equal is compared with the whole target when it is first asked for, and not again.

    Args:
        source: The tokens of `plain_tokens`.
        target: Likewise.
    """

    def __init__(self, source: Sequence[str], target: Sequence[str]) -> None:
        self.source, self.target = list(source), list(target)
        places = {token: number for number, token in reversed(list(enumerate(target)))}
        self.table = torch.tensor([places.get(token, -1) for token in source])

    def __call__(self, ids: Tensor) -> Tensor:
        """The target's numbers, for the source's; of the same shape."""
        unknown = ids[self.table[ids] < 0].unique()
        if len(unknown):
            self.table[unknown] = nearest_strings([self.source[i] for i in unknown.tolist()], self.target)
        return self.table[ids]


def warp(cost: Tensor) -> tuple[list[tuple[int, int]], int]:
    """Dynamic time warping: the path from (0, 0) to (n - 1, m - 1) of least total cost, and that cost.

    A step goes on by one in one of the two or in both; of equals, in both.

    Args:
        cost: [n, m] of whole numbers, both at least 1.
    """
    cost = cost.long()
    rows: list[Tensor] = []
    for own in cost:
        sums = own.cumsum(0)
        if rows:
            above = rows[-1]
            entered = own + torch.minimum(above, torch.cat([above[:1], above[:-1]]))
            # then along the row, each place from the one before it
            rows.append((entered - sums).cummin(0).values + sums)
        else:
            rows.append(sums)
    table = torch.stack(rows).numpy()
    i, j = (size - 1 for size in table.shape)
    path = [(i, j)]
    while i or j:
        steps = [(a, b) for a, b in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if a >= 0 and b >= 0]
        i, j = min(steps, key=lambda place: table[place])
        path.append((i, j))
    return path[::-1], int(table[-1, -1])


def align(target: Tensor, source: Tensor, tokens: TokenMap, alignment: Alignment = "soft") -> Tensor:
    """For each token of a text the place of the same token in the source's tokens of that text, [n] int64, or -1.

    The two rows are warped onto each other, with the edit distance of two tokens without their leading space as the
    cost; what only one of the two puts before a text is left out. A token of the target that meets exactly one of the
    source has its place, if the two are equal ("hard"), or if the map takes the one to the other ("soft", which lets a
    teacher that has read a word of one letter more or less speak all the same). Ours: the path goes through each place
    where both have read the same characters, spaces aside; the pieces between are short, where whole rows would take
    n m distances, and a token is not drawn to a likeness on the other side of such a place.

    Args:
        target: The target's tokens of the text, [n].
        source: The source's, [m].
        tokens: From the source's to the target's.
        alignment: "soft" or "hard".
    """
    if alignment not in get_args(Alignment):
        raise ValueError(f"alignment must be one of {', '.join(get_args(Alignment))}, not {alignment!r}")
    wholes, rows = (tokens.target, tokens.source), [target, source]
    begun = [len(row) > 1 and whole[int(row[0])] in _BEGINNINGS for whole, row in zip(wholes, rows, strict=True)]
    # what only one of them puts before a text would be warped onto the other's first token
    skipped = [int(own and not all(begun)) for own in begun]
    strings = [
        [whole[i].removeprefix(" ") for i in row[skip:].tolist()]
        for whole, row, skip in zip(wholes, rows, skipped, strict=True)
    ]
    met: list[list[int]] = [[] for _ in target]
    for i, j in _path(*strings):
        met[i + skipped[0]].append(j + skipped[1])
    translated = tokens(source)
    found = torch.full((len(target),), -1)
    for i, those in enumerate(met):
        if len(those) != 1:
            continue
        j = those[0]
        equal = tokens.target[int(target[i])] == tokens.source[int(source[j])]
        if equal or (alignment == "soft" and bool(translated[j] == target[i])):
            found[i] = j
    return found


def _path(first: Sequence[str], second: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Which tokens meet, piece by piece."""
    i = j = 0
    for i_end, j_end in _same_text(first, second):
        one, other = first[i:i_end], second[j:j_end]
        if len(one) == len(other) == 1:
            yield i, j
        elif one and other:
            # a long piece repeats its tokens
            kinds = [{token: place for place, token in enumerate(dict.fromkeys(part))} for part in (one, other)]
            costs = edit_distances(list(kinds[0]), list(kinds[1]))
            costs = costs[[kinds[0][token] for token in one]][:, [kinds[1][token] for token in other]]
            yield from ((i + a, j + b) for a, b in warp(costs)[0])
        i, j = i_end, j_end


def _same_text(first: Sequence[str], second: Sequence[str]) -> list[tuple[int, int]]:
    """Numbers of tokens of each row that hold the same characters, and last those of all."""
    bare = [[token.replace(" ", "") for token in row] for row in (first, second)]
    texts = ["".join(row) for row in bare]
    differing = (k for k, (a, b) in enumerate(zip(*texts, strict=False)) if a != b)
    common = next(differing, min(map(len, texts)))
    # of tokens that end at the same character, since some are spaces alone, the last counts
    ends = [{end: i for i, end in enumerate(itertools.accumulate(map(len, row)), start=1)} for row in bare]
    places = [(i, ends[1][end]) for end, i in ends[0].items() if 0 < end <= common and end in ends[1]]
    return [*places, (len(first), len(second))]
