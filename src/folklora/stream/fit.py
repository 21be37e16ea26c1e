"""Whether the methods of a run fit its model: each is tried on a copy without values, before any work is done."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Sequence

import torch
from peft import PeftConfig
from transformers import PreTrainedModel

from folklora.adapters.base import AdapterConfig
from folklora.adapters.host.targets import nothing_matched, without_match
from folklora.adapters.lora import LoRA
from folklora.continual.base import ContinualMethod
from folklora.stream.peft_types import same_again


def check_fit(methods: Sequence[ContinualMethod], base: PreTrainedModel) -> None:
    """Try every method's adapter on a copy without values, so that a wrong target or rank is found before training.

    Raises:
        ValueError: An adapter does not fit, with the layers and what would be valid.
    """
    for method in methods:
        with torch.device("meta"):
            shell = type(base)(copy.deepcopy(base.config))
        trial = copy.copy(method)
        trial.adapter = copy.deepcopy(method.adapter)
        if isinstance(trial.adapter, AdapterConfig):
            trial.adapter.restoring = True
            with torch.device("meta"):
                trial.start(shell)
        else:
            _try_peft(trial, shell)


def _try_peft(trial: ContinualMethod, shell: PreTrainedModel) -> None:
    config: PeftConfig = trial.adapter
    problems = _lost_targets(getattr(config, "target_modules", None), shell)
    if problems:
        raise ValueError("\n".join(problems))
    try:
        with torch.device("meta"):
            model = trial.start(shell)
    except RuntimeError as error:
        # some types read the values that they have just made; those are checked as the first adapter is made
        if "meta" not in str(error).lower():
            raise
        return
    for made in model.peft_config.values():
        same_again(made)


def _lost_targets(targets: Collection[str] | str | None, shell: PreTrainedModel) -> list[str]:
    """What PEFT leaves unsaid: which of several names match nothing, and which names there are."""
    if targets is None or targets == "all-linear":
        return []
    if isinstance(targets, str):
        found = any(re.fullmatch(targets, name) for name, _ in shell.named_modules())
        return [] if found else [nothing_matched(LoRA(target_modules=targets), shell)]
    return without_match(LoRA(target_modules=sorted(targets)), shell)
