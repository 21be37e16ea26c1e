"""A merge from configuration to folder: planned, shared out, computed, written, and gone on with after a kill."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from folklora.merge.blocks import Part, Readable
from folklora.merge.contract import PerTask
from folklora.merge.engine import statistics
from folklora.merge.engine.card import write_beside
from folklora.merge.engine.checkpoints import TYPES, Writer, create, recorded, write_index
from folklora.merge.engine.config import Reference, read_config
from folklora.merge.engine.job import STATE, Job, prepare, statistic_keys
from folklora.merge.engine.models import Model
from folklora.merge.engine.plan import Plan, Step, Take
from folklora.merge.engine.tasks import save_parts, write_tasks_index
from folklora.merge.engine.team import BEGUN, in_processes, side_by_side, together, torchrun_team
from folklora.merge.engine.upload import Uploads
from folklora.merge.engine.vocabulary import arranged
from folklora.stream.files import read_json, replace_folder, write_json

Progress = Callable[..., None]
# larger ones, which torch would keep pinned for later, are seldom
_PINNED_BYTES = 2**26


def merge_models(
    config: str | Path | Mapping[str, Any],
    out: str | Path,
    *,
    device: str = "cpu",
    workers: int = 1,
    max_shard_size: str | int = "5GB",
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Merge models on disk into one, a tensor at a time.

    Memory holds some rows of the tensors of one name, of each model, and what is computed from them; of as many names
    as there are threads, where each does a tensor of its own. It holds these tensors whole, in float32, where a method
    needs matrices or gives each task its own parts (`emr`, `fisher`, `iso_c`, `r_tsvm`, `regmean`, `tall`, `tsv_c`,
    `tsv_m`, `twin_merging`, `wudi`, `wudi_closed_form`), where adapters or vocabularies are merged, and of weights that
    are stored as [in, out], as GPT-2's are. A GPU's memory holds what the models have of one name and of the next as it
    is stored, if that is less than a quarter of what is free. The folder appears when it is whole; a merge that was
    killed goes on where it was when it is called again in the same way.

    Args:
        config: A YAML file of mergekit's form, or its content.
        out: The folder to write: weights, configuration, tokenizer and a model card.
        device: Where each tensor's arithmetic runs, such as "cuda".
        workers: How many processes share the tensors, and the CPU's threads; under torchrun, its processes do. Each
            thread of a process does a tensor of its own, where a method goes by rows; methods that take whole tensors
            use all threads for each, and with another number of them may round otherwise.
        max_shard_size: The most that one file holds, such as "5GB".
        seed: Of everything drawn: a mask depends on it, on the tensor, on the model and on whether the CPU or a GPU
            draws it, not on order or files.
        overwrite: Replace a folder at `out`, or an unfinished merge of another configuration.
        progress: Called with "plan", then "tensors" each time that some were written, and keyword arguments.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: A model or file is not there.
        FileExistsError: `out` is there, or an unfinished merge of another configuration is.
        ValueError: The configuration or a model is wrong; nothing has been written. Or a tensor holds NaN.
        OSError: The disk is full or refuses; the same call goes on afterwards.
    """
    out = Path(out)
    if workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")
    _check_device(device)
    job = prepare(read_config(config), seed=seed, max_shard_size=max_shard_size)
    _check_out(out, job, overwrite)
    team = torchrun_team(device)
    leads = team is None or team.is_main_process
    work = out.parent / f".{out.name}.merging"
    if leads:
        _begin(job, work, overwrite)
    together(team)
    tell = _teller(job.plan, work, progress if leads else None)
    _do_all(job, work, workers, team, device, tell)
    together(team)
    tell(())
    if leads:
        _finish(job, work, out)
    together(team)
    return out


def _do_all(job: Job, work: Path, workers: int, team: Any, device: str, tell: Callable[[Iterable[str]], None]) -> None:
    done = recorded(work)
    # nobody writes before all have read what was written before
    together(team)
    tell(())
    try:
        if team is not None:
            do_share(job, work, done, team.process_index, team.num_processes, device, tell)
        elif workers > 1:
            in_processes(work, done, workers, device, tell)
        else:
            do_share(job, work, done, 0, 1, device, tell)
    except ValueError:
        # what is wrong with an input's values is wrong with all that was made of it
        if team is None:
            shutil.rmtree(work)
        raise


