"""Training on one task: TRL's SFTTrainer for causal models, transformers' Seq2SeqTrainer for encoder-decoder ones."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from accelerate import PartialState
from peft import PeftModel
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
)

from folklora.adapters.host.steps import activation_penalty
from folklora.continual.base import ContinualMethod, Phase
from folklora.stream.tasks import Example
from folklora.stream.tokens import IGNORED, encode


@dataclass(frozen=True)
class TrainSettings:
    """How each task is trained.

    Args:
        learning_rate: Of AdamW.
        epochs: Passes over a task's examples.
        batch_size: Examples a step, over all processes and accumulated micro-batches.
        accumulation: Micro-batches a step.
        max_length: Tokens of prompt and answer together; longer prompts are cut at their start.
        schedule: "constant", "linear" or "cosine" decay to 0.
        warmup: Share of the steps over which the learning rate rises from 0.
        weight_decay: Of AdamW.
        max_grad_norm: Gradients are scaled down to this norm; 0 leaves them.
        group_by_length: Draw batches of like length: less padding and so faster steps, but a less random order.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        precision: Of the base model's weights: "float32", "bfloat16", or "auto": bfloat16 where a GPU has it.
        eval_batch_size: Prompts a batch when scoring.
        evaluate: What is scored after each task: "all" tasks; those "seen" so far; or none but after the "last" one.
            After that all are. With T tasks these are T², about T² / 2 and T evaluations; what was not scored is None,
            and so are the metrics that need it.
        calibration_examples: Training examples that an adapter's statistics are taken from before it is made, where
            it needs any (CorDA, LoRA-SB).
    """

    learning_rate: float = 1e-3
    epochs: float = 1.0
    batch_size: int = 16
    accumulation: int = 1
    max_length: int = 512
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    group_by_length: bool = False
    gradient_checkpointing: bool = False
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    eval_batch_size: int = 32
    evaluate: Literal["all", "seen", "last"] = "all"
    calibration_examples: int = 256

    def __post_init__(self) -> None:
        positive = ("learning_rate", "epochs", "batch_size", "accumulation", "max_length", "eval_batch_size")
        problems = [
            f"{name} must be above 0, not {getattr(self, name)}"
            for name in (*positive, "calibration_examples")
            if not getattr(self, name) > 0
        ]
        if self.schedule not in ("constant", "linear", "cosine"):
            problems.append(f"schedule must be constant, linear or cosine, not {self.schedule!r}")
        if self.evaluate not in ("all", "seen", "last"):
            problems.append(f"evaluate must be all, seen or last, not {self.evaluate!r}")
        if self.precision not in ("auto", "float32", "bfloat16"):
            problems.append(f"precision must be auto, float32 or bfloat16, not {self.precision!r}")
        if problems:
            raise ValueError("\n".join(problems))

    def micro_batch(self, processes: int) -> int:
        """Examples a process reads at once.

        Raises:
            ValueError: The batch does not divide by processes × accumulation.
        """
        parts = processes * self.accumulation
        if self.batch_size % parts:
            raise ValueError(
                f"batch_size {self.batch_size} does not divide among {processes} processes × {self.accumulation} "
                f"micro-batches; choose a multiple of {parts}"
            )
        return self.batch_size // parts

    def in_phase(self, phase: Phase) -> TrainSettings:
        """With the epochs and the learning rate that a phase has of its own."""
        given = {key: getattr(phase, key) for key in ("epochs", "learning_rate")}
        return dataclasses.replace(self, **{key: value for key, value in given.items() if value is not None})


class DivergedError(ValueError):
    """The training loss is NaN or infinite, so that the trained parameters are lost; what was saved before is not."""


def train_task(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    method: ContinualMethod,
    examples: Sequence[Example],
    settings: TrainSettings,
    *,
    seed: int,
    folder: str | Path,
    title: str = "",
    on_step: Callable[[int, int, float | None], None] | None = None,
) -> list[dict[str, float]]:
    """Train the model's trainable parameters on examples, with a new optimiser; the loss is the answers' alone.

    Args:
        model: With its adapters in place.
        tokenizer: Its tokenizer.
        method: Gives what is added to the loss.
        examples: What to learn.
        settings: How.
        seed: Of the order of examples, dropout and whatever else is drawn.
        folder: For the trainer's own files; nothing is left there.
        title: What an error calls this training; none takes the method's name.
        on_step: Called with (step, steps in all, loss or None) after each step.

    Returns:
        [{"step": int, "loss": float}, ...], the training loss every few steps.

    Raises:
        DivergedError: The loss is NaN or infinite.
    """
    encoder_decoder = bool(model.config.is_encoder_decoder)
    rows = [encode(tokenizer, example, settings.max_length, encoder_decoder) for example in examples]
    watch = _Watch(partial(method.begin, model), on_step, title or method.method)
    arguments = _arguments(settings, seed, folder, len(rows))
    build = _seq2seq_trainer if encoder_decoder else _causal_trainer
    trainer = build(model, tokenizer, rows, arguments, [watch], method)
    # transformers and TRL print a line for every trainer; a stream makes one for each task
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    inner = model.get_base_model()
    try:
        trainer.train()
    finally:
        transformers.logging.set_verbosity(level)
        # TRL replaces the instance's forward; evaluation and the next task want the model's own
        inner.__dict__.pop("forward", None)
        model.zero_grad(set_to_none=True)
    return watch.losses


def _arguments(settings: TrainSettings, seed: int, folder: str | Path, count: int) -> dict[str, Any]:
    state = PartialState()
    steps = max(1, round(settings.epochs * count / settings.batch_size))
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": settings.micro_batch(state.num_processes),
        "gradient_accumulation_steps": settings.accumulation,
        "learning_rate": settings.learning_rate,
        "num_train_epochs": settings.epochs,
        "lr_scheduler_type": "constant_with_warmup" if settings.schedule == "constant" else settings.schedule,
        "warmup_steps": round(settings.warmup * steps),
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "train_sampling_strategy": "group_by_length" if settings.group_by_length else "random",
        "gradient_checkpointing": settings.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if settings.gradient_checkpointing else None,
        "seed": seed,
        "logging_steps": max(1, steps // 20),
        "logging_strategy": "steps",
        # the trainer would leave a loss that is no number out of the means, and show 0 from then on
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": state.device.type == "cpu",
        "bf16": False,
        "dataloader_pin_memory": state.device.type == "cuda",
        "ddp_find_unused_parameters": False,
    }


class _Watch(TrainerCallback):
    def __init__(
        self, begin: Callable[[int], None], on_step: Callable[[int, int, float | None], None] | None, title: str
    ) -> None:
        self.begin, self.on_step, self.title = begin, on_step, title
        self.losses: list[dict[str, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begin(state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.on_step is not None:
            self.on_step(state.global_step, state.max_steps, self.losses[-1]["loss"] if self.losses else None)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        given = logs or {}
        # the second comes at the end, and is of all steps: of those too that stand after the last of the first
        loss = given.get("loss", given.get("train_loss"))
        if loss is not None and not math.isfinite(loss):
            raise DivergedError(
                f"{self.title}: training has diverged: the loss is {loss} by step {state.global_step} of "
                f"{state.max_steps}. A lower learning_rate (now {args.learning_rate:g}) usually helps."
            )
        if "loss" in given:
            self.losses.append({"step": state.global_step, "loss": round(float(loss), 6)})


def _with_penalties(trainer_class: type, method: ContinualMethod) -> type:
    class WithPenalties(trainer_class):
        def get_decay_parameter_names(self, model: Any) -> set[str]:
            # the trainer looks each parameter up in these, and a stream may have thousands that are frozen
            return set(super().get_decay_parameter_names(model)) if self.args.weight_decay else set()

        def compute_loss(
            self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            labels, inner = inputs["labels"], self.accelerator.unwrap_model(model)
            logits = None
            if method.reads_logits:
                # TRL's own computes the loss without ever holding the logits
                whole = {**inputs, "use_cache": False}
                loss, outputs = Trainer.compute_loss(self, model, whole, True, num_items_in_batch)
                logits = outputs.logits
            else:
                loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            # what the updates noted in this pass comes first: a method may run the model again
            parts = [activation_penalty(model), method.penalty(inner)]
            if logits is not None:
                parts.append(method.logits_penalty(inner, inputs, logits))
            parts = [part for part in parts if part is not None]
            if not parts:
                return loss
            # the trainer sums micro-batches whose loss is over their share of the step's tokens
            weight = 1.0
            if num_items_in_batch is not None:
                weight = (labels != IGNORED).sum() * self.accelerator.num_processes / num_items_in_batch
            return loss + weight * sum(parts).to(loss)

    return WithPenalties


def _causal_trainer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict],
    arguments: dict,
    callbacks: list,
    method: ContinualMethod,
) -> Any:
    try:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer
    except ImportError as error:
        raise ImportError(f"training needs TRL and datasets: pip install 'folklora[train]' ({error})") from error
    config = SFTConfig(**arguments, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
    trainer_class = _with_penalties(SFTTrainer, method)
    data = Dataset.from_list(rows)
    return _quiet(
        trainer_class(model=model, args=config, train_dataset=data, processing_class=tokenizer, callbacks=callbacks)
    )


def _seq2seq_trainer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict],
    arguments: dict,
    callbacks: list,
    method: ContinualMethod,
) -> Any:
    collator = DataCollatorForSeq2Seq(tokenizer, model=model.get_base_model(), label_pad_token_id=IGNORED)
    trainer_class = _with_penalties(Seq2SeqTrainer, method)
    return _quiet(
        trainer_class(
            model=model,
            args=Seq2SeqTrainingArguments(**arguments),
            train_dataset=rows,
            data_collator=collator,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
    )


def _quiet(trainer: Any) -> Any:
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    return trainer


def device() -> torch.device:
    """The device of this process."""
    return PartialState().device
