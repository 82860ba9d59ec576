"""Videos that cannot be read: what is counted, and when training stops."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bigvivit.training.failed_clips import FAILED, Failures, TooManyFailuresError
from tests.launching import STAGE1, start, train

CLIPS = [Path(f"{number}.mp4") for number in range(10)]


def test_failures_are_counted_once_and_survive_a_stop(tmp_path: Path) -> None:
    failures = Failures(CLIPS, 0.3, tmp_path)
    failures.note(0, [(3, "3 is broken"), (4, "4 hangs")], ["decord"])
    failures.note(0, [(3, "3 is broken")], ["decord"])
    failures.gather()
    with (tmp_path / FAILED).open("a") as file:
        file.write('{"epoch": 0, "ind')  # where a kill cut it off
    again = Failures(CLIPS, 0.3, tmp_path, resume=True)
    again.note(0, [(4, "4 hangs")], ["pyav"])  # a step that is done again
    again.note(1, [(3, "3 is broken")], ["decord"])
    again.gather()
    assert again.summary() == {
        "decoded_by": {"pyav": 1, "decord": 1},
        "replaced_samples": 3,
        "failed_clips": [
            {"index": 3, "path": "3.mp4", "reason": "3 is broken"},
            {"index": 4, "path": "4.mp4", "reason": "4 hangs"},
        ],
    }
    lines = [json.loads(line) for line in (tmp_path / FAILED).read_text().splitlines()]
    assert [(line["epoch"], line["index"]) for line in lines] == [(0, 3), (0, 4), (1, 3)]
    assert Failures(CLIPS, 0.3, tmp_path).summary()["replaced_samples"] == 0


def test_more_than_the_share_stops(tmp_path: Path) -> None:
    failures = Failures(CLIPS, 0.2, None)
    failures.note(0, [(1, "1 is broken"), (2, "2 is broken")], ["decord"])
    failures.gather()
    failures.note(1, [(1, "1 is broken"), (7, "7 is broken")], ["decord"])
    with pytest.raises(TooManyFailuresError, match=r"3 of 10 clips .* data\.max_failed=0\.2:\n  - 1 is broken\n"):
        failures.gather()


@pytest.fixture
def broken(demo: Path, tmp_path: Path) -> Path:
    """The demo's manifest, with two of 32 videos that are none."""
    lines = (demo / "train.csv").read_text().replace("clips/", f"{demo}/clips/").splitlines()
    for number in (5, 9):
        (tmp_path / f"broken{number}.mp4").write_bytes(b"no video")
        lines[number] = f"{tmp_path}/broken{number}.mp4,{lines[number].split(',', 1)[1]}"
    (tmp_path / "train.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "train.csv"


def test_training_replaces_counts_and_names(broken: Path, tmp_path: Path) -> None:
    printed = train(
        "python", tmp_path / "run", *STAGE1, "--data.train", broken, "--data.max-failed", 0.1, "--data.workers", 2
    )
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [clip["index"] for clip in summary["failed_clips"]] == [4, 8]
    assert summary["replaced_samples"] >= 4  # in each of two epochs
    assert all("cannot be opened as a video" in clip["reason"] for clip in summary["failed_clips"])
    assert f"replaced: {tmp_path}/broken5.mp4 cannot be opened as a video" in printed


@pytest.mark.parametrize("launcher", [pytest.param("python", marks=pytest.mark.slow), "torchrun"])
def test_training_stops_on_all_ranks_with_one_message(launcher: str, broken: Path, tmp_path: Path) -> None:
    arguments = ["--out", tmp_path / "run", *STAGE1, "--data.train", broken, "--data.max-failed", 0.05]
    done = start(launcher, *arguments)
    assert done.returncode != 0
    assert done.stderr.count("error: 2 of 32 clips cannot be read, more than the share of data.max_failed=0.05") == 1
    assert "bigvivit/training/failed_clips.py" not in done.stderr  # no traceback of ours; torchrun prints its own
    assert not (tmp_path / "run" / "checkpoint.json").exists()
