"""What a model says where it is taught: how a prompt is put to it, and the logits that answer tokens are read from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from folklora.stream.tasks import Example
from folklora.stream.tokens import IGNORED, encode


def at_answers(logits: Tensor, labels: Tensor, *, encoder_decoder: bool) -> tuple[Tensor, Tensor]:
    """The logits [n, vocabulary] from which the n tokens that are learnt are read, in float32, and those tokens [n].

    Args:
        logits: [rows, positions, vocabulary]; further positions before those of the labels are passed over.
        labels: [rows, positions], -100 where nothing is learnt.
        encoder_decoder: Whether position i tells token i; in a causal model it tells token i + 1.
    """
    # learnt prompts and prefixes stand before the tokens and have no labels
    logits = logits[:, -labels.shape[1] :]
    if not encoder_decoder:
        logits, labels = logits[:, :-1], labels[:, 1:]
    learnt = labels != IGNORED
    return logits[learnt].float(), labels[learnt]


def prompt_inputs(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: str) -> dict[str, Tensor]:
    """What to call a model with so that it reads one prompt; of an encoder-decoder, the decoder reads one token."""
    ids = torch.tensor([tokenizer(prompt, truncation=True)["input_ids"]], device=model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**inputs, "decoder_input_ids": ids[:, :1]} if model.config.is_encoder_decoder else inputs


def answer_of(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, example: Example, max_length: int
) -> tuple[Tensor, Tensor]:
    """The logits [n, vocabulary] from which one example's answer is read, given its prompt, and the answer's tokens.

    Args:
        model: It is run once, in the mode that it is in.
        tokenizer: Its tokenizer.
        example: Encoded as in training.
        max_length: As in training.
    """
    (read,) = answers_of(model, [encode(tokenizer, example, max_length, bool(model.config.is_encoder_decoder))])
    return read


def answers_of(model: PeftModel, rows: Sequence[Mapping[str, Sequence[int]]]) -> list[tuple[Tensor, Tensor]]:
    """What `answer_of` gives of each of several examples, from one call; shorter ones are padded on the right.

    Args:
        model: It is run once, in the mode that it is in.
        rows: The examples as `encode` gives them, all for this kind of model.
    """
    two_sided = bool(model.config.is_encoder_decoder)
    labels = _padded([row["labels"] for row in rows], IGNORED, model.device)
    batch = {"input_ids": _padded([row["input_ids"] for row in rows], 0, model.device), "labels": labels}
    for key, side in (("attention_mask", "input_ids"), ("decoder_attention_mask", "labels")):
        lengths = {len(row[side]) for row in rows}
        if len(lengths) > 1 and (two_sided or side == "input_ids"):
            batch[key] = _padded([[1] * len(row[side]) for row in rows], 0, model.device)
    read = at_answers(model(**batch).logits, labels, encoder_decoder=two_sided)
    # counted here, where the device need not be waited for
    counts = [sum(label != IGNORED for label in row["labels"][0 if two_sided else 1 :]) for row in rows]
    logits, answers = (part.split(counts) for part in read)
    return list(zip(logits, answers, strict=True))


def _padded(rows: Sequence[Sequence[int]], blank: int, device: torch.device) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[blank] * (longest - len(row))] for row in rows], device=device)
