"""What a model says where it is taught: the logits that answer tokens are read from."""

from __future__ import annotations

from torch import Tensor

from folklora.stream.tokens import IGNORED


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
