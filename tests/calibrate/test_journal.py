"""Rows on a file that may be cut anywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bigvivit.calibrate.journal import Journal
from bigvivit.config import ConfigError

IDENTITY = {"card": "NVIDIA L4", "driver": "580.1"}


def write(path: Path, count: int) -> Journal:
    journal = Journal(path, IDENTITY)
    for number in range(count):
        journal.add({"key": f"facts: {number}", "side": "device", "value": number})
    return journal


def test_a_cut_anywhere_leaves_what_was_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "rows.jsonl"
    write(path, 3)
    data = path.read_bytes()
    for length in range(0, len(data), 5):
        path.write_bytes(data[:length])
        whole = data[:length].count(b"\n")
        journal = Journal(path, IDENTITY)
        assert len(journal.rows) == max(whole - 1, 0), length
        journal.add({"key": "facts: after", "side": "device"})
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert lines[0] == IDENTITY
        assert [line["key"] for line in lines[1:]] == [*(f"facts: {n}" for n in range(whole - 1)), "facts: after"]


def test_another_device_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write(path, 1)
    with pytest.raises(ConfigError, match=r"was measured with driver 580\.1, now 590: give another --out"):
        Journal(path, {**IDENTITY, "driver": "590"})
    assert len(Journal(path, IDENTITY).rows) == 1


@pytest.mark.parametrize("text", ["hello\n", "[1]\n[2]\n", "{}\n{}\n", "{}\n3\n"])
def test_what_is_no_journal(text: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"rows\.jsonl"):
        Journal(path, IDENTITY)
    assert path.read_text() == text


def test_a_row_that_failed_is_answered_but_not_found(tmp_path: Path) -> None:
    journal = write(tmp_path / "rows.jsonl", 1)
    journal.add({"key": "facts: x", "side": "device", "failed": "out of memory"})
    assert journal.found("facts: x", "device") is None
    assert ("facts: x", "device") in journal.rows
    assert journal.found("facts: 0", "device") is not None


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"out=.*file.out cannot be written \(Not a directory\): give another folder"):
        Journal(tmp_path / "file" / "out" / "rows.jsonl", IDENTITY)
