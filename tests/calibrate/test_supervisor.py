"""Rows in child processes: what fails is a row, what is late is left, and the rest goes on."""

from __future__ import annotations

import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bigvivit.calibrate.journal import Journal
from bigvivit.calibrate.rows import Row
from bigvivit.calibrate.supervisor import Session
from tests.calibrate import jobs

CPU = {"device": "cpu", "cores": 2, "evidence": "measured"}
CUDA = {"device": "cuda", "cores": 2, "evidence": "measured"}


def run(journal: Journal, rows: list[Row], seconds: float = 30.0) -> list[dict[str, Any]]:
    session, found = Session(journal, rows, seconds=seconds, virtual={}), []
    try:
        session.run(found.append)
    finally:
        session.close()
    return found


def test_what_fails_is_a_row_and_the_rest_goes_on(tmp_path: Path) -> None:
    rows = [
        Row("facts", "first", 0.1, {"device": jobs.process}),
        Row("facts", "fails", 0.1, {"device": jobs.fail}),
        Row("facts", "ends", 0.1, {"device": jobs.end}),
        Row("facts", "second", 0.1, {"device": jobs.process}),
        Row("facts", "third", 0.1, {"device": jobs.process}),
        Row("facts", "fresh", 0.1, {"device": jobs.process}, fresh=True),
    ]
    first, fails, ends, second, third, fresh = run(Journal(tmp_path / "rows.jsonl", CPU), rows)
    assert fails["failed"] == "RuntimeError: CUDA out of memory. Tried to allocate 2 GiB"
    assert "exit code 3" in ends["failed"]
    assert len({first["value"], second["value"], fresh["value"]}) == 3  # a failure's process is not used again
    assert second["value"] == third["value"]
    assert run(Journal(tmp_path / "rows.jsonl", CPU), rows) == []  # nothing is asked twice


def test_what_is_late_is_left_to_the_next_run(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    late = [Row("facts", "hangs", 0.1, {"device": jobs.hang}), Row("facts", "next", 0.1, {"device": jobs.process})]
    start = time.monotonic()
    assert run(Journal(path, CPU), late, seconds=2.0) == []
    assert time.monotonic() - start < 10
    now = [Row("facts", "hangs", 0.1, {"device": partial(jobs.answer, 1)}), late[1]]
    assert [row["name"] for row in run(Journal(path, CPU), now)] == ["hangs", "next"]
    long = [Row("facts", "long", 100.0, {"device": partial(jobs.answer, 1)})]
    assert run(Journal(path, CPU), long, seconds=30.0) == []  # it would not end in time


def test_the_others_answer_beside_the_device_and_their_class_is_told(tmp_path: Path) -> None:
    rows = [
        Row("memory", "a", 0.1, {side: partial(jobs.answer, 7) for side in ("device", "forecast", "virtual")}),
        Row("times", "b", 0.1, {"device": partial(jobs.answer, 8)}, alone=True),
    ]
    found = {(row["name"], row["side"]): row for row in run(Journal(tmp_path / "rows.jsonl", CUDA), rows)}
    evidence = {key: row["evidence"] for key, row in found.items()}
    assert evidence == {
        ("a", "device"): "measured", ("a", "forecast"): "forecast", ("a", "virtual"): "virtual",
        ("b", "device"): "measured",
    }  # fmt: skip


def test_a_virtual_device_is_never_measured(tmp_path: Path) -> None:
    rows = [Row("memory", "a", 0.1, {side: partial(jobs.answer, 7) for side in ("device", "forecast")})]
    found = run(Journal(tmp_path / "rows.jsonl", {**CUDA, "evidence": "virtual"}), rows)
    assert {row["evidence"] for row in found} == {"virtual", "forecast"}


def test_a_search_begins_where_the_forecast_ended(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "rows.jsonl", CPU)
    journal.add({"key": "capacity: a", "side": "forecast", "frames": 96, "beyond": False})
    search = partial(jobs.frames, guess=None)
    rows = [Row("capacity", name, 0.1, {"device": search}) for name in ("a", "b")]
    assert [row["frames"] for row in run(journal, rows)] == [96, None]


def test_a_run_that_is_interrupted_leaves_nothing_running(tmp_path: Path) -> None:
    rows = [
        Row("facts", "a", 0.1, {"device": partial(jobs.answer, 1)}),
        Row("facts", "b", 0.1, {"forecast": jobs.hang}),
    ]
    session = Session(Journal(tmp_path / "rows.jsonl", CUDA), rows, seconds=30.0, virtual={})

    def interrupt(row: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        session.run(interrupt)
    session.close()
    assert time.monotonic() - start < 15
    assert threading.active_count() == 1 or not any("ask_others" in str(thread) for thread in threading.enumerate())
