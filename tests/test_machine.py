"""Facts about a machine, by stand-ins for what this one lacks."""

from __future__ import annotations

import os
import pwd
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from bigvivit import machine

PROBES = """
import os, sys, time
from bigvivit import machine
def die(folder, how):
    if how == "abort":
        os.abort()
    if how == "hang":
        time.sleep(60)
    if how == "raise":
        raise RuntimeError("first line\\nsecond")
    print("noise of a library")
    return {"of": how}
machine.PROBES["say"] = die
"""


def test_a_probe_that_crashes_or_hangs_takes_the_blame_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = tmp_path / "probes.py"
    runner.write_text(f"{PROBES}\nmachine.answer_all(sys.argv[3], sys.argv[4:])\n")
    python = tmp_path / "python"  # called as `python -m bigvivit.machine …`
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{runner}" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    names = ["say:a", "say:raise", "say:abort", "say:b", "say:hang", "say:c"]
    answers = machine.ask(names, "folder", seconds=5)
    assert {name: answer["error"] for name, answer in answers.items()} == {
        "say:a": None,
        "say:raise": "first line",
        "say:abort": "its process ended with exit code -6",
        "say:b": None,
        "say:hang": "it gave no answer within 5 s",
        "say:c": None,
    }
    assert answers["say:c"]["of"] == "c"


@pytest.mark.parametrize(
    ("card", "built", "runs"),
    [
        ((9, 0), ["sm_80", "sm_90"], True),
        ((8, 9), ["sm_80", "sm_86"], True),
        ((8, 0), ["sm_86"], False),
        ((10, 3), ["sm_90", "sm_100"], True),
        ((12, 0), ["sm_90"], False),
        ((12, 0), ["sm_90", "compute_90"], True),
        ((7, 0), ["sm_75", "compute_90"], False),
        ((9, 0), ["sm_90a"], True),
    ],
)
def test_which_cards_run_what_pytorch_was_built_for(card: tuple[int, int], built: list[str], runs: bool) -> None:
    assert machine.has_kernels(*card, built) == runs


def fake_nvml(monkeypatch: pytest.MonkeyPatch, fails: str = "") -> None:
    module: Any = ModuleType("pynvml")

    class NVMLError(Exception):
        pass

    def answer(name: str, value: Any) -> None:
        def call(*_: Any) -> Any:
            if name == fails:
                raise NVMLError("Driver/library version mismatch")
            return value

        setattr(module, name, call)

    module.NVMLError = NVMLError
    for name, value in {
        "nvmlInit": None,
        "nvmlSystemGetDriverVersion": b"580.65.06",
        "nvmlDeviceGetCount": 1,
        "nvmlDeviceGetHandleByIndex": 0,
        "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=80, free=70),
        "nvmlDeviceGetName": "A100",
        "nvmlDeviceGetMigMode": (1, 1),
        "nvmlDeviceGetCurrPcieLinkGeneration": 4,
        "nvmlDeviceGetCurrPcieLinkWidth": 8,
        "nvmlDeviceGetMaxPcieLinkGeneration": 4,
        "nvmlDeviceGetMaxPcieLinkWidth": 16,
    }.items():
        answer(name, value)
    monkeypatch.setitem(sys.modules, "pynvml", module)


def test_what_the_driver_says(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvml(monkeypatch)
    pcie = {"generation": 4, "width": 8, "max_generation": 4, "max_width": 16}
    gpu = {"name": "A100", "memory_bytes": 80, "free_bytes": 70, "mig": True, "pcie": pcie}
    assert machine.read_nvml() == {"error": None, "driver": "580.65.06", "gpus": [gpu]}
    fake_nvml(monkeypatch, fails="nvmlDeviceGetMigMode")  # a card that has none
    assert machine.read_nvml()["gpus"] == [{**gpu, "mig": False}]
    fake_nvml(monkeypatch, fails="nvmlInit")
    assert machine.read_nvml() == {"error": "Driver/library version mismatch", "driver": None, "gpus": []}


def test_reports_do_not_name_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert machine.hide_home(tmp_path / "env" / "bin") == "~/env/bin"
    assert machine.hide_home(Path("/opt/env")) == "/opt/env"


def test_a_user_whom_the_system_does_not_know(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Containers run as any number, without a home."""

    def unknown(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    for name in ("HOME", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.chdir(tmp_path)
    assert machine.hide_home(Path("/opt/env")) == "/opt/env"
    found = machine.read_disk(machine.disks()["downloads"])
    assert (found["path"], found["writable"]) == ("~/.cache/huggingface", True)


def test_no_folder_for_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    monkeypatch.setattr(machine, "ask", lambda names, folder: {name: {"folder": folder} for name in names})
    monkeypatch.setenv("TMPDIR", "/nowhere/tmp")
    found = machine.gather_facts()
    assert found["samples"] == {"folder": os.devnull}
    assert found["disks"]["temporary"]["path"] == "/nowhere/tmp"
    assert machine.probe_samples(os.devnull, "") == {"written": []}
    assert machine.probe_decoder(os.devnull, "pyav")["reads"] == []


def test_a_disk_that_is_not_there_yet(tmp_path: Path) -> None:
    found = machine.read_disk(tmp_path / "to" / "come")
    assert found["writable"]
    assert found["free_bytes"] > 0
