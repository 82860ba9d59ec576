"""launch.sh: the two commands of the README."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.launching import ROOT


def launch(folder: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["./launch.sh", *words], check=False, cwd=folder, capture_output=True, text=True, env={**os.environ, **env}
    )


def test_an_unknown_word_is_refused_before_anything_is_installed(tmp_path: Path) -> None:
    (tmp_path / "launch.sh").write_bytes((ROOT / "launch.sh").read_bytes())
    (tmp_path / "launch.sh").chmod(0o755)
    done = launch(tmp_path, "tests")
    assert done.returncode == 1
    assert "launch.sh knows 'test' and 'train ...', or nothing at all; not 'tests'" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["launch.sh"]


def test_a_missing_or_old_python_is_named(tmp_path: Path) -> None:
    for name in ("launch.sh", "pyproject.toml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "launch.sh").chmod(0o755)
    old = tmp_path / "python2"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 2.7.18 || exit 1\n')
    old.chmod(0o755)
    assert "no-such-python is not on PATH" in launch(tmp_path, "test", PYTHON="no-such-python").stderr
    assert "Python 2.7.18 is too old" in launch(tmp_path, "test", PYTHON=str(old)).stderr


@pytest.mark.slow
def test_the_main_job_on_a_fresh_clone(tmp_path: Path) -> None:
    """Both stages, evaluation and the table; the second call reuses everything."""
    subprocess.run(["git", "clone", "--quiet", ROOT, tmp_path / "clone"], check=True)
    done = launch(tmp_path / "clone", COLUMNS="160")
    assert done.returncode == 0, done.stderr
    rows = {
        line.split("│")[1].strip(): line.split("│")[3].strip(" %") for line in done.stdout.splitlines() if "│" in line
    }
    assert float(rows["top-1"]) >= 85
    assert float(rows["top-1, frames shuffled"]) <= 55
    again = launch(tmp_path / "clone", COLUMNS="160")
    assert again.returncode == 0
    assert again.stdout.count("is there already") == 3
    wrong = launch(
        tmp_path / "clone", "train", "--stage", "1", "--out", "x", "--data.train", "x.csv", "--clip.frames", "8"
    )
    assert "model.tower is not set" in wrong.stderr
    assert wrong.returncode != 0
