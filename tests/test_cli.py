"""The `bigvivit` command."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from bigvivit import cli
from tests.launching import BIN, Runs, call


def test_help_names_every_command() -> None:
    done = subprocess.run([BIN / "bigvivit"], check=True, capture_output=True, text=True, timeout=60)
    assert [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")] == [
        "train",
        "cache",
        "eval",
        "predict",
        "plan",
        "dryrun",
        "calibrate",
        "drift",
        "towers",
        "check",
        "report",
        "replay",
        "demo",
        "doctor",
    ]


@pytest.mark.parametrize(
    "command",
    [
        *("train", "cache", "eval", "predict", "plan", "dryrun", "calibrate", "drift"),
        *("towers", "check", "report", "replay", "demo", "doctor"),
    ],
)
def test_each_command_explains_itself(command: str) -> None:
    done = call(command, "--help")
    assert done.returncode == 0
    assert f"usage: bigvivit {command}" in done.stdout


def test_an_unknown_command() -> None:
    done = call("trian")
    assert done.returncode == 2
    known = "train, cache, eval, predict, plan, dryrun, calibrate, drift, towers, check, report, replay, demo, doctor"
    assert done.stderr == f"error: bigvivit has no command 'trian': one of {known}\n"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 75, "stopped\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "error: [Errno 28] No space left on device\n"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 1, "error: [Errno 13] Permission denied: 'x'\n"),
    ],
)
def test_what_no_command_expects_is_a_line_too(
    error: BaseException, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def towers(argv: list[str]) -> None:
        raise error

    monkeypatch.setattr(cli, "towers", towers)
    monkeypatch.setattr(sys, "argv", ["bigvivit", "towers"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert (end.value.code, capsys.readouterr().err) == (code, message)


def test_evaluate_and_report(runs: Runs, demo: Path) -> None:
    for name in ("zero1", "zero2"):
        done = call("eval", runs[name], "--manifest", demo / "val.csv", "--views", 1, "--crops", 1, "--device", "cpu")
        assert done.returncode == 0, done.stderr
        assert "of 16 clips" in done.stdout
    done = call("report", runs["zero1"], runs["zero2"])
    assert done.returncode == 0, done.stderr
    rows = {line.split("│")[1].strip(): line for line in done.stdout.splitlines() if "│" in line}
    assert rows["frozen parameters"].replace("│", " ").split()[2:] == ["0", "906", "k"]
    assert rows["measured by"].count("process RSS, imports included") == 2


def test_a_run_that_is_none(tmp_path: Path) -> None:
    for words in (["eval", tmp_path, "--manifest", "x.csv"], ["report", tmp_path], ["predict", tmp_path, tmp_path]):
        done = call(*words)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert "Traceback" not in done.stderr
