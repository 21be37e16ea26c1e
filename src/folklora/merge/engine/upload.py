"""Tensors brought to a GPU as they are stored, the next step's while this one's are merged."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from folklora.merge.blocks import parts_of
from folklora.merge.engine.checkpoints import TYPES
from folklora.merge.engine.job import Job
from folklora.merge.engine.plan import Step, Take

_THREADS = 4
# of one pinned buffer; each thread has one
_STAGED_ELEMENTS = 2**22
# the share of the free memory that one step's tensors may take: the next step's come besides, and what is computed
_SHARE = 0.25


class Uploads:
    """Gives the tensors of each step on a GPU, so that a method's further passes do not read the disk.

    Args:
        job: The merge.
        device: Where the tensors are wanted; on a CPU they are left where they are.
    """

    def __init__(self, job: Job, device: torch.device) -> None:
        self._models, self._by_rows, self._device = job.models, job.schema.function.by_rows, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._threads = ThreadPoolExecutor(_THREADS, initializer=self._enter)

    def __enter__(self) -> Uploads:
        return self

    def __exit__(self, *error: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def along(self, steps: Sequence[Step]) -> Iterator[tuple[Step, dict[Take, Tensor]]]:
        """Each step with its tensors, until the next is asked for.

        Without them where the method takes whole tensors, and has its own in their place; where they are too large; and
        where something has to be done to them first.
        """
        coming: dict[Take, Future[Tensor]] = self._begin(steps[0]) if steps else {}
        for index, step in enumerate(steps):
            tensors = {take: future.result() for take, future in coming.items()}
            coming = self._begin(steps[index + 1]) if index + 1 < len(steps) else {}
            yield step, tensors
            # before more is asked for
            tensors.clear()

    def _enter(self) -> None:
        if self._stream:
            torch.cuda.set_device(self._device)

    def _begin(self, step: Step) -> dict[Take, Future[Tensor]]:
        takes = dict.fromkeys(step.takes())
        forms = {take: self._models[take.model].layout.forms[take.key] for take in takes}
        changed = step.copied or step.by_token or any(self._models[take.model].adapts(take.key) for take in takes)
        if not self._by_rows or changed or sum(form.bytes for form in forms.values()) >= _SHARE * _free(self._device):
            return {}
        places = {
            take: torch.empty(form.shape, dtype=TYPES[form.dtype], device=self._device) for take, form in forms.items()
        }
        # the memory may be that of a tensor whose last use is still ahead of it in the queue
        emptied = torch.cuda.current_stream(self._device).record_event() if self._stream else None
        return {take: self._threads.submit(self._fill, place, take, emptied) for take, place in places.items()}

    def _fill(self, place: Tensor, take: Take, emptied: torch.cuda.Event | None) -> Tensor:
        with torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext():
            if emptied is not None:
                self._stream.wait_event(emptied)
            for part in parts_of(place.shape, _STAGED_ELEMENTS):
                rows = None if part is ... else part
                # waits for the copy: the buffer is filled again next, and what is returned is there
                place[part].copy_(self._models[take.model].read(take.key, rows, pinned=self._stream is not None))
        return place


def _free(device: torch.device) -> int:
    """Bytes that are free on a GPU or held by torch without use; none on a CPU."""
    if device.type != "cuda":
        return 0
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