def do_share(
    job: Job,
    work: Path,
    done: set[str],
    rank: int,
    processes: int,
    device: str,
    tell: Callable[[Iterable[str]], None] | None = None,
) -> None:
    """Compute and write one process's share of the tensors.

    Args:
        job: The merge.
        work: The folder that is worked on.
        done: What was written before.
        rank: Of this process.
        processes: How many there are.
        device: Where to compute.
        tell: Called with the names that are safely on the disk.
    """
    place = torch.device(device)
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", rank % torch.cuda.device_count())
    if place.type == "cuda":
        torch.cuda.set_device(place)
    share = job.plan.share(done, rank, processes)
    threads = torch.get_num_threads() if place.type == "cpu" else 1
    light = {step.name for step in share if threads > 1 and _by_blocks(job, step)}
    alone = [step for step in share if step.name not in light]
    shared = sorted((step for step in share if step.name in light), key=lambda step: -step.form.bytes)
    numbers = {step.name: number for number, step in enumerate(job.plan.steps)}
    with Writer(work, job.plan.shards, rank, tell, threads) as writer, Uploads(job, place) as uploads:

        def do(step: Step, there: Mapping[Take, Tensor]) -> None:
            tensor, parts = compute(job, step, place, there)
            if parts is not None:
                save_parts(work, numbers[step.name], parts)
            writer.put(step.name, tensor)

        side_by_side(lambda step: do(step, {}), shared, threads, writer.stop)
        for step, there in uploads.along(alone):
            do(step, there)


def _by_blocks(job: Job, step: Step) -> bool:
    """Whether a step holds no more than some rows at a time, so that several may be done at once."""
    across = step.models[0].key in job.donor.architecture.transposed
    adapted = any(job.models[take.model].adapts(take.key) for take in step.takes())
    return step.copied or (job.schema.function.by_rows and not (across or step.by_token or adapted))


@torch.no_grad()
def compute(
    job: Job, step: Step, device: torch.device, there: Mapping[Take, Tensor]
) -> tuple[Iterable[Tensor], PerTask | None]:
    """One merged tensor on the CPU in parts, in the type in which it is stored; or the base's and each task's own.

    Args:
        job: The merge.
        step: Which tensor.
        device: Where to compute.
        there: The tensors that are there already; empty where they are still on the disk.

    Raises:
        ValueError: An input holds NaN, or the result is not finite; perhaps only when the parts are gone through.
    """
    if step.copied:
        return [job.models[step.models[0].model].read(step.models[0].key)], None
    # a weight is given to the methods as [out, in], with the outputs' rows
    across = step.models[0].key in job.donor.architecture.transposed
    if job.schema.function.by_rows and not across:
        return _rows(job, step, device, there), None
    read = {take: tensor.mT if across else tensor for take, tensor in _whole(job, step, device, there).items()}
    merged = job.schema.function(*_arguments(step, read), **_options(job, step, device))
    parts = merged if isinstance(merged, PerTask) else None
    tensor = merged if parts is None else parts.base
    for value in [] if parts is None else parts.state().values():
        _check_finite(job, step, value)
    return [_stored(job, step, tensor.mT if across else tensor)], parts


@torch.no_grad()
def _rows(job: Job, step: Step, device: torch.device, there: Mapping[Take, Tensor]) -> Iterator[Tensor]:
    read: Mapping[Take, Readable]
    if there:
        read = {take: _checked(tensor, take) for take, tensor in there.items()}
    elif step.by_token or any(job.models[take.model].adapts(take.key) for take in step.takes()):
        read = _whole(job, step, device, there)
    else:
        read = {take: _OnDisk(job.models[take.model], take, device) for take in step.takes()}
    for part in job.schema.function.rows(*_arguments(step, read), **_options(job, step, device)):
        yield _stored(job, step, part)


class _OnDisk:
    """A model's tensor, of which rows are read when they are asked for."""

    def __init__(self, model: Model, take: Take, device: torch.device) -> None:
        self._model, self._take, self.device = model, take, device
        form = model.layout.forms[take.key]
        self.shape, self.dtype = torch.Size(form.shape), TYPES[form.dtype]

    def __getitem__(self, part: Part) -> Tensor:
        rows = None if part is ... else part
        return _checked(self._model.read(self._take.key, rows).to(self.device), self._take)


def _whole(job: Job, step: Step, device: torch.device, there: Mapping[Take, Tensor]) -> dict[Take, Tensor]:
    read = {}
    for take in step.takes():
        tensor = there[take] if there else job.models[take.model].read(take.key).to(device)
        tensor = _checked(tensor, take)
        # at once, so that what was read is not kept beside it
        read[take] = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    if step.by_token:
        ordered = arranged({take.model: tensor for take, tensor in read.items()}, job.vocabulary.rows, job.plan.donor)
        read = {take: ordered[take.model] for take in read}
    return read


def _arguments(step: Step, read: Mapping[Take, Any]) -> tuple[list[Any], Any]:
    return [read[take] for take in step.models], None if step.base is None else read[step.base]


