"""Calibration within a stream: on the examples of the first stage, before the first adapter is made."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from folklora.adapters.base import AdapterConfig
from folklora.adapters.calibrate import calibrate
from folklora.continual.base import ContinualMethod
from folklora.stream.tasks import Task
from folklora.stream.tokens import encode
from folklora.stream.train import TrainSettings


def calibrated(
    method: ContinualMethod,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    settings: TrainSettings,
    seed: int,
    tell: Callable[..., None],
) -> ContinualMethod:
    """The method with the statistics that its adapter needs; the method itself where it needs none or has them.

    They come from training examples of the first stage, drawn by the seed, prompt and answer as they are trained, one
    example a batch. All adapters that the method makes in the run use them. A resumed run finds the same ones again.

    Args:
        method: The continual method.
        base: The model without adapters.
        tokenizer: Its tokenizer.
        tasks: The stream.
        settings: `calibration_examples` and `max_length`.
        seed: Of the run.
        tell: Called with event="calibrate", method and examples before these are read.
    """
    config = method.adapter
    if not isinstance(config, AdapterConfig) or not config.needs or config.statistics is not None:
        return method
    examples = method.examples(tasks, 0, seed)
    count = min(settings.calibration_examples, len(examples))
    drawn = random.Random(f"{seed}:calibration").sample(examples, count)
    tell(event="calibrate", method=method.method, examples=count)
    two_sided = bool(base.config.is_encoder_decoder)
    batches = (_batch(encode(tokenizer, example, settings.max_length, two_sided)) for example in drawn)
    found = calibrate(base, batches, config.needs, target_modules=config)
    twin = copy.copy(method)
    # they may be as large as the model, and the run keeps them for adapters of later tasks
    twin.adapter = config.calibrated(found.to("cpu"))
    return twin


def _batch(row: dict[str, list[int]]) -> dict[str, Tensor]:
    return {key: torch.tensor([values]) for key, values in row.items()}
