"""The run directory: what a stream has done so far, on disk, so that it can be resumed, compared and reported.

RUN/run.json                   what was asked for
RUN/results.json               what came out (see docs/run-directory.md)
RUN/log.jsonl                  one line an event
RUN/report.html
RUN/METHOD/task-003/           written whole after the third task: state.json, carried.safetensors, adapters/
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import PeftModel, get_peft_model_state_dict
from peft.utils.other import ModulesToSaveWrapper
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from folklora.adapters.host.aside import others_aside
from folklora.adapters.host.layer import layers_of
from folklora.prompts import prompts_of
from folklora.stream.files import read_json, replace_folder, write_json
from folklora.stream.memory import unpack
from folklora.stream.tasks import Example


class RunError(ValueError):
    """The run directory cannot be used as asked."""


@dataclass
class Run:
    """A finished or interrupted run.

    Args:
        path: Its folder.
    """

    path: Path

    @classmethod
    def load(cls, path: str | Path) -> Run:
        """Open an existing run.

        Raises:
            RunError: There is no run in that folder.
        """
        run = cls(Path(path))
        if not (run.path / "run.json").is_file():
            raise RunError(f"{path} holds no run: there is no run.json in it")
        return run

    @property
    def request(self) -> dict[str, Any]:
        """What was asked for."""
        return read_json(self.path / "run.json")

    @property
    def results(self) -> dict[str, Any]:
        """What came out: matrices, metrics, parameters and times by method.

        Raises:
            RunError: The run did not end yet.
        """
        file = self.path / "results.json"
        if not file.is_file():
            raise RunError(f"{self.path} has no results yet: go on with it by --resume")
        return read_json(file)

    def adapters(self, method: str) -> Path:
        """The folder of a method's adapters after its last finished task; `PeftModel.from_pretrained` reads it."""
        return self.state_folder(method, self.finished(method)) / "adapters"

    def state_folder(self, method: str, count: int) -> Path:
        """Where a method's state after `count` stages belongs."""
        return self.path / method / f"task-{count:03d}"

    def kept(self, method: str) -> list[Example]:
        """The examples of old tasks that a method keeps after its last finished task."""
        return unpack(self._carried(method))

    def finished(self, method: str) -> int:
        """How many stages of a method are whole on disk."""
        count = 0
        while (self.state_folder(method, count + 1) / "state.json").is_file():
            count += 1
        return count

    def states(self, method: str) -> list[dict[str, Any]]:
        """The recorded state of each finished stage."""
        return [read_json(self.state_folder(method, i + 1) / "state.json") for i in range(self.finished(method))]

    def log(self, event: str, **details: Any) -> None:
        """Append a line to the log."""
        if not PartialState().is_main_process:
            return
        line = json.dumps({"time": round(time.time(), 3), "event": event, **details})
        with open(self.path / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def save_state(
        self,
        method: str,
        count: int,
        model: PeftModel,
        state: dict[str, Any],
        carried: dict[str, Tensor],
        changed: Collection[str] | None = None,
    ) -> None:
        """Record a finished stage: adapters, carried tensors and figures, all or nothing.

        The adapters and carried tensors of the stage before are removed once these are in place.

        Args:
            method: The method's name.
            count: How many stages are finished with this one.
            model: With its adapters.
            state: The stage's figures.
            carried: What the method carries on beside its adapters.
            changed: The adapters that are new or other than in the stage before; the others' files are taken over from
                there. None writes all of them.

        Raises:
            RunError: It cannot be written, for instance on a full disk; the stage before is still whole.
        """
        if PartialState().is_main_process:
            final = self.state_folder(method, count)
            temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            try:
                save_adapters(model, temporary / "adapters", self.state_folder(method, count - 1) / "adapters", changed)
                if carried:
                    save_file(
                        {k: v.detach().cpu().contiguous() for k, v in carried.items()},
                        temporary / "carried.safetensors",
                    )
                write_json(temporary / "state.json", state)
                replace_folder(temporary, final)
            except (OSError, SafetensorError) as error:
                raise RunError(
                    f"cannot write {final}: {getattr(error, 'strerror', None) or error}; what was finished before is "
                    "whole: make room, then go on by --resume"
                ) from error
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            if count > 1:
                before = self.state_folder(method, count - 1)
                shutil.rmtree(before / "adapters", ignore_errors=True)
                (before / "carried.safetensors").unlink(missing_ok=True)
        PartialState().wait_for_everyone()

    def load_adapters(self, method: str, model: PreTrainedModel) -> tuple[PeftModel, dict[str, Tensor]]:
        """A method's adapters after its last finished stage on the base model, trainable, and its carried tensors.

        Raises:
            RunError: A file is missing, or is not what it should be.
            ValueError: An adapter does not fit the model.
        """
        carried = self._carried(method)
        return load_adapters(model, self.state_folder(method, self.finished(method)) / "adapters"), carried

    def _carried(self, method: str) -> dict[str, Tensor]:
        file = self.state_folder(method, self.finished(method)) / "carried.safetensors"
        try:
            return load_file(file) if file.is_file() else {}
        except SafetensorError as error:
            raise RunError(f"{file} is not in safetensors format, or is damaged: {error}") from error


def create_run(path: str | Path, request: dict[str, Any], *, resume: bool, overwrite: bool) -> Run:
    """Make or open the folder of a run and record what is asked for.

    Args:
        path: The folder.
        request: What is asked for, as JSON values.
        resume: Go on with what is there; it must have been asked for in the same way.
        overwrite: Remove a run that is there.

    Raises:
        RunError: The folder holds something else, or a run that was asked for differently, or cannot be written.
    """
    run = Run(Path(path))
    if PartialState().is_main_process:
        _make(run, request, resume=resume, overwrite=overwrite)
    PartialState().wait_for_everyone()
    return run


def _make(run: Run, request: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
    known = (run.path / "run.json").is_file()
    if resume:
        if not known:
            raise RunError(f"{run.path} holds no run to resume")
        _check_same(run, request)
        return
    if run.path.exists() and not run.path.is_dir():
        raise RunError(f"{run.path} is a file; a run needs a folder")
    if run.path.is_dir() and any(run.path.iterdir()):
        if not known:
            raise RunError(f"{run.path} is not empty and holds no run; choose a new folder")
        if not overwrite:
            raise RunError(f"{run.path} holds a run already; --resume goes on with it, --overwrite starts anew")
        shutil.rmtree(run.path)
    created = not run.path.exists()
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        write_json(run.path / "run.json", request)
    except OSError as error:
        if created and run.path.is_dir():
            shutil.rmtree(run.path, ignore_errors=True)
        raise RunError(f"cannot write to {run.path}: {error.strerror or error}") from error


def _check_same(run: Run, request: dict[str, Any]) -> None:
    before, now = run.request, json.loads(json.dumps(request))
    # a run may move to another machine; its results then agree to rounding
    keys = (before.keys() | now.keys()) - {"machine"}
    differing = sorted(key for key in keys if before.get(key) != now.get(key))
    if differing:
        lines = [f"  {key}: {_short(before.get(key))} then, {_short(now.get(key))} now" for key in differing]
        raise RunError("\n".join([f"{run.path} was started differently and cannot be resumed:", *lines]))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 120 else text[:117] + "..."


def save_adapters(
    model: PeftModel, folder: Path, before: Path | None = None, changed: Collection[str] | None = None
) -> None:
    """Write every adapter of a model, each in a folder of its own name (safetensors and configuration).

    Args:
        model: The model.
        folder: Where to.
        before: Where an earlier state of them was written.
        changed: Those that are not as they were then; None means all. The files of the others are linked, or copied
            where the file system has no links: a stream of many adapters would else write them all after each task.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = set(model.peft_config)
    same = names - set(names if changed is None or before is None else changed)
    same = {name for name in same if (before / name / "adapter_config.json").is_file()}
    for name in same:
        shutil.copytree(before / name, folder / name, copy_function=_link)
    # the embeddings are never trained here; "auto" would ask a hub whether the base model's vocabulary grew
    for name in sorted(names - same):
        with others_aside(model, name):
            model.save_pretrained(folder, selected_adapters=[name], save_embedding_layers=False)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def load_adapters(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Put every adapter that `save_adapters` wrote on a base model, trainable.

    Raises:
        RunError: There is none, or one is not in safetensors or is damaged.
        ValueError: An adapter does not fit the model (see `folklora.adapters.host.saved`).
    """
    places = {"default": folder} if (folder / "adapter_config.json").is_file() else {}
    places |= {p.name: p for p in sorted(folder.glob("*/")) if (p / "adapter_config.json").is_file()}
    if not places:
        raise RunError(f"{folder} holds no adapters")
    for place in places.values():
        _check_readable(place / "adapter_model.safetensors")
    names = sorted(places, key=lambda name: (len(name), name))
    loaded = PeftModel.from_pretrained(model, str(places[names[0]]), adapter_name=names[0], is_trainable=True)
    for name in names[1:]:
        with others_aside(loaded):
            loaded.load_adapter(str(places[name]), adapter_name=name, is_trainable=True)
    return loaded


def _check_readable(file: Path) -> None:
    if not file.is_file():
        raise RunError(f"{file.parent} has no {file.name}; other formats are not loaded")
    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise RunError(f"{file} is not in safetensors format, or is damaged: {error}") from error


def stored_tensors(model: PeftModel) -> list[Tensor]:
    """What the files of the model's adapters hold, frozen parts included, but the samples of the base's weights."""
    updates = [update for layer in layers_of(model) for update in layer.folklora_updates.values()]
    prompts = prompts_of(model).values()
    if not updates and not prompts:
        saved = (
            get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
            for name in model.peft_config
        )
        return [value for values in saved for value in values.values()]
    found = {}
    for part in (*updates, *prompts):
        left_out = {"base_sample", *getattr(part, "unsaved", ())}
        found |= {id(value): value for name, value in part.state_dict(keep_vars=True).items() if name not in left_out}
        found |= {id(p): p for p in (getattr(part, "shared", None) or {}).values()}
    whole = [m.modules_to_save for m in model.modules() if isinstance(m, ModulesToSaveWrapper)]
    return [*found.values(), *(p for module in whole for p in module.parameters())]


def unload(model: PeftModel) -> PreTrainedModel:
    """The base model as it was before any adapter; PEFT leaves the trained copies of `modules_to_save` in it."""
    base = model.base_model.model
    wrapped = {name: part for name, part in base.named_modules() if isinstance(part, ModulesToSaveWrapper)}
    originals = {name: part.original_module for name, part in wrapped.items()}
    base = model.unload()
    for name, original in originals.items():
        base.set_submodule(name, original)
    return base
