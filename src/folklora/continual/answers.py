"""What a model says where it is taught: the logits that answer tokens are read from."""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import Tensor
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
    two_sided = bool(model.config.is_encoder_decoder)
    row = encode(tokenizer, example, max_length, two_sided)
    batch = {key: torch.tensor([values], device=model.device) for key, values in row.items()}
    return at_answers(model(**batch).logits, batch["labels"], encoder_decoder=two_sided)
