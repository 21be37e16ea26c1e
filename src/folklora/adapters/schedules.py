"""Schedules that methods ask for, for any trainer: blocks that stay frozen, weight decay that fades out."""

from __future__ import annotations

import math
import re
from typing import Any

from torch import nn
from torch.optim import Optimizer

_FROM, _STEP = "annealed_from", "annealed_steps"


def early_blocks(model: nn.Module, start: int) -> str:
    """The names of all layers in the blocks before `start`, as a regular expression for `exclude_modules`.

    The blocks are the longest `ModuleList` of the model that lies in no other (all of the longest, where several are
    equally long, such as an encoder's and a decoder's; of a language model with a shorter vision tower, the language
    model's). Works with every method and every form of `target_modules`.

        config = SoMA(target_modules="all-linear", exclude_modules=early_blocks(model, 8))

    Args:
        model: The model that will be adapted.
        start: Index of the first block to adapt; at least 1.

    Raises:
        ValueError: The model has no list of blocks, or `start` leaves none or excludes none.
    """
    lists: dict[str, int] = {}
    for name, part in model.named_modules():
        # experts may be more than blocks, and stand in lists of their own within each
        if isinstance(part, nn.ModuleList) and not name.startswith(tuple(f"{outer}." for outer in lists)):
            lists[name] = len(part)
    if not lists:
        raise ValueError(
            f"{type(model).__name__} has no list of blocks (nn.ModuleList); name layers in exclude_modules"
        )
    blocks = max(lists.values())
    if not 1 <= start < blocks:
        raise ValueError(f"start must be from 1 to {blocks - 1} for a model of {blocks} blocks, not {start}")
    names = "|".join(re.escape(name) for name, length in lists.items() if length == blocks)
    return rf"({names})\.({'|'.join(map(str, range(start)))})\..*"


def cosine_weight_decay(step: int, steps: int, start: float = 0.05, end: float = 1e-5) -> float:
    """SoMA's weight decay at a step: `start` at 0, down half a cosine, `end` from `steps` on.

        end + (start - end) (1 + cos(π step / steps)) / 2

    Args:
        step: Steps done.
        steps: Steps of the whole run.
        start: Weight decay of the first step.
        end: Weight decay at the end.
    """
    return end + (start - end) * (1 + math.cos(math.pi * min(step, steps) / steps)) / 2


def anneal_weight_decay(optimizer: Optimizer, steps: int, end: float = 1e-5) -> None:
    """Let an optimizer's weight decay fade along `cosine_weight_decay`, with nothing to call afterwards.

    A hook of the optimizer sets it before each of its steps, so this works in any trainer that is handed the
    optimizer (transformers' `Trainer(optimizers=(optimizer, None))`). Each parameter group goes from its own weight
    decay; a group with 0 stays at 0. The count of steps is kept in the groups, so that the optimizer's `state_dict`
    carries it: to resume, call this first and load the state then.

    Args:
        optimizer: Any optimizer whose groups have a `weight_decay`.
        steps: Optimizer steps of the whole run, at least 1.
        end: Weight decay after the last step.

    Raises:
        ValueError: `steps` is below 1, the optimizer has no weight decay to anneal, or it is annealed already.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    if not any(group.get("weight_decay") for group in optimizer.param_groups):
        raise ValueError(f"no group of this {type(optimizer).__name__} has a weight_decay above 0: nothing to anneal")
    if any(_STEP in group for group in optimizer.param_groups):
        raise ValueError("the weight decay of this optimizer is annealed already")
    for group in optimizer.param_groups:
        group[_FROM], group[_STEP] = group.get("weight_decay", 0.0), 0

    def set_weight_decay(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            # a group added later has its own weight decay from its first step on
            start, step = group.setdefault(_FROM, group.get("weight_decay", 0.0)), group.setdefault(_STEP, 0)
            if start:
                group["weight_decay"] = cosine_weight_decay(step, steps, start, end)
            group[_STEP] = step + 1

    optimizer.register_step_pre_hook(set_weight_decay)
