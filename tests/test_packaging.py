"""What is installed from a sdist and a wheel, away from any checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from bigvivit import __version__
from tests.environments import build_environment, everything_but
from tests.launching import ROOT

BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, 'build_' + sys.argv[1])('dist'))"


def leave_out(folder: str, names: list[str]) -> set[str]:
    """What no fresh checkout holds."""
    made = {"data", "runs", "build", "dist"} if Path(folder) == ROOT else set()
    return made | {
        name for name in names if name.startswith(".") or name == "__pycache__" or name.endswith(".egg-info")
    }


def build(folder: Path, kind: str) -> Path:
    """A `sdist` or a `wheel` of the project in this folder."""
    done = subprocess.run([sys.executable, "-c", BUILD, kind], check=False, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "dist" / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment into which the wheel, built from the sdist, was installed."""
    folder = tmp_path_factory.mktemp("packaging")
    copy = folder / "copy"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=leave_out)
    with tarfile.open(build(copy, "sdist")) as archive:
        archive.extractall(folder / "sdist", filter="data")
    (source,) = (folder / "sdist").iterdir()
    wheel = build(source, "wheel")
    shutil.rmtree(copy)
    python = build_environment(folder / "env", everything_but())
    words = ["--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    run(sys.executable, "-m", "pip", *words, cwd=folder)
    return python


def run(*words: object, cwd: Path) -> str:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # which leads to the checkout
    done = subprocess.run([str(word) for word in words], check=False, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_is_installed(python: Path, tmp_path: Path) -> None:
    code = "import bigvivit; from importlib.metadata import version; print(bigvivit.__file__, version('bigvivit'))"
    file, version = run(python, "-c", code, cwd=tmp_path).split()
    assert Path(file).is_relative_to(python.parents[1])
    assert version == __version__
    installed = Path(file).parent
    assert (installed / "py.typed").is_file()
    wanted = {path.relative_to(ROOT / "bigvivit") for path in (ROOT / "bigvivit").rglob("*.py")}
    assert {path.relative_to(installed) for path in installed.rglob("*.py")} == wanted
    sources = "forecast/virtual_gpu/csrc"
    assert sorted(path.name for path in (installed / sources).iterdir()) == sorted(
        path.name for path in (ROOT / "bigvivit" / sources).iterdir()
    )
    assert [path.name for path in installed.parent.iterdir() if path.name in ("tests", "bench", "ds_configs")] == []


def test_the_demo_is_written_anywhere(python: Path, tmp_path: Path) -> None:
    command = python.parent / "bigvivit"
    assert "to data/demo" in run(command, "demo", "--train-clips", 8, "--val-clips", 8, cwd=tmp_path)
    assert (tmp_path / "data" / "demo" / "train.csv").is_file()


def test_deepspeed_files_are_known_by_name_anywhere(python: Path, tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from bigvivit.config import OptimConfig
from bigvivit.memory.ds_json import read_ds_json, zero_stage
optim = OptimConfig(batch_size=8, epochs=1, warmup_epochs=0)
print(*(zero_stage(read_ds_json(Path(name), optim, 1)) for name in sys.argv[1:]))
"""
    names = sorted(path.stem for path in (ROOT / "ds_configs").glob("*.json"))
    assert names == ["zero2", "zero3", "zero3_offload"]
    assert run(python, "-c", code, *names, "zero3.json", cwd=tmp_path) == "2 3 3 3\n"
