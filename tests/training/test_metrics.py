"""The line on a terminal. Plain lines and the file: test_loop.py."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

from bigvivit.config import ConfigError
from bigvivit.training.metrics import MetricsLog

RECORD = {"lr": 0.1, "clips_per_second": 33.2, "peak_bytes": 2**30, "seconds_left": 9.0}
CODE = """
import sys
from pathlib import Path
from bigvivit.training.metrics import MetricsLog
log = MetricsLog(Path(sys.argv[1]), 30, "stage 1")
record = {"loss": 1.5, "lr": 0.1, "clips_per_second": 33.2, "peak_bytes": 3 * 2**30, "seconds_left": 9.0}
for step in (10, 30):
    log.report({"step": step, **record})
log.close()
"""


def test_one_moving_line_on_a_terminal(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-c", CODE, tmp_path / "metrics.jsonl"],
        check=False,
        stdout=theirs,
        env={**os.environ, "COLUMNS": "120", "TERM": "xterm"},
    )
    os.close(theirs)
    printed = os.read(ours, 100_000).decode()
    assert done.returncode == 0
    for part in ("stage 1", "30/30", "loss 1.5000", "lr 1.00e-01", "33.2 clips/s", "3 GiB"):
        assert part in printed
    assert "step 10/30" not in printed  # that is the plain form
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_run_that_goes_on_has_its_past_in_the_file_at_once(tmp_path: Path) -> None:
    """Killed before its next record, it must not have lost the earlier ones; a torn last line is not in the way."""
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step}) + "\n" for step in range(1, 6)]
    path.write_text("".join(lines) + '{"ste')
    MetricsLog(path, 10, "stage 1", first_step=3)
    assert path.read_text() == "".join(lines[:3])


def test_a_full_disk_is_one_message_also_when_the_log_is_closed(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", 10, "stage 1")
    log.file.close()
    log.file = Path("/dev/full").open("a")  # noqa: SIM115 (closed by the log)
    try:
        with pytest.raises(ConfigError, match=r"metrics\.jsonl could not be written into .*No space left on device"):
            log.report({"step": 1, "loss": 1.0, **RECORD})
    finally:
        log.close()  # which flushes once more


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first_step in (0, 2):  # killed after step 3, gone on from step 2
        log = MetricsLog(tmp_path / "metrics.jsonl", 5, "stage 1", first_step=first_step)
        for step in range(first_step + 1, first_step + 4):
            log.report({"step": step, "loss": step + first_step / 10, **RECORD})
        log.report_validation({"step": first_step + 3, "val_top1": 0.5, "val_loss": 1.0})
        log.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, round(event.value, 1)) for event in board.Scalars("loss")] == [
        (1, 1.0), (2, 2.0), (3, 3.2), (4, 4.2), (5, 5.2),
    ]  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == [1, 2, 3.2, 4.2, 5.2]


def test_a_run_killed_before_its_first_checkpoint_starts_its_curves_anew(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps in (3, 2):
        log = MetricsLog(tmp_path / "metrics.jsonl", 5, "stage 1")
        for step in range(1, steps + 1):
            log.report({"step": step, "loss": step + steps / 10, **RECORD})
        log.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, round(event.value, 1)) for event in board.Scalars("loss")] == [(1, 1.2), (2, 2.2)]


FOLDER = ModuleType("tensorboard")  # what importing a folder without code gives
FOLDER.__spec__ = ModuleSpec("tensorboard", None)


@pytest.mark.parametrize("found", [None, FOLDER], ids=["not installed", "a folder of that name"])
def test_without_tensorboard_nothing_is_missed(
    found: ModuleType | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", found)
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    log = MetricsLog(tmp_path / "metrics.jsonl", 5, "stage 1")
    log.report({"step": 1, "loss": 1.0, **RECORD})
    log.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert len(capsys.readouterr().out.splitlines()) == 1
