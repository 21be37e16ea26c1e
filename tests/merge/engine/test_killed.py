"""A merge that is killed outright goes on, in two processes, to the bytes of one that was left alone."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

from folklora.merge.engine import merge_models
from folklora.merge.engine.checkpoints import recorded

# every tensor is made durable before the next is written, since tiny ones are all written within a second
CHILD = """
import json, os, signal, sys
from folklora.merge.engine import checkpoints, merge_models

checkpoints._COMMIT_SECONDS = 0.0
commit_soon = checkpoints.Writer._commit_soon

def commit_now(writer):
    commit_soon(writer)
    writer._committed()

checkpoints.Writer._commit_soon = commit_now

def progress(event, tensors, **more):
    if event == "tensors" and tensors == 7:
        os.kill(os.getpid(), signal.SIGKILL)

merge_models(json.loads(sys.argv[1]), sys.argv[2], max_shard_size="60KB", progress=progress)
"""


def test_a_killed_merge_goes_on_in_two_processes(llamas, tmp_path, stored, asked):
    config = asked(llamas, "dare_ties", "a", "b", base="base", parameters={"density": 0.5})
    out, work = tmp_path / "out", tmp_path / ".out.merging"
    words = [sys.executable, "-c", CHILD, json.dumps(config), str(out)]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not out.exists()
    kept = recorded(work)
    assert len(kept) == 7
    other = {**config, "parameters": {"density": 0.6}}
    with pytest.raises(FileExistsError, match="unfinished merge of another configuration"):
        merge_models(other, out, max_shard_size="60KB")
    assert recorded(work) == kept
    seen = []
    merge_models(
        config, out, max_shard_size="60KB", workers=2, progress=lambda event, **more: seen.append((event, more))
    )
    whole = merge_models(config, tmp_path / "whole", max_shard_size="60KB")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in whole.iterdir()
    }
    tensors = stored(whole)
    total = sum(value.nbytes for value in tensors.values())
    assert seen[0] == ("plan", {"tensors": len(tensors), "bytes": total, "files": 2, "left_out": ()})
    assert seen[1] == ("tensors", {"tensors": 7, "bytes": sum(tensors[name].nbytes for name in kept)})
    assert seen[-1] == ("tensors", {"tensors": len(tensors), "bytes": total})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
