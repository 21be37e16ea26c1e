"""What a row asks, as the frozen model sees it: the mean of its last hidden states over the question's tokens."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_READ = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
_IGNORED = -100


@dataclass(frozen=True)
class Question:
    """What is known of the rows' questions.

    Args:
        length: How many real tokens each one has, [rows].
        query: What the frozen model makes of them, [rows, width]; None where no prompt reads it.
    """

    length: Tensor
    query: Tensor | None

    def of(self, rows: int) -> Question:
        """Those of so many rows: beams stand in equal runs of their row."""
        times = rows // len(self.length)
        query = None if self.query is None else self.query.repeat_interleave(times, dim=0)
        return Question(self.length.repeat_interleave(times), query)


def question_length(rows: Tensor, mask: Tensor | None, labels: Tensor | None) -> Tensor:
    """How many real tokens stand before the first that is learnt, [rows]; all of them where nothing is.

    Args:
        rows: As for `question_mask`, and the others too.
        mask: 1 for real tokens, or None where all are.
        labels: -100 for what is not learnt.
    """
    real = torch.ones(rows.shape[:2], device=rows.device) if mask is None else mask.ne(0).float()
    if labels is None or labels.shape != real.shape:
        return real.sum(dim=1).long()
    unlearnt = (labels == _IGNORED).float().cumprod(dim=1)
    return (real * unlearnt).sum(dim=1).long()


def question_mask(rows: Tensor, mask: Tensor | None, labels: Tensor | None) -> Tensor:
    """1 for the tokens of each row's question, [rows, positions].

    Those are the real tokens that are not learnt, so that an answer which is there in training alone does not count;
    in a row of which everything is learnt, all real tokens.

    Args:
        rows: Token ids or embeddings of the rows.
        mask: 1 for real tokens, or None where all are.
        labels: -100 for what is not learnt, of the same positions; None, or of others, where the rows are questions.
    """
    real = torch.ones(rows.shape[:2], device=rows.device) if mask is None else mask.ne(0).float()
    if labels is None or labels.shape != real.shape:
        return real
    asked = real * (labels == _IGNORED)
    return torch.where(asked.any(dim=1, keepdim=True), asked, real)


@torch.no_grad()
def frozen_pass(part: nn.Module, given: dict[str, Any]) -> Tensor:
    """The last hidden states [rows, positions, width] of the model without prompts and without dropout.

    Args:
        part: What embeds the tokens and reads them; its hooks are passed by.
        given: The arguments of its call.
    """
    known = {name: given[name] for name in _READ if given.get(name) is not None}
    accepted = inspect.signature(part.forward).parameters
    if "use_cache" in accepted:
        known["use_cache"] = False
    if "position_ids" in accepted and "attention_mask" in known:
        # padding on the left must not change what a row asks
        known.setdefault("position_ids", (known["attention_mask"].cumsum(dim=1) - 1).clamp(min=0))
    training = [module for module in part.modules() if module.training]
    part.eval()
    try:
        return part.forward(**known)[0]
    finally:
        for module in training:
            module.training = True


def mean_of(states: Tensor, mask: Tensor) -> Tensor:
    """[rows, width], the mean over the positions that the mask [rows, positions] names, in float32."""
    weights = mask.to(states.device).unsqueeze(-1)
    return (states.float() * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
