"""Sharded safetensors, one tensor at a time: read where it lies, written into its place."""

from __future__ import annotations

import json
import os
import struct
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from folklora.stream.files import read_json, write_text

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in TYPES.items()}
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_LENGTH = struct.Struct("<Q")
# how often what was written is made durable and recorded
_COMMIT_SECONDS, _COMMIT_BYTES = 1.0, 2**28


@dataclass(frozen=True)
class Form:
    """A stored tensor's type and shape.

    Args:
        dtype: safetensors' code of its type, such as "BF16".
        shape: Its shape.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def is_float(self) -> bool:
        """Whether it holds floating-point numbers that can be merged."""
        return self.dtype in ("F64", "F32", "F16", "BF16")

    @property
    def count(self) -> int:
        """How many elements it has."""
        return torch.Size(self.shape).numel()

    @property
    def bytes(self) -> int:
        """How many bytes it takes."""
        return self.count * TYPES[self.dtype].itemsize


def code_of(dtype: str) -> str:
    """safetensors' code of a torch type's name."""
    return _CODES[getattr(torch, dtype)]


class Checkpoint:
    """A folder of safetensors, of which only the headers are held.

    Args:
        folder: Holds model.safetensors, or several and their index.

    Raises:
        FileNotFoundError: It holds no weights, or not all that the index names.
        ValueError: The weights are pickled, of a type that is not known, or a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.forms: dict[str, Form] = {}
        self.places: dict[str, tuple[Path, int]] = {}
        index = folder / INDEX
        names = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else [SINGLE]
        files = [folder / name for name in names]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise self._without_weights(missing, index.is_file())
        for file in files:
            for name, (form, begin) in _read_places(file).items():
                self.forms[name], self.places[name] = form, (file, begin)
        self.files = files

    def _without_weights(self, missing: list[str], indexed: bool) -> Exception:
        pickled = sorted(path.name for pattern in _PICKLED for path in self.folder.glob(pattern))
        if indexed:
            return FileNotFoundError(f"{self.folder} lacks {', '.join(missing[:3])}, which its index names")
        if pickled:
            return ValueError(
                f"{self.folder} holds its weights as pickles ({pickled[0]}), which can run code when they are read; "
                "load the model where you trust it and save it again: save_pretrained writes safetensors"
            )
        return FileNotFoundError(f"{self.folder} holds no {SINGLE} and no {INDEX}")

    def read(self, name: str, rows: slice | None = None, *, pinned: bool = False) -> Tensor:
        """One tensor, as it is stored, or some rows of it; pinned, a GPU copies it faster.

        Raises:
            ValueError: The file has changed meanwhile.
        """
        (file, begin), form = self.places[name], self.forms[name]
        if rows is not None:
            start, stop, _ = rows.indices(form.shape[0])
            begin += start * (form.bytes // form.shape[0])
            form = Form(form.dtype, (stop - start, *form.shape[1:]))
        return _read_at(file, begin, form, pinned)


def read_tensor(file: Path, name: str) -> Tensor:
    """One tensor of a safetensors file.

    Raises:
        ValueError: The file is damaged.
    """
    form, begin = _read_places(file)[name]
    return _read_at(file, begin, form)


def _read_at(file: Path, begin: int, form: Form, pinned: bool = False) -> Tensor:
    # read, not mapped: the pages of a mapped file count as this process's memory
    values = torch.empty(form.bytes, dtype=torch.uint8, pin_memory=pinned)
    left = memoryview(values.numpy())
    with file.open("rb", buffering=0) as opened:
        opened.seek(begin)
        while left:
            count = opened.readinto(left)
            if not count:
                raise ValueError(f"{file} has become shorter while it was read")
            left = left[count:]
    return values.view(TYPES[form.dtype]).reshape(form.shape)


def read_header(file: Path) -> dict[str, Form]:
    """Types and shapes of the tensors in a safetensors file, in the order in which they lie there.

    Raises:
        ValueError: The file is damaged, or holds a type that is not known.
    """
    return {name: form for name, (form, _) in _read_places(file).items()}


def _read_places(file: Path) -> dict[str, tuple[Form, int]]:
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            (length,) = _LENGTH.unpack(opened.read(_LENGTH.size))
            read = json.loads(opened.read(length)) if length < size else None
        entries = {name: entry for name, entry in read.items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        ordered = sorted(entries, key=lambda name: entries[name]["data_offsets"])
    except (struct.error, UnicodeDecodeError, json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not in safetensors format, or is damaged") from error
    if _LENGTH.size + length + end != size:
        raise ValueError(f"{file} is damaged: its header asks for {_LENGTH.size + length + end} bytes, it has {size}")
    strange = next((name for name in ordered if entries[name]["dtype"] not in TYPES), None)
    if strange is not None:
        raise ValueError(f"{file}: {strange} is stored as {entries[strange]['dtype']}, which cannot be merged")
    start, found = _LENGTH.size + length, {}
    for name in ordered:
        (begin, end), form = entries[name]["data_offsets"], Form(entries[name]["dtype"], tuple(entries[name]["shape"]))
        if form.bytes != end - begin:
            raise ValueError(f"{file} is damaged: {name} has {end - begin} bytes, and its shape asks for {form.bytes}")
        found[name] = form, start + begin
    return found


@dataclass(frozen=True)
class Shard:
    """One file to write: its name, its header's bytes, and where each tensor begins.

    Args:
        file: The file's name.
        forms: The tensors' types and shapes.
    """

    file: str
    forms: Mapping[str, Form]

    def layout(self) -> tuple[bytes, dict[str, int], int]:
        """The header, where each tensor begins in the file, and the file's size."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        begins, at = {}, 0
        # the widest types first, so that each tensor begins at a multiple of its elements' size
        for name in sorted(self.forms, key=lambda name: -TYPES[self.forms[name].dtype].itemsize):
            form = self.forms[name]
            begins[name] = at
            entries[name] = {"dtype": form.dtype, "shape": list(form.shape), "data_offsets": [at, at + form.bytes]}
            at += form.bytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        header = _LENGTH.pack(len(text)) + text
        return header, {name: len(header) + begin for name, begin in begins.items()}, len(header) + at


def split(forms: Mapping[str, Form], largest: int) -> list[Shard]:
    """The tensors in files of at most `largest` bytes each (one tensor may be larger), in their order."""
    parts: list[dict[str, Form]] = [{}]
    size = 0
    for name, form in forms.items():
        if parts[-1] and size + form.bytes > largest:
            parts.append({})
            size = 0
        parts[-1][name] = form
        size += form.bytes
    if len(parts) == 1:
        return [Shard(SINGLE, parts[0])]
    return [Shard(f"model-{i:05d}-of-{len(parts):05d}.safetensors", part) for i, part in enumerate(parts, start=1)]


def create(folder: Path, shards: Sequence[Shard]) -> None:
    """Make the files with their headers and room for the tensors; those that are there already are left."""
    for shard in shards:
        header, _, size = shard.layout()
        path = folder / shard.file
        if path.is_file() and path.stat().st_size == size:
            continue
        with path.open("wb") as file:
            file.write(header)
            file.truncate(size)


def write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """Write the index that says which file holds which tensor; a single file needs none."""
    if len(shards) == 1:
        return
    total = sum(form.bytes for shard in shards for form in shard.forms.values())
    places = {name: shard.file for shard in shards for name in shard.forms}
    write_text(
        folder / INDEX, json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2, sort_keys=True)
    )


def recorded(folder: Path) -> set[str]:
    """Names of the tensors that are written and safe on the disk."""
    found: set[str] = set()
    for path in folder.glob("done-*.txt"):
        # a kill may have cut a line off before its closing quote
        lines = (line for line in path.read_text(encoding="utf-8").splitlines() if len(line) > 2 and line[-1] == '"')
        found.update(json.loads(line) for line in lines)
    return found


class Writer:
    """Writes tensors into files that `create` made, and records those that are on the disk, beside the computation.

    Several threads may write tensors at the same time.

    Args:
        folder: Holds the files.
        shards: What they hold.
        rank: Of this process: each keeps a record of its own.
        tell: Called with the names of tensors that were recorded.
        threads: How many write.
    """

    def __init__(
        self,
        folder: Path,
        shards: Sequence[Shard],
        rank: int,
        tell: Callable[[Iterable[str]], None] | None = None,
        threads: int = 1,
    ) -> None:
        self.folder, self.tell = folder, tell
        self.places = {
            name: (shard.file, at, shard.forms[name].bytes)
            for shard in shards
            for name, at in shard.layout()[1].items()
        }
        self.record = (folder / f"done-{rank}.txt").open("a", encoding="utf-8")
        # a line that was cut off ends here
        self.record.write("\n")
        self.open: dict[str, int] = {}
        self.written: dict[str, int] = {}
        self.pending: list[str] = []
        self.pending_bytes, self.committed = 0, time.monotonic()
        # threads apart: the disk is waited for while the next tensors are written to the system's memory
        self.writes, self.commits = ThreadPoolExecutor(threads), ThreadPoolExecutor(1)
        # what is computed waits for room, so that no more than a part for each thread is held beside it
        self.room, self.lock = threading.Semaphore(threads), threading.Lock()
        self.failed: BaseException | None = None
        self.stopped: BaseException | None = None
        self.committing: Future | None = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        try:
            self.writes.shutdown()
            if self.failed is not None:
                raise self.failed
            self._commit_soon()
            self._committed()
        finally:
            # again, where the user interrupted the first: what is still being written must not find another file open
            self.writes.shutdown()
            self.commits.shutdown()
            self.record.close()
            for handle in self.open.values():
                os.close(handle)

    def put(self, name: str, parts: Iterable[Tensor]) -> None:
        """Write a tensor, given in parts that follow each other; each is written while the next is computed.

        Raises:
            OSError: What came before could not be written.
            BaseException: What `stop` was told.
        """
        at = 0
        for part in parts:
            self.room.acquire()
            if ended := self.failed or self.stopped:
                # others may be waiting to hear it too
                self.room.release()
                raise ended
            self.writes.submit(self._write, name, part, at)
            at += part.nbytes

    def stop(self, error: BaseException) -> None:
        """Take no more parts: whoever gives one hears the error. What is whole is still recorded."""
        self.stopped = error

    def _write(self, name: str, tensor: Tensor, offset: int) -> None:
        try:
            file, begin, size = self.places[name]
            handle = self._opened(file)
            at, left = begin + offset, memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
            while left:
                written = os.pwrite(handle, left, at)
                at, left = at + written, left[written:]
            self._count(name, tensor.nbytes, size)
        except BaseException as error:
            # raised where the next part is given
            self.failed = self.failed or error
        finally:
            self.room.release()

    def _opened(self, file: str) -> int:
        with self.lock:
            if file not in self.open:
                self.open[file] = os.open(self.folder / file, os.O_WRONLY)
            return self.open[file]

    def _count(self, name: str, count: int, size: int) -> None:
        with self.lock:
            # by their sum: one thread may be ahead of another that writes an earlier part
            self.written[name] = self.written.get(name, 0) + count
            if self.written[name] == size:
                self.pending.append(name)
            self.pending_bytes += count
            due = self.pending_bytes >= _COMMIT_BYTES or time.monotonic() - self.committed >= _COMMIT_SECONDS
            if due and (self.committing is None or self.committing.done()):
                self._commit_soon()

    def _commit_soon(self) -> None:
        self._committed()
        names, self.pending, self.pending_bytes = self.pending, [], 0
        self.committed = time.monotonic()
        self.committing = self.commits.submit(self._commit, names, list(self.open.values()))

    def _committed(self) -> None:
        committing, self.committing = self.committing, None
        if committing is not None:
            committing.result()

    def _commit(self, names: list[str], handles: list[int]) -> None:
        for handle in handles:
            os.fsync(handle)
        self.record.writelines(f"{json.dumps(name)}\n" for name in names)
        self.record.flush()
        os.fsync(self.record.fileno())
        if self.tell is not None:
            self.tell(names)
