"""AM-LoRA over a stream: a LoRA and a gate are appended for each task; see `folklora.adapters.am_lora`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from folklora.adapters.am_lora import AMLoRA, AMLoRAUpdate, add_task
from folklora.adapters.host.layer import layers_of
from folklora.continual.base import ContinualMethod
from folklora.stream.tasks import Task

_OBSERVED = 64


@dataclass
class AMLoRAStream(ContinualMethod):
    """Attentional mixture of LoRAs: append (A_t, B_t, w_t, b_t) in every adapted layer, freeze the rest, train.

    The equations, options and open questions are those of the adapter, `folklora.AMLoRA`. No replay, no teacher, no
    task id at test time.

    Source: Liu, Wu, Liu, Duan, "Learning Attentional Mixture of LoRAs for Language Model Continual Learning", 2024,
    arXiv 2409.19611.

    Args:
        adapter: Options of the layers.
    """

    adapter: AMLoRA = field(default_factory=AMLoRA)

    method: ClassVar[str] = "am-lora"
    paper: ClassVar[str] = "Liu et al. 2024, arXiv 2409.19611"
    trains: ClassVar[str] = "a new LoRA and its gate a task; attention mixes them"

    def __post_init__(self) -> None:
        if not isinstance(self.adapter, AMLoRA):
            raise ValueError(f"am-lora needs an AMLoRA adapter, not {type(self.adapter).__name__}")

    def prepare(self, model: PeftModel, index: int) -> None:
        """Append a LoRA and a gate; the first task finds one there already."""
        if index > 0:
            add_task(model)

    def observe(
        self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task]
    ) -> dict[str, Any] | None:
        """The mean attention to each slot, by task and layer, over the tokens of up to 64 test prompts."""
        layers = [(layer.name, layer.folklora_updates["default"]) for layer in layers_of(model)]
        updates = [update for _, update in layers if isinstance(update, AMLoRAUpdate)]
        mean = []
        for update in updates:
            update.record = True
        try:
            for task in tasks:
                mean.append(_mean_attention(model, tokenizer, [e.prompt for e in task.test[:_OBSERVED]], updates))
        finally:
            for update in updates:
                update.record, update.attention = False, None
        slots = [*(["none"] if self.adapter.zero_slot else []), *(task.name for task in tasks)]
        names = [name for name, _ in layers]
        return {"layers": names, "slots": slots, "tasks": [task.name for task in tasks], "mean": mean}


@torch.inference_mode()
def _mean_attention(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], updates: list[AMLoRAUpdate]
) -> list[list[float]]:
    training = model.training
    model.eval()
    totals: list[Tensor] = [torch.zeros(()) for _ in updates]
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt", truncation=True).to(model.device)
        inputs.pop("token_type_ids", None)
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = inputs["input_ids"][:, :1]
        model(**inputs)
        for i, update in enumerate(updates):
            totals[i] = totals[i] + update.attention.flatten(0, -2).mean(0).double().cpu()
    model.train(training)
    return [[round(value, 6) for value in (total / len(prompts)).tolist()] for total in totals]
