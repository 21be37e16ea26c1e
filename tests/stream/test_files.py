from __future__ import annotations

import json
import os

import pytest

from folklora.stream.files import read_json, replace_folder, replacing, write_json, write_text


def test_text_is_written_as_utf8_and_leaves_nothing_else(tmp_path):
    write_text(tmp_path / "a.txt", "Grüße\n")
    write_text(tmp_path / "a.txt", "ζ\n")
    assert (tmp_path / "a.txt").read_bytes() == "ζ\n".encode()
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert os.stat(tmp_path / "a.txt").st_mode & 0o777 == 0o644


def test_a_failed_write_keeps_the_old_file(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a.txt", "new \ud800")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_file_takes_its_place_at_the_end_of_a_block_that_did_not_fail(tmp_path):
    path = tmp_path / "a.bin"
    with replacing(path) as temporary:
        temporary.write_bytes(b"first")
        assert not path.exists()
    with pytest.raises(UnicodeEncodeError), replacing(path) as temporary:
        temporary.write_text("half \ud800", encoding="utf-8")
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "no" / "a.txt", "x")


def test_json_comes_back_as_it_was(tmp_path):
    value = {"matrix": [[1.5, None], [0.1, 2]], "name": "ä"}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert (tmp_path / "a.json").read_text().endswith("}\n")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_json_without_numbers_it_cannot_hold(tmp_path, number):
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"score": number})
    assert not list(tmp_path.iterdir())


def test_bad_json_is_named_with_its_place(tmp_path):
    (tmp_path / "a.json").write_text('{\n  "a": 1,\n}')
    with pytest.raises(ValueError, match=r"a\.json:[23]:\d+: not valid JSON") as caught:
        read_json(tmp_path / "a.json")
    assert isinstance(caught.value.__cause__, json.JSONDecodeError)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "b.json")


def test_a_finished_folder_replaces_the_old_one(tmp_path):
    for name, file in (("final", "old"), ("temporary", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(name)
    replace_folder(tmp_path / "temporary", tmp_path / "final")
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert [path.name for path in (tmp_path / "final").iterdir()] == ["new"]
