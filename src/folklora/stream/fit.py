"""Whether the methods of a run fit its model: each is tried on a copy without values, before any work is done."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from peft import PeftConfig
from transformers import PreTrainedModel

from folklora.adapters.base import AdapterConfig
from folklora.adapters.host.tuner import targets_without_match
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
    # PEFT takes a list of which some names match nothing, and does not say which names there are
    problems = targets_without_match(config, shell) if hasattr(config, "target_modules") else []
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
