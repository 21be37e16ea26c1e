"""What a model says where it is taught: how a prompt is put to it, and the logits that answer tokens are read from."""

from __future__ import annotations

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
    two_sided = bool(model.config.is_encoder_decoder)
    row = encode(tokenizer, example, max_length, two_sided)
    batch = {key: torch.tensor([values], device=model.device) for key, values in row.items()}
    return at_answers(model(**batch).logits, batch["labels"], encoder_decoder=two_sided)
