"""What methods that serve one task at a time leave: the base's weights, and beside them each tensor's parts, once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from folklora.merge.contract import PerTask
from folklora.merge.engine.checkpoints import TYPES, Checkpoint, Shard, Writer, create, read_header, read_tensor
from folklora.merge.engine.models import architecture_of
from folklora.merge.engine.schema import schema_of
from folklora.stream.files import read_json, replace_folder, write_json

FOLDER, INDEX = "tasks", "tasks.json"


def save_parts(work: Path, number: int, result: PerTask) -> None:
    """Write what a tensor's tasks have in common and of their own; the file is there whole, or not at all.

    Args:
        work: The folder that is worked on.
        number: Of the tensor, in the plan.
        result: What the method gave.
    """
    path = work / FOLDER / _file(number)
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    save_file({name: value.cpu().contiguous() for name, value in result.state().items()}, temporary)
    with temporary.open("rb") as written:
        os.fsync(written.fileno())
    os.replace(temporary, path)


def write_tasks_index(work: Path, method: str, models: Sequence[str], numbers: Mapping[str, int]) -> None:
    """Write which method it was, which models the tasks are, where a tensor's parts are, and the parts' sums."""
    files = {name: _file(n) for name, n in numbers.items()}
    sums = {
        part: sum(read_tensor(work / FOLDER / file, part) for file in files.values()).tolist()
        for part in schema_of(method).result.summed
    }
    write_json(work / INDEX, {"method": method, "tasks": list(models), "files": files, "sums": sums})


def task_tensors(folder: str | Path, task: int | str) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of one task's model, one at a time, in the stored type.

    Args:
        folder: What `merge_models` wrote with a method that serves one task at a time.
        task: The task's number, in the order of the models, or its model as the configuration called it.

    Raises:
        FileNotFoundError: The folder is none of that kind.
        ValueError: There is no such task.
    """
    folder = Path(folder)
    checkpoint, index, transposed = _open(folder)
    number = _number(index["tasks"], task)
    for name, form in checkpoint.forms.items():
        base = checkpoint.read(name)
        if name in index["files"]:
            across = name in transposed
            found = _parts(folder, index, name, base.mT if across else base).for_task(number)
            base = (found.mT if across else found).to(TYPES[form.dtype])
        yield name, base


def task_names(folder: str | Path) -> list[str]:
    """The tasks, by their models as the configuration called them, in order.

    Raises: as `task_tensors`.
    """
    return _open(Path(folder))[1]["tasks"]


def task_parts(folder: str | Path) -> Iterator[tuple[str, PerTask]]:
    """Key and parts of each tensor that differs between the tasks, one at a time; a weight as [out, in].

    Raises: as `task_tensors`.
    """
    folder = Path(folder)
    checkpoint, index, transposed = _open(folder)
    architecture = architecture_of(folder)
    for name in index["files"]:
        base = checkpoint.read(name)
        yield architecture.key(name), _parts(folder, index, name, base.mT if name in transposed else base)


def write_task(folder: str | Path, task: int | str, out: str | Path) -> Path:
    """Write one task's model as a checkpoint of its own.

    Args:
        folder: See `task_tensors`.
        task: See `task_tensors`.
        out: The folder to write; must not exist.

    Raises:
        FileExistsError: `out` is there already.
        FileNotFoundError: See `task_tensors`.
        ValueError: See `task_tensors`.
    """
    folder, out = Path(folder), Path(out)
    if out.exists():
        raise FileExistsError(f"{out} is there already; choose another folder")
    _number(_open(folder)[1]["tasks"], task)
    shards = [Shard(file.name, read_header(file)) for file in Checkpoint(folder).files]
    work = out.parent / f".{out.name}.writing"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    create(work, shards)
    with Writer(work, shards, 0) as writer:
        for name, tensor in task_tensors(folder, task):
            writer.put(name, [tensor])
    (work / "done-0.txt").unlink()
    for path in folder.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name != INDEX:
            shutil.copyfile(path, work / path.name)
    replace_folder(work, out)
    return out


def _open(folder: Path) -> tuple[Checkpoint, dict[str, Any], set[str]]:
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"{folder} holds no {INDEX}: it was not merged with a method that serves each task")
    checkpoint, architecture = Checkpoint(folder), architecture_of(folder)
    transposed = {name for name in checkpoint.forms if architecture.key(name) in architecture.transposed}
    return checkpoint, read_json(folder / INDEX), transposed


def _parts(folder: Path, index: dict[str, Any], name: str, base: Tensor) -> PerTask:
    path = folder / FOLDER / index["files"][name]
    state = {key: read_tensor(path, key) for key in read_header(path)}
    state |= {key: state[key].new_tensor(values) for key, values in index["sums"].items()}
    return schema_of(index["method"]).result.of_state(base.float(), state)


def _number(tasks: Sequence[str], task: int | str) -> int:
    if task in tasks:
        return tasks.index(task)
    if str(task).isdigit() and int(task) < len(tasks):
        return int(task)
    raise ValueError(f"there is no task {task}; there are " + ", ".join(f"{i} ({t})" for i, t in enumerate(tasks)))


def _file(number: int) -> str:
    return f"{number:05d}.safetensors"
