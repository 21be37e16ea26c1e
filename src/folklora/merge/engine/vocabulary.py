"""One vocabulary for models that have several: which row of each model's embeddings a token has."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from folklora.merge.engine.config import MergeConfig, Reference

_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The merged model's tokens.

    Args:
        tokenizer: Its tokenizer.
        size: How many rows its embeddings have.
        rows: Model → for each of these rows, the model's own row, or -1.
        donor: Token numbers of the model that the configuration comes from, by token.
    """

    tokenizer: PreTrainedTokenizerBase
    size: int
    rows: Mapping[Reference, Tensor]
    donor: Mapping[str, int]

    def translate(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A configuration with its token numbers as they are in this vocabulary, and its size."""
        tokens = {number: token for token, number in self.donor.items()}
        own = self.tokenizer.get_vocab()

        def number(old: Any) -> Any:
            if isinstance(old, list):
                return [number(entry) for entry in old]
            return own.get(tokens.get(old, ""), old)

        changed = {key: number(value) for key, value in config.items() if key.endswith("_token_id")}
        return {**config, **changed, **({"vocab_size": self.size} if "vocab_size" in config else {})}


def common_vocabulary(
    config: MergeConfig, folders: Mapping[Reference, Path], donor: Reference, sizes: Mapping[Reference, int]
) -> Vocabulary | None:
    """The merged model's vocabulary; None where the models have one and the same, and none was asked for.

    Args:
        config: The merge.
        folders: The models' folders.
        donor: The model that counts as the base.
        sizes: How many rows each model's embeddings have.

    Raises:
        ValueError: The tokenizers differ and the configuration does not say what to do; or one is not there.
    """
    if config.tokenizer is None:
        _check_same(folders)
        return None
    tokenizers = _tokenizers(folders)
    if isinstance(config.tokenizer, Reference):
        chosen, size = tokenizers[config.tokenizer], sizes[config.tokenizer]
    elif config.tokenizer == "base":
        chosen, size = tokenizers[donor], sizes[donor]
    else:
        others = [tokenizer for model, tokenizer in tokenizers.items() if model != donor]
        chosen, size = _union(_load(folders[donor]), others), sizes[donor]
    size = max(size, max(chosen.get_vocab().values()) + 1)
    if config.pad_to_multiple_of:
        size += -size % config.pad_to_multiple_of
    if config.chat_template:
        chosen.chat_template = config.chat_template
    rows = {model: _rows(chosen, tokenizers[model], size, sizes[model]) for model in folders}
    return Vocabulary(chosen, size, rows, tokenizers[donor].get_vocab())


def arranged(
    matrices: Mapping[Reference, Tensor], rows: Mapping[Reference, Tensor], base: Reference
) -> dict[Reference, Tensor]:
    """The models' embeddings with one row a token of the common vocabulary.

    A token that a model lacks has the base's row; where the base lacks it too, the mean of those that have it; where
    nobody has it, the mean of all other rows.

    Args:
        matrices: Model → its embeddings [its tokens, ...], float.
        rows: Model → for each token of the common vocabulary, its row, or -1.
        base: The model that counts as the base.
    """
    device = next(iter(matrices.values())).device
    own = {model: rows[model].to(device) for model in matrices}
    placed = {model: matrix[own[model].clamp(min=0)] for model, matrix in matrices.items()}
    known = {model: own[model] >= 0 for model in matrices}
    count = sum(mask.long() for mask in known.values())
    first = next(iter(placed.values()))
    wide = (-1, *([1] * (first.dim() - 1)))
    common = sum(values * known[model].view(wide) for model, values in placed.items()) / count.clamp(min=1).view(wide)
    if base in placed:
        common = torch.where(known[base].view(wide), placed[base], common)
    if (count == 0).any():
        common[count == 0] = common[count > 0].mean(0)
    return {model: torch.where(known[model].view(wide), values, common) for model, values in placed.items()}


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return any((folder / name).is_file() for name in _FILES)


def _load(folder: Path) -> PreTrainedTokenizerBase:
    if not has_tokenizer(folder):
        raise ValueError(f"{folder} holds no tokenizer, which tokenizer_source needs")
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _tokenizers(folders: Mapping[Reference, Path]) -> dict[Reference, PreTrainedTokenizerBase]:
    loaded: dict[Path, PreTrainedTokenizerBase] = {}
    for folder in folders.values():
        if folder not in loaded:
            loaded[folder] = _load(folder)
    return {model: loaded[folder] for model, folder in folders.items()}


def _union(tokenizer: PreTrainedTokenizerBase, others: Sequence[PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
    """The base's tokenizer with the others' tokens after its own, model by model as the configuration lists them.

    mergekit goes through a set of the models, so that its new tokens have other numbers from run to run: what both give
    a token is the same, but has to be compared by token.
    """
    for other in others:
        added = other.added_tokens_decoder
        have = tokenizer.get_vocab()
        for token, number in sorted(other.get_vocab().items(), key=lambda pair: pair[1]):
            if token not in have:
                entry = added.get(number, AddedToken(token, normalized=False))
                tokenizer.add_tokens(entry, special_tokens=entry.special)
    return tokenizer


def _rows(chosen: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase, size: int, own_size: int) -> Tensor:
    numbers = own.get_vocab()
    rows = torch.full((size,), -1, dtype=torch.long)
    for token, number in chosen.get_vocab().items():
        rows[number] = numbers.get(token, -1)
    # rows without a token fill the embeddings up; they stay where they are
    free = set(range(own_size)) - set(numbers.values())
    free -= set(chosen.get_vocab().values())
    for number in sorted(free):
        if number < size:
            rows[number] = number
    # a tokenizer may know tokens for which its model has no row
    return rows.masked_fill(rows >= own_size, -1)


def _check_same(folders: Mapping[Reference, Path]) -> None:
    present = {model: folder for model, folder in folders.items() if has_tokenizer(folder)}
    if len(set(present.values())) < 2:
        return
    (first, folder), *others = present.items()
    for model, other in others:
        if other == folder or _same_file(folder / _FILES[0], other / _FILES[0]):
            continue
        differing = _differing(_load(folder).get_vocab(), _load(other).get_vocab())
        if differing:
            raise ValueError(
                f"the tokenizers of {first} and {model} differ ({', '.join(map(repr, differing[:3]))}"
                f"{', ...' if len(differing) > 3 else ''}); tokenizer_source: union or base brings their embeddings "
                "into one order"
            )


def _differing(one: Mapping[str, int], other: Mapping[str, int]) -> list[str]:
    return [token for token in sorted({*one, *other}) if one.get(token) != other.get(token)]


def _same_file(one: Path, other: Path) -> bool:
    if not (one.is_file() and other.is_file()):
        return False
    read = [json.loads(path.read_text(encoding="utf-8")) for path in (one, other)]
    # padding and truncation change with each use, and no row with them
    return all(read[0].get(key) == read[1].get(key) for key in ("model", "added_tokens"))
