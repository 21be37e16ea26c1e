"""One program's run: its seconds, what it computed, and how much memory it and what it started held at most."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_POLL_SECONDS = 0.02
# every so many polls it is looked up which processes there are
_LOOKUPS = 10


@dataclass
class Run:
    """What was measured of a program and of what it started.

    Args:
        status: "done", "failed" or "stopped" at the limit: then all the rest is what it had come to.
        seconds: Until all was on the disk.
        cpu_seconds: Of computing, in all threads and processes.
        resident: The most that all of its processes had resident at one moment, as it was seen, or one of them ever,
            bytes. Pages of input files count while they are mapped.
        anonymous: Of these, what no file holds.
        used: The most by which the machine's available memory went down.
        gpu: The most by which the GPU's used memory went up; None without one.
    """

    status: str = "done"
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    resident: int = 0
    anonymous: int = 0
    used: int = 0
    gpu: int | None = None

    def record(self) -> dict[str, Any]:
        return {**asdict(self), "seconds": round(self.seconds, 3), "cpu_seconds": round(self.cpu_seconds, 2)}


class GPU:
    """What is in use of the first GPU's memory, by whom ever, as its driver says; NVML takes none itself."""

    class _Memory(ctypes.Structure):
        _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]

    def __init__(self) -> None:
        self.library = None
        for name in ("libnvidia-ml.so.1", "/usr/local/nvidia/lib64/libnvidia-ml.so.1"):
            with contextlib.suppress(OSError):
                self.library = self.library or ctypes.CDLL(name)
        if self.library is None:
            raise SystemExit("libnvidia-ml.so.1 was not found, which says how much of the GPU's memory is in use")
        self.device = ctypes.c_void_p()
        self._call("nvmlInit_v2")
        self._call("nvmlDeviceGetHandleByIndex_v2", 0, ctypes.byref(self.device))

    def name(self) -> str:
        text = ctypes.create_string_buffer(96)
        self._call("nvmlDeviceGetName", self.device, text, len(text))
        return text.value.decode()

    def used(self) -> int:
        memory = self._Memory()
        self._call("nvmlDeviceGetMemoryInfo", self.device, ctypes.byref(memory))
        return memory.used

    def _call(self, function: str, *arguments: Any) -> None:
        code = getattr(self.library, function)(*arguments)
        if code:
            raise SystemExit(f"{function} gave {code}")


def measure(words: list[str], out: Path, log: Path, limit: float, gpu: GPU | None = None) -> Run:
    """Run a program until all that it writes to `out` is on the disk, for at most `limit` seconds."""
    os.sync()
    run = Run(gpu=None if gpu is None else 0)
    before = _available(), 0 if gpu is None else gpu.used()
    start = time.monotonic()
    with log.open("ab") as file:
        process = os.posix_spawnp(
            words[0], words, os.environ, setsid=True,
            file_actions=[(os.POSIX_SPAWN_DUP2, file.fileno(), 1), (os.POSIX_SPAWN_DUP2, file.fileno(), 2)],
        )  # fmt: skip
    family, polls, ended = [process], 0, (0, 0, None)
    try:
        while not ended[0]:
            time.sleep(_POLL_SECONDS)
            if polls % _LOOKUPS == 0:
                family = _session(process)
            polls += 1
            _look(run, family, before, gpu)
            if time.monotonic() - start > limit and run.status == "done":
                run.status = "stopped"
                os.killpg(process, signal.SIGKILL)
            ended = os.wait4(process, os.WNOHANG)
    except BaseException:
        # a session of its own, which an interrupt from the keyboard does not reach
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
        raise
    _, status, usage = ended
    if run.status == "done":
        run.status = "failed" if status else "done"
        for path in out.glob("*.safetensors"):
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
    run.seconds = time.monotonic() - start
    run.cpu_seconds = usage.ru_utime + usage.ru_stime
    return run


def _look(run: Run, family: list[int], before: tuple[int, int], gpu: GPU | None) -> None:
    resident = anonymous = 0
    for process in family:
        # it may have ended
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            lines = Path(f"/proc/{process}/status").read_text().splitlines()
            sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
            run.resident = max(run.resident, sizes.get("VmHWM", 0))
            resident += sizes.get("VmRSS", 0)
            anonymous += sizes.get("RssAnon", 0)
    run.resident, run.anonymous = max(run.resident, resident), max(run.anonymous, anonymous)
    run.used = max(run.used, before[0] - _available())
    if gpu is not None:
        run.gpu = max(run.gpu, gpu.used() - before[1])


def _session(leader: int) -> list[int]:
    """The processes of a session."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                if int((folder / "stat").read_text().rpartition(")")[2].split()[3]) == leader:
                    found.append(int(folder.name))
    return found


def _available() -> int:
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024
