"""The main job: teach a model a stream of tasks, measuring after each what it knows of all of them."""

from __future__ import annotations

import dataclasses
import hashlib
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, set_seed
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import folklora
from folklora.continual.base import ContinualMethod
from folklora.stream import metrics
from folklora.stream.calibration import calibrated
from folklora.stream.evaluate import evaluate
from folklora.stream.files import write_json
from folklora.stream.fit import check_fit
from folklora.stream.memory import count_stored, pack
from folklora.stream.options import build_method, describe, split_options
from folklora.stream.plots import STORED
from folklora.stream.report import write_report
from folklora.stream.run import Run, create_run, stored_tensors, unload
from folklora.stream.tasks import Example, Task, hold_out, load_tasks
from folklora.stream.tokens import encode, label_tokens
from folklora.stream.train import TrainSettings, train_task

Progress = Callable[..., None]
METRICS = ("auto", "rank", "exact")


def learn(
    model: str | Path | PreTrainedModel,
    tasks: Sequence[str | Path | Task],
    method: str | ContinualMethod | Sequence[str | ContinualMethod] = "am-lora",
    *,
    out: str | Path,
    options: dict[str, Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    prompt: str = "{text}\nAnswer:",
    metric: str = "auto",
    validation: float = 0.0,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Teach a model tasks one after another, and measure after each how well it does on every task.

    After task i the model is scored on each task j, seen or not yet: R[i][j], in percent. Average accuracy, backward
    and forward transfer and forgetting follow from R (`folklora.stream.metrics`).

    Args:
        model: A folder or hub name, or a loaded model (then give its tokenizer).
        tasks: Folders, `NAME=TRAIN.jsonl,TEST.jsonl`, `hub:ORG/NAME`, or `Task` objects, in their order.
        method: One method's name or object, or several, each of which learns the whole stream from the same base.
        out: The run directory to write.
        options: Settings by name: of training (`learning_rate`), of the method (`memory`) or of its adapter (`r`).
        tokenizer: Taken from the model's folder if not given.
        prompt: Template for tasks of text and label.
        metric: "rank" labels by likelihood, "exact" match of greedy generation, or "auto" by the task.
        validation: Share of each task's training examples to hold out and score on, in place of its test examples.
        seed: Of everything drawn.
        resume: Go on with the run in `out`; it gives the results that it would have given uninterrupted.
        overwrite: Replace a run in `out`.
        trust_remote_code: Let a model's own code from its folder or hub page run.
        progress: Called with what happens, as keyword arguments; see `folklora.cli`.

    Returns:
        The run, with results.json and report.html written.

    Raises:
        TaskError: Something is wrong with the tasks; every problem is named.
        RunError: `out` cannot be used.
        ValueError: An option or method is unknown or does not fit the model, or training diverged (`DivergedError`).
    """
    # without a word about CPUs, accelerate takes each of several processes for the only one until training begins
    PartialState(cpu=not torch.accelerator.is_available())
    chosen = [method] if isinstance(method, (str, ContinualMethod)) else list(method)
    settings, own = split_options(chosen, options or {})
    methods = [build_method(m, own) for m in chosen]
    names = [one.method for one in methods]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{', '.join(repeated)} is given twice; forms of one method need a run each")
    stream = _load_stream(tasks, prompt, validation, seed)
    settings.micro_batch(PartialState().num_processes)
    base = load_model(model, settings, trust_remote_code)
    reader = tokenizer or load_tokenizer(model, base, trust_remote_code)
    check_fit(methods, base)
    _check_texts(stream, reader, settings, metric, bool(base.config.is_encoder_decoder))
    request = _request(model, stream, methods, settings, metric, validation, seed)
    run = create_run(out, request, resume=resume, overwrite=overwrite)
    course = _Course(run, stream, settings, metric, seed, reader, progress or _silent)
    results = {key: request[key] for key in ("folklora", "model", "tasks", "metric", "seed", "machine")}
    results["methods"] = {}
    for one in methods:
        results["methods"][one.method] = _Lesson(course, one, base).learn()
    if PartialState().is_main_process:
        write_json(run.path / "results.json", results)
        write_report(run.path)
    PartialState().wait_for_everyone()
    return run


@dataclass(frozen=True)
class _Course:
    """What all methods of a run share."""

    run: Run
    tasks: list[Task]
    settings: TrainSettings
    metric: str
    seed: int
    tokenizer: PreTrainedTokenizerBase
    tell: Progress


class _Lesson:
    """One method learning the stream."""

    def __init__(self, course: _Course, method: ContinualMethod, base: PreTrainedModel) -> None:
        self.course, self.method, self.base = course, method, base
        self.stages = 1 if method.joint else len(course.tasks)
        self.states = course.run.states(method.method)
        method.max_length = course.settings.max_length

    def learn(self) -> dict[str, Any]:
        """Learn what is not learnt yet; the method's entry of results.json."""
        course, run, name = self.course, self.course.run, self.method.method
        done = len(self.states)
        self.base.to(PartialState().device)
        if done == self.stages:
            return self._entry()
        course.tell(event="method", method=name, stages=self.stages, done=done)
        self.method = calibrated(
            self.method, self.base, course.tokenizer, course.tasks, course.settings, course.seed, course.tell
        )
        if done:
            model, carried = run.load_adapters(name, self.base)
            self.method.resume(model, done - 1, carried)
        else:
            set_seed(course.seed)
            model = self.method.start(self.base)
        model.to(PartialState().device)
        try:
            for index in range(done, self.stages):
                self._stage(model, index)
        finally:
            self.method.route(model, 0, self.stages)
            model.base_model.enable_adapter_layers()
            self.base = unload(model)
        return self._entry()

    def _stage(self, model: PeftModel, index: int) -> None:
        course, began = self.course, time.perf_counter()
        start = self.states[0]["start"] if self.states else self._start(model)
        seed = course.seed * 1000 + index
        set_seed(seed)
        self.method.prepare(model, course.tokenizer, course.tasks, index)
        name = "all tasks" if self.method.joint else course.tasks[index].name
        losses, trainable = self._train(model, index, name, seed)
        carried = self.method.finish(model, course.tokenizer, course.tasks, index)
        examples = self.method.kept(course.tasks, index, course.seed)
        trained = time.perf_counter() - began
        row = self._row(model, len(course.tasks) if self.method.joint else index + 1)
        last = index + 1 == self.stages
        state = {
            "row": row,
            "start": start,
            "losses": losses,
            "trainable_parameters": trainable,
            **count_stored([*stored_tensors(model), *carried.values()], examples),
            "train_seconds": round(trained, 3),
            "seconds": round(time.perf_counter() - began, 3),
            "attention": self.method.observe(model, course.tokenizer, course.tasks) if last else None,
            "measures": self.method.measures(model, index),
        }
        changed = self.method.changed(model, index)
        course.run.save_state(self.method.method, index + 1, model, state, {**carried, **pack(examples)}, changed)
        course.run.log("task", method=self.method.method, task=name, row=row, seconds=state["seconds"])
        course.tell(event="row", method=self.method.method, index=index, row=row)
        self.states.append(state)

    def _train(self, model: PeftModel, index: int, name: str, seed: int) -> tuple[list[dict[str, float]], int]:
        """The losses of all phases of a task, their steps counted on, and the most parameters that one trains."""
        course, method = self.course, self.method
        examples = method.examples(course.tasks, index, course.seed)
        losses: list[dict[str, float]] = []
        trainable = 0
        for number, phase in enumerate(method.phases):
            method.enter(model, course.tokenizer, course.tasks, index, number)
            trainable = max(trainable, sum(p.numel() for p in model.parameters() if p.requires_grad))
            shown = f"{name}, {phase.name}" if phase.name else name
            course.tell(event="train", method=method.method, task=shown, index=index, examples=len(examples))
            found = train_task(
                model,
                course.tokenizer,
                method,
                examples,
                course.settings.in_phase(phase),
                seed=seed,
                folder=course.run.path / method.method / ".trainer",
                title=f"{method.method}, task '{shown}'",
                on_step=lambda step, steps, loss: course.tell(event="step", step=step, steps=steps, loss=loss),
            )
            before = losses[-1]["step"] if losses else 0
            losses += [{**point, "step": before + point["step"]} for point in found]
        return losses, trainable

    def _start(self, model: PeftModel) -> list[float]:
        """The untouched base model's score on every task."""
        with model.disable_adapter():
            return [self._score(model, task) for task in self.course.tasks]

    def _row(self, model: PeftModel, trained: int) -> list[float | None]:
        row: list[float | None] = []
        wanted, count = self.course.settings.evaluate, len(self.course.tasks)
        for j, task in enumerate(self.course.tasks):
            if trained < count and wanted != "all" and (wanted == "last" or j >= trained):
                row.append(None)
                continue
            self.method.route(model, j, trained)
            self.course.tell(event="evaluate", task=task.name, index=j)
            row.append(self._score(model, task))
        self.method.route(model, 0, trained)
        return row

    def _score(self, model: PeftModel, task: Task) -> float:
        """The score in percent, the examples shared out among the processes."""
        state = PartialState()
        rows = task.validation or task.test
        mine = rows[state.process_index :: state.num_processes]
        settings = self.course.settings
        right = 0.0
        if mine:
            part = dataclasses.replace(task, test=mine)
            percent = evaluate(
                model,
                self.course.tokenizer,
                part,
                metric=self.course.metric,
                batch_size=settings.eval_batch_size,
                max_length=settings.max_length,
            )
            right = round(percent * len(mine) / 100)
        if state.num_processes > 1:
            right = sum(gather_object([right]))
        return round(100 * right / len(rows), 6)

    def _entry(self) -> dict[str, Any]:
        count, start = len(self.course.tasks), self.states[0]["start"]
        rows = [state["row"] for state in self.states]
        matrix = [[None] * count for _ in range(count - 1)] + rows if self.method.joint else rows
        return {
            "matrix": matrix,
            "start": start,
            **metrics.summary(matrix, start),
            "trainable_parameters": max(state["trainable_parameters"] for state in self.states),
            **{key: self.states[-1].get(key) for key in STORED},
            # a run that an older version began knows no bytes of its first tasks
            **{f"{key}_by_task": [state.get(key) for state in self.states] for key in STORED},
            "seconds": round(sum(state["seconds"] for state in self.states), 3),
            "seconds_by_task": [state["seconds"] for state in self.states],
            "train_seconds": round(sum(state["train_seconds"] for state in self.states), 3),
            "seed": self.course.seed,
            "settings": {**describe(self.method), **dataclasses.asdict(self.course.settings)},
            "losses": [{"task": i, **point} for i, state in enumerate(self.states) for point in state["losses"]],
            "attention": self.states[-1]["attention"],
            "measures_by_task": [state.get("measures", {}) for state in self.states],
        }


def _silent(**event: Any) -> None:
    """Say nothing."""


def _load_stream(tasks: Sequence[str | Path | Task], prompt: str, validation: float, seed: int) -> list[Task]:
    if not tasks:
        raise ValueError("no tasks were given; a stream needs at least one")
    sources = [task for task in tasks if not isinstance(task, Task)]
    loaded = iter(load_tasks(sources, prompt=prompt) if sources else [])
    stream = [task if isinstance(task, Task) else next(loaded) for task in tasks]
    names = [task.name for task in stream]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"two tasks share a name: {', '.join(repeated)}")
    return [hold_out(task, validation, seed) for task in stream] if validation else stream


def load_model(
    model: str | Path | PreTrainedModel, settings: TrainSettings, trust_remote_code: bool
) -> PreTrainedModel:
    """A base model as its settings want it; one that is loaded already as it is."""
    if isinstance(model, PreTrainedModel):
        return model
    place = str(model)
    if not Path(place).exists() and place.startswith((".", "/", "~")):
        raise FileNotFoundError(f"there is no model in {place}")
    config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    precision = settings.precision
    if precision == "auto":
        able = PartialState().device.type == "cuda" and torch.cuda.is_bf16_supported()
        precision = "bfloat16" if able else "float32"
    return kind.from_pretrained(
        place, dtype=getattr(torch, precision), trust_remote_code=trust_remote_code, use_safetensors=True
    )


def load_tokenizer(
    model: str | Path | PreTrainedModel, base: PreTrainedModel, trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    """A base model's tokenizer, from where the model is."""
    place = base.name_or_path if isinstance(model, PreTrainedModel) else str(model)
    if not place:
        raise ValueError("a model that was not loaded from a folder needs its tokenizer: learn(..., tokenizer=...)")
    return AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)


def _check_texts(
    tasks: Sequence[Task], tokenizer: PreTrainedTokenizerBase, settings: TrainSettings, metric: str, two_sided: bool
) -> None:
    """Try the metric and every different answer, so that what cannot be scored or encoded is found before training."""
    if metric not in METRICS:
        raise ValueError(f"metric must be {', '.join(METRICS[:-1])} or {METRICS[-1]}, not {metric!r}")
    problems = []
    for task in tasks:
        ranked = metric == "rank" or (metric == "auto" and task.labels is not None)
        try:
            if ranked and task.labels is None:
                raise ValueError("it has no labels to rank; use metric exact")
            if ranked:
                label_tokens(tokenizer, task.labels)
            for answer in dict.fromkeys(example.completion for example in task.train):
                encode(tokenizer, Example(task.train[0].prompt, answer), settings.max_length, two_sided)
        except ValueError as error:
            problems.append(f"task '{task.name}': {error}")
    if problems:
        raise ValueError("\n".join(problems))


def _request(
    model: str | Path | PreTrainedModel,
    tasks: list[Task],
    methods: Sequence[ContinualMethod],
    settings: TrainSettings,
    metric: str,
    validation: float,
    seed: int,
) -> dict[str, Any]:
    name = model.name_or_path or type(model).__name__ if isinstance(model, PreTrainedModel) else str(model)
    return {
        "folklora": folklora.__version__,
        "model": name,
        "tasks": [task.name for task in tasks],
        "examples": [[len(task.train), len(task.test)] for task in tasks],
        "digests": [task_digest(task) for task in tasks],
        "metric": metric,
        "validation": validation,
        "seed": seed,
        "methods": {method.method: describe(method) for method in methods},
        "settings": dataclasses.asdict(settings),
        "processes": PartialState().num_processes,
        "machine": machine(),
    }


def task_digest(task: Task) -> str:
    """A short digest of a task's texts and labels; another task of the same name has another."""
    whole = hashlib.sha256()
    for split in (task.train, task.test, task.validation):
        for example in split:
            whole.update(f"{example.prompt}\x00{example.completion}\x01".encode())
        whole.update(b"\x02")
    whole.update("\x00".join(task.labels or ()).encode())
    return whole.hexdigest()[:16]


def machine() -> str:
    """The device and the versions that results depend on, in words."""
    where = PartialState().device
    hardware = torch.cuda.get_device_name(where) if where.type == "cuda" else f"{platform.machine()} CPU"
    return f"{hardware}, torch {torch.__version__}, Python {platform.python_version()}"
