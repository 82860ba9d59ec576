"""Compiling the library: once, safely, and with one message where it cannot be."""

from __future__ import annotations

import os
import pwd
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bigvivit.config import ConfigError
from bigvivit.forecast.virtual_gpu import build
from bigvivit.forecast.virtual_gpu.build import build_library, find_torch, needed_symbols, undefined_symbols

BUILD = "from bigvivit.forecast.virtual_gpu.build import build_library; print(build_library().path)"


@pytest.mark.usefixtures("library")
def test_two_processes_build_at_once(tmp_path: Path) -> None:
    env = {**os.environ, "BIGVIVIT_CACHE": str(tmp_path)}
    both = [subprocess.Popen([sys.executable, "-c", BUILD], env=env, stdout=subprocess.PIPE) for _ in range(2)]
    first, second = (process.communicate()[0] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert first == second
    (made,) = (tmp_path / "virtual_gpu").iterdir()  # nothing is left of the other's
    assert {path.name for path in made.iterdir()} >= {"libbigvivit_virtual_gpu.so", *build.NAMES}


@pytest.mark.usefixtures("library")
def test_a_built_library_needs_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert build_library().path.is_file()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"PATH": ""},
            r"no C compiler \(cc, gcc, clang\) is on PATH: install .*; forecasts then use fake tensors",
        ),
        ({"CC": "/no/such/compiler -O2"}, r"CC='/no/such/compiler -O2' is no program: .* or unset it"),
        ({"CC": "false"}, r"does not compile with 'false'"),
    ],
)
@pytest.mark.usefixtures("library")
def test_what_the_compiler_lacks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    monkeypatch.setenv("BIGVIVIT_CACHE", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        build_library()
    folder = tmp_path / "virtual_gpu"
    assert not folder.exists() or not list(folder.iterdir())


def test_a_build_without_cuda_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("")
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.14.1+cpu'\ncuda: Optional[str] = None\n")
    spec = SimpleNamespace(origin=str(tmp_path / "torch" / "__init__.py"))
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ConfigError, match=r"needs a CUDA build of PyTorch, and torch 2\.14\.1\+cpu has none"):
        build_library()


def test_other_systems_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.sys, "platform", "darwin")
    with pytest.raises(ConfigError, match="needs Linux"):
        build_library()


@pytest.mark.usefixtures("library")
def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BIGVIVIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="set BIGVIVIT_CACHE to a folder that can"):
        build_library()


def test_every_symbol_that_pytorch_needs_is_answered_or_named(library: str) -> None:
    """By the linker's own reading of the library, where binutils are installed."""
    try:
        shown = subprocess.run(["nm", "-D", "--defined-only", library], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs nm")
    defined = set(re.findall(r" [TW] (\w+)", shown.stdout))
    needed = needed_symbols(find_torch())
    assert len(needed) > 300
    assert needed <= defined
    allocator = find_torch().folder / "lib" / "libc10_cuda.so"
    core = {name for name in undefined_symbols(allocator) if name.startswith("cuda")}
    strong = set(re.findall(r" T (\w+)", shown.stdout))
    assert core - strong == set(), "what the allocator itself needs must not end a process"


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    for name in ("HOME", "BIGVIVIT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(ConfigError, match="this user has none: set BIGVIVIT_CACHE"):
        build.cache_folder()
