"""`folklora merge` on the command line."""

from __future__ import annotations

import sys

import pytest
import torch
import transformers
import yaml
from rich.console import Console

from folklora import cli
from folklora.merge import average


@pytest.fixture
def folklora(monkeypatch, capsys):
    """`folklora(word, ...)` runs the command line in this process; its exit code, output and errors."""

    def go(*words):
        monkeypatch.setattr(sys, "argv", ["folklora", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.run()
        read = capsys.readouterr()
        return ended.value.code or 0, " ".join(read.out.split()), " ".join(read.err.split())

    monkeypatch.setattr(cli, "console", Console(width=400))
    verbosity = transformers.logging.get_verbosity()
    yield go
    transformers.logging.set_verbosity(verbosity)
    transformers.utils.logging.enable_progress_bar()


def test_a_merge_a_mistake_and_a_task(llamas, asked, stored, folklora, tmp_path):
    file, out = tmp_path / "merge.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(asked(llamas, "linear", "a", "b", parameters={"weight": 1.0})))
    code, said, _ = folklora("merge", file, "--out", out, "--max-shard-size", "40KB")
    assert (code, said) == (0, f"written: {out} (30 tensors, 72.1 kB, 2 files)")
    a, b = (stored(llamas / name)["lm_head.weight"] for name in ("a", "b"))
    assert torch.equal(stored(out)["lm_head.weight"], average([a, b]).to(torch.bfloat16))
    code, _, error = folklora("merge", file, "--out", out)
    assert (code, error) == (
        1,
        f"error: {out} is there already; choose another folder, or pass --overwrite to replace it",
    )
    file.write_text(yaml.safe_dump(asked(llamas, "linnear", "a", "b")))
    code, _, error = folklora("merge", file, "--out", tmp_path / "other")
    assert code == 1
    assert error.startswith("error: there is no merging method 'linnear'; the nearest are linear,")
    file.write_text(yaml.safe_dump(asked(llamas, "emr", "a", "b", base="base")))
    assert folklora("merge", file, "--out", tmp_path / "tasks")[0] == 0
    code, said, _ = folklora("merge", tmp_path / "tasks", "--task", "1", "--out", tmp_path / "one")
    assert (code, said) == (0, f"written: {tmp_path / 'one'}")
