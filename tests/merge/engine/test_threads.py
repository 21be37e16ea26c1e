"""Tensors that are merged side by side in threads: the same bytes, and errors that end the merge."""

from __future__ import annotations

import os
import shutil
import threading
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from folklora.merge.engine import checkpoints, merge_models
from folklora.merge.engine.checkpoints import Form, Shard, Writer
from folklora.merge.engine.team import side_by_side


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [("average", {}), ("dare_ties", {"density": 0.5}), ("ties", {"density": 0.4}), ("slerp", {"t": 0.3})],
)
def test_threads_write_the_same_bytes_as_one(method, parameters, llamas, tmp_path, asked, threads):
    models = ["b"] if method == "slerp" else ["a", "b"]
    base = {} if method == "average" else {"base": "a" if method == "slerp" else "base"}
    config = asked(llamas, method, *models, **base, parameters=parameters)
    outs = {}
    for count in (1, 4):
        threads(count)
        outs[count] = merge_models(config, tmp_path / str(count), max_shard_size="60KB")
        assert torch.get_num_threads() == count
    names = {path.name for path in outs[1].iterdir()}
    assert names == {path.name for path in outs[4].iterdir()}
    assert len(names) > 3
    assert all((outs[1] / name).read_bytes() == (outs[4] / name).read_bytes() for name in names)


def test_nan_in_one_of_several_threads_leaves_nothing(llamas, tmp_path, asked, threads):
    threads(4)
    models = shutil.copytree(llamas, tmp_path / "models")
    file = min((models / "b").glob("*.safetensors"))
    values = load_file(file)
    name = min(values)
    values[name].view(-1)[0] = float("nan")
    save_file(values, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{name.removeprefix('model.')} holds NaN"):
        merge_models(asked(models, "ties", "a", "b", base="base"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.merging").exists()


def test_a_disk_that_refuses_ends_all_threads(llamas, tmp_path, asked, threads, monkeypatch):
    threads(4)
    config = asked(llamas, "ties", "a", "b", base="base", parameters={"density": 0.4})
    written, refused = os.pwrite, threading.Event()

    def pwrite(handle, data, at):
        if refused.is_set() or at > 20_000:
            refused.set()
            raise OSError(28, "No space left on device")
        return written(handle, data, at)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.os, "pwrite", pwrite)
        with pytest.raises(OSError, match="No space left"):
            merge_models(config, tmp_path / "out")
    assert refused.is_set()
    assert not (tmp_path / "out").exists()
    # the same call goes on afterwards
    merge_models(config, tmp_path / "out")
    whole = merge_models(config, tmp_path / "whole")
    file = checkpoints.SINGLE
    assert (tmp_path / "out" / file).read_bytes() == (whole / file).read_bytes()


def test_work_side_by_side_uses_one_of_torchs_threads_each_and_stops_at_an_error(threads):
    threads(3)
    seen, barrier = [], threading.Barrier(2, timeout=60)

    def do(item: int) -> None:
        # two at once, or this would break
        barrier.wait()
        seen.append((item, torch.get_num_threads()))

    side_by_side(do, [0, 1, 2, 3], 2, [].append)
    assert sorted(item for item, _ in seen) == [0, 1, 2, 3]
    assert {count for _, count in seen} == {1}
    assert torch.get_num_threads() == 3

    done = []

    def fail(item: int) -> None:
        if item == 0:
            raise ValueError("the first")
        done.append(item)

    with pytest.raises(ValueError, match="the first"):
        side_by_side(fail, [0, 1, 2], 1, [].append)
    assert done == []
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_an_error_ends_tensors_that_others_are_in_the_midst_of(kind, tmp_path):
    count, begun = 400, threading.Event()
    shards = [Shard("one.safetensors", {"long": Form("U8", (count,)), "bad": Form("U8", (1,))})]
    checkpoints.create(tmp_path, shards)
    made = []

    def parts():
        for number in range(count):
            made.append(number)
            begun.set()
            time.sleep(0.01)
            yield torch.zeros(1, dtype=torch.uint8)

    def do(name: str) -> None:
        if name == "bad":
            begun.wait()
            raise kind("the first")
        writer.put(name, parts())

    with pytest.raises(kind, match="the first"), Writer(tmp_path, shards, 0, threads=2) as writer:
        side_by_side(do, ["long", "bad"], 2, writer.stop)
    assert 0 < len(made) < count
    assert checkpoints.recorded(tmp_path) == set()


def test_files_stay_open_for_what_is_being_written_when_the_user_interrupts_twice(tmp_path, monkeypatch):
    shards = [Shard("one.safetensors", {"long": Form("U8", (4,))})]
    checkpoints.create(tmp_path, shards)
    written, errors = os.pwrite, []

    def pwrite(handle, data, at):
        time.sleep(0.3)
        try:
            return written(handle, data, at)
        except OSError as error:
            errors.append(error)
            raise

    monkeypatch.setattr(checkpoints.os, "pwrite", pwrite)
    writer = Writer(tmp_path, shards, 0)
    wait = writer.writes.shutdown

    def shutdown():
        writer.writes.shutdown = wait
        raise KeyboardInterrupt

    writer.put("long", [torch.full((4,), 7, dtype=torch.uint8)])
    while not writer.open:
        time.sleep(0.01)
    writer.writes.shutdown = shutdown
    with pytest.raises(KeyboardInterrupt):
        writer.__exit__(None)
    wait()
    assert errors == []
    assert (tmp_path / "one.safetensors").read_bytes()[-4:] == b"\x07" * 4