def _options(job: Job, step: Step, device: torch.device) -> dict[str, Any]:
    options: dict[str, Any] = {**step.options}
    for argument, files in step.statistics.items():
        keys = statistic_keys(job, step, argument)
        if keys:
            options[argument] = [value.to(device) for value in statistics.read(files, keys)]
    if job.schema.generator is not None:
        options[job.schema.generator] = [_generator(job.seed, step.name, take.model, device) for take in step.models]
    return options


def _stored(job: Job, step: Step, tensor: Tensor) -> Tensor:
    stored = tensor.to(TYPES[step.form.dtype])
    _check_finite(job, step, stored)
    if stored.is_cuda and stored.nbytes <= _PINNED_BYTES:
        return torch.empty(stored.shape, dtype=stored.dtype, pin_memory=True).copy_(stored)
    return stored.to("cpu")


def _check_finite(job: Job, step: Step, tensor: Tensor) -> None:
    if not all(torch.isfinite(end) for end in _ends(tensor)):
        raise ValueError(f"{step.name}: {job.schema.name} gives values that are not finite in {tensor.dtype}")


def _checked(tensor: Tensor, take: Take) -> Tensor:
    if any(end.isnan() for end in _ends(tensor)):
        raise ValueError(f"{take.model}: {take.key} holds NaN; the merge was stopped and nothing is left of it")
    return tensor


def _ends(tensor: Tensor) -> tuple[Tensor, ...]:
    """Its smallest and largest element, NaN if any is: found in one pass that needs no memory, unlike `isfinite`."""
    return tuple(tensor.aminmax()) if tensor.numel() else ()


def _generator(seed: int, name: str, model: Reference, device: torch.device) -> torch.Generator:
    digest = hashlib.sha256(json.dumps([seed, name, str(model)]).encode()).digest()
    # on a CPU the masks of a GPU's merge would take longer to draw than all the rest of it
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _check_device(device: str) -> None:
    index = count = 0
    with contextlib.suppress(RuntimeError):
        place = torch.device(device)
        # torch has a module for each kind of device that it can compute on
        index, count = place.index or 0, getattr(getattr(torch, place.type, None), "device_count", int)()
    if index >= count:
        raise ValueError(f"there is no device '{device}' here; leave --device out to compute on the CPU")


def _check_out(out: Path, job: Job, overwrite: bool) -> None:
    for reference, model in job.models.items():
        folders = [model.folder, *([model.adapter_folder] if model.adapter_folder else [])]
        if any(out.resolve() in (folder.resolve(), *folder.resolve().parents) for folder in folders):
            raise ValueError(f"{out} holds the input {reference}; choose another folder")
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} is there already; choose another folder, or pass --overwrite to replace it")


def _begin(job: Job, work: Path, overwrite: bool) -> None:
    state = job.state()
    if work.exists():
        known = read_json(work / STATE) if (work / STATE).is_file() else None
        if known == state:
            create(work, job.plan.shards)
            return
        if known is not None and not overwrite:
            raise FileExistsError(
                f"an unfinished merge of another configuration, or of inputs that have changed since, is in {work}; "
                "finish it with its own, or pass --overwrite to start anew"
            )
        shutil.rmtree(work)
    work.mkdir(parents=True)
    create(work, job.plan.shards)
    # last: what has a state has all its files
    write_json(work / STATE, state)


def _finish(job: Job, work: Path, out: Path) -> None:
    lacking = {step.name for step in job.plan.steps} - recorded(work)
    if lacking:
        raise RuntimeError(f"{len(lacking)} tensors were not written, such as {min(lacking)}")
    write_index(work, job.plan.shards)
    if job.schema.per_task:
        merged = {step.name: number for number, step in enumerate(job.plan.steps) if not step.copied}
        tasks = next(step.models for step in job.plan.steps if step.name in merged)
        write_tasks_index(work, job.schema.name, [str(take.model) for take in tasks], merged)
    write_beside(work, job.config, job.schema, job.plan, job.models, job.vocabulary)
    for path in [work / STATE, work / BEGUN, *work.glob("done-*.txt"), *work.glob("error-*.json")]:
        path.unlink(missing_ok=True)
    replace_folder(work, out)


def _teller(plan: Plan, work: Path, progress: Progress | None) -> Callable[[Iterable[str]], None]:
    sizes = {step.name: step.form.bytes for step in plan.steps}
    if progress is not None:
        progress("plan", tensors=len(sizes), bytes=plan.bytes, files=len(plan.shards), left_out=plan.left_out)

    def tell(names: Iterable[str]) -> None:
        if progress is not None:
            written = recorded(work).intersection(sizes)
            progress("tensors", tensors=len(written), bytes=sum(sizes[name] for name in written))

    return tell
