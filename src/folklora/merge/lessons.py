"""What several language models, each with its own tokeniser, say comes next in texts: read once, kept in one file.

own = read_texts(target, tokenizer, texts)
others = {"pythia": read_texts(pythia, its_tokenizer, texts), ...}
lessons = Lessons.of(own, others)
lessons.save("lessons.safetensors")
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from folklora.encoders import padded
from folklora.merge.tokenisations import Alignment, TokenMap, align, plain_tokens
from folklora.stream.files import replacing
from folklora.stream.tokens import IGNORED

TARGET = "target"
"""The name of the target's own, untrained, predictions among the teachers."""
_PARTS = ("tokens", "ends", "ids", "logits", "aligned", "losses")


@dataclass(frozen=True, eq=False)
class Reading:
    """What one model says of N texts, in its own tokens.

    Args:
        vocabulary: What each token stands for, by its number.
        tokens: For each text its tokens [L].
        ids: For each text the likeliest next tokens at each of its tokens, [L, k].
        logits: Theirs, [L, k] float32.
        losses: The mean cross-entropy of a token in each text, [N].
    """

    vocabulary: list[str]
    tokens: list[Tensor]
    ids: list[Tensor]
    logits: list[Tensor]
    losses: Tensor


@torch.no_grad()
def read_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    top_k: int = 10,
    max_length: int = 512,
) -> Reading:
    """Let a model read texts, each to its end-of-text token.

    Args:
        model: A decoder; it is read in evaluation mode, and its own mode is restored.
        tokenizer: Its tokenizer.
        texts: N of them.
        top_k: k, the likeliest tokens whose logits are kept; what lies beyond is left out of the teaching.
        max_length: Tokens of a text; the rest is left out.

    Raises:
        ValueError: The model is no decoder, a text has less than two tokens, or k is below 1.
    """
    if model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} is an encoder-decoder; only decoders say what comes next in a text")
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}")
    rows = [_tokens(tokenizer, text, max_length) for text in texts]
    if short := [number for number, row in enumerate(rows) if len(row) < 2]:
        raise ValueError(f"text {short[0]} has fewer than two tokens, so that nothing comes next: {texts[short[0]]!r}")
    vocabulary = plain_tokens(tokenizer)
    ids, logits, losses, training = [], [], [], model.training
    model.eval()
    try:
        for tokens, mask in padded(tokenizer, rows, model.device):
            # a model may have more rows than its tokenizer tokens
            read = model(input_ids=tokens, attention_mask=mask).logits[..., : len(vocabulary)].float()
            best = read.topk(min(top_k, read.shape[-1]), dim=-1)
            for row, length in enumerate(mask.sum(1).tolist()):
                ids.append(best.indices[row, :length].cpu())
                logits.append(best.values[row, :length].cpu())
                losses.append(F.cross_entropy(read[row, : length - 1], tokens[row, 1:length]).cpu())
    finally:
        model.train(training)
    return Reading(vocabulary, [torch.tensor(row) for row in rows], ids, logits, torch.stack(losses))


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, max_length: int) -> list[int]:
    row, end = list(tokenizer(text, verbose=False)["input_ids"]), tokenizer.eos_token_id
    return (row if end is None or row[-1:] == [end] else [*row, end])[:max_length]


@dataclass(frozen=True, eq=False)
class Lessons(Dataset):
    """N texts in the target's tokens, T in all, with what M teachers say comes next; a data set for training.

    Args:
        names: The teachers', the target itself first.
        tokens: [T].
        ends: Where each text ends, [N].
        ids: The teachers' likeliest next tokens, in the target's numbers, [T, M, k]; one may be there twice.
        logits: Theirs, [T, M, k].
        aligned: Whether a teacher has a token there, [T, M]; where not, its ids and logits mean nothing.
        losses: The mean cross-entropy of a token, each teacher by its own tokens, [N, M].
    """

    names: list[str]
    tokens: Tensor
    ends: Tensor
    ids: Tensor
    logits: Tensor
    aligned: Tensor
    losses: Tensor

    @classmethod
    def of(cls, target: Reading, sources: Mapping[str, Reading], alignment: Alignment = "soft") -> Lessons:
        """Put what models with their own tokenisers said into the target's tokens.

        Args:
            target: The target's reading of the texts, before it is trained.
            sources: Each source's reading of the same texts.
            alignment: See `folklora.merge.tokenisations.align`.

        Raises:
            ValueError: A source is named as the target is, or read other texts or another number of logits.
        """
        if TARGET in sources:
            raise ValueError(f"'{TARGET}' is the target itself; name the source otherwise")
        k = target.ids[0].shape[1]
        wrong = [name for name, own in sources.items() if len(own.ids) != len(target.ids) or own.ids[0].shape[1] != k]
        if wrong:
            raise ValueError(f"{', '.join(wrong)} read other texts than the target, or kept other than {k} logits")
        ids, logits = [torch.cat(target.ids)], [torch.cat(target.logits)]
        aligned = [torch.ones(len(ids[0]), dtype=torch.bool)]
        for source in sources.values():
            tokens = TokenMap(source.vocabulary, target.vocabulary)
            places = [align(a, b, tokens, alignment) for a, b in zip(target.tokens, source.tokens, strict=True)]
            # where nothing is aligned any will do
            ids.append(tokens(torch.cat([own[at.clamp(min=0)] for own, at in zip(source.ids, places, strict=True)])))
            logits.append(torch.cat([own[at.clamp(min=0)] for own, at in zip(source.logits, places, strict=True)]))
            aligned.append(torch.cat(places) >= 0)
        return cls(
            [TARGET, *sources],
            torch.cat(target.tokens),
            torch.tensor([len(row) for row in target.tokens]).cumsum(0),
            torch.stack(ids, dim=1),
            torch.stack(logits, dim=1),
            torch.stack(aligned, dim=1),
            torch.stack([target.losses, *(source.losses for source in sources.values())], dim=1),
        )

    def alignment_rates(self) -> dict[str, float]:
        """The share of all tokens at which each teacher teaches; the others are taught by the text alone."""
        return dict(zip(self.names, self.aligned.double().mean(0).tolist(), strict=True))

    def __len__(self) -> int:
        """N."""
        return len(self.ends)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One text, its logits -inf where a teacher has no token; named as `FusionX` takes them."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self)} texts, and none of number {index}")
        index %= len(self)
        own = slice(int(self.ends[index - 1]) if index else 0, int(self.ends[index]))
        return {
            "input_ids": self.tokens[own],
            "teacher_ids": self.ids[own],
            "teacher_logits": self.logits[own].masked_fill(~self.aligned[own].unsqueeze(-1), -torch.inf),
            "teacher_losses": self.losses[index],
        }

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all."""
        values = {name: getattr(self, name).contiguous() for name in _PARTS}
        # no vocabulary has 2³¹ tokens
        values |= {name: values[name].int() for name in ("tokens", "ids")}
        with replacing(path) as temporary:
            save_file(values, temporary, metadata={"format": "pt", "names": json.dumps(self.names)})

    @classmethod
    def load(cls, path: str | Path) -> Lessons:
        """Read what `save` wrote.

        Raises:
            ValueError: The file holds something else.
        """
        with safe_open(path, framework="pt") as file:
            names = (file.metadata() or {}).get("names")
            if names is None or set(file.keys()) != set(_PARTS):
                raise ValueError(f"{path} holds no lessons: it was not written by Lessons.save")
            values: dict[str, Any] = {name: file.get_tensor(name) for name in _PARTS}
        values |= {name: values[name].long() for name in ("tokens", "ids")}
        return cls(json.loads(names), **values)


@dataclass(frozen=True)
class Collator:
    """Texts of `Lessons` as one batch of `FusionX`, padded on the right.

    Where a teacher has no token it says what the text says next ("gold"), or nothing ("drop"). The published code says
    the token that stands there, so that the target is taught to repeat its input.

    Args:
        pad: The token that pads; it is not learnt.
        fallback: "gold" or "drop".
    """

    pad: int = 0
    fallback: Literal["gold", "drop"] = "gold"

    def __post_init__(self) -> None:
        if self.fallback not in ("gold", "drop"):
            raise ValueError(f"fallback must be 'gold' or 'drop', not {self.fallback!r}")

    def __call__(self, rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """input_ids, attention_mask and labels [B, L], teacher_ids and teacher_logits [B, L, M, k], teacher_losses."""
        tokens = [row["input_ids"] for row in rows]
        taught = [self._taught(row) for row in rows]
        return {
            "input_ids": pad_sequence(tokens, batch_first=True, padding_value=self.pad),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in tokens], batch_first=True),
            "labels": pad_sequence(tokens, batch_first=True, padding_value=IGNORED),
            "teacher_ids": pad_sequence([ids for ids, _ in taught], batch_first=True),
            "teacher_logits": pad_sequence([logits for _, logits in taught], batch_first=True),
            "teacher_losses": torch.stack([row["teacher_losses"] for row in rows]),
        }

    def _taught(self, row: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        ids, logits = row["teacher_ids"].clone(), row["teacher_logits"].clone()
        if self.fallback == "gold":
            silent = logits.isneginf().all(-1, keepdim=True)
            # after the last token nothing is learnt
            following = torch.cat([row["input_ids"][1:], row["input_ids"][-1:]])
            ids[..., :1] = torch.where(silent, following[:, None, None], ids[..., :1])
            logits[..., :1] = logits[..., :1].masked_fill(silent, 0.0)
        return ids, logits
