"""`bigvivit doctor`: from facts to findings, one screen and an exit code."""

from __future__ import annotations

import copy
import json
import platform
import re
from collections.abc import Callable
from typing import Any

import pytest

from bigvivit import machine
from bigvivit.commands import doctor
from bigvivit.units import GiB, MiB
from bigvivit.versions import PACKAGES


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    """Of this machine, with two GPUs and nothing to find fault with."""
    found = machine.gather_facts()
    for package in found["packages"]:
        package |= {"version": package["tested"], "state": "ok", "error": None}
    pcie = {"generation": 4, "width": 16, "max_generation": 4, "max_width": 16}
    card = {"name": "A100", "memory_bytes": 80 * GiB}
    driver = {**card, "free_bytes": 79 * GiB, "mig": False, "pcie": pcie}
    seen = {**card, "capability": "8.0", "has_kernels": True, "bf16_units": True}
    found["nvml"] = {"error": None, "driver": "580.65.06", "gpus": [driver, copy.deepcopy(driver)]}
    found["cuda"] = {"error": None, "built_for": "13.0", "nccl": "2.30.7", "gpus": [seen, copy.deepcopy(seen)]}
    found["links"] = {"error": None, "to_gpu": [25e9, 25e9], "between_gpus": [250e9]}
    found["cuda_visible_devices"] = None
    found["compiler"] |= {"C++ compiler": "/usr/bin/c++", "ninja": "/usr/bin/ninja"}
    found["memory"] = {
        **{"total_bytes": 256 * GiB, "available_bytes": 200 * GiB, "data_limit_bytes": None},
        **{"shm_bytes": 8 * GiB, "shm_free_bytes": 8 * GiB},
    }
    for disk in found["disks"].values():
        disk |= {"free_bytes": 100 * GiB, "writable": True}
    return found


def judge(facts: dict[str, Any]) -> list[tuple[str, str]]:
    found = [*doctor.judge_packages(facts), *doctor.judge_gpus(facts), *doctor.judge_machine(facts)]
    return [(finding.level, f"{finding.what}: {finding.fix}") for finding in found]


def package(name: str, **changes: Any) -> Callable[[dict[str, Any]], Any]:
    def change(facts: dict[str, Any]) -> None:
        next(found for found in facts["packages"] if found["name"] == name).update(changes)

    return change


def without_gpus(facts: dict[str, Any]) -> None:
    facts["cuda"] |= {"gpus": [], "error": "no driver"}
    facts["nvml"] |= {"gpus": [], "error": "NVML Shared Library Not Found"}


def cpu(**memory: Any) -> Callable[[dict[str, Any]], Any]:
    def change(facts: dict[str, Any]) -> None:
        without_gpus(facts)
        facts["memory"] |= memory

    return change


CASES: dict[str, tuple[Callable[[dict[str, Any]], Any], str, str]] = {
    "missing": (package("av", state="missing", version=None), "fails", 'av is not installed.*pip install "av>=16,<20"'),
    "missing part": (package("timm", state="missing", version=None), "lacks", r'timm.*pip install "bigvivit\[timm\]"'),
    "broken": (package("deepspeed", state="broken", error="undefined symbol"), "fails", "imported .undefined symbol"),
    "too new": (package("torch", state="outside", version="2.16.0"), "fails", "torch 2.16.0 is none of the versions"),
    "untested": (package("numpy", state="untested", version="2.6.0"), "lacks", "numpy 2.6.0 was not tested"),
    "no decoder": (
        lambda facts: [answer.update(reads=[], error="no libavcodec") for answer in facts["decoders"].values()],
        "fails",
        "no decoder reads H.264 .decord: no libavcodec",
    ),
    "old driver": (
        lambda facts: facts["cuda"].update(gpus=[], error="The NVIDIA driver on your system is too old"),
        "fails",
        "driver 580.65.06 has 2 GPU.s., and PyTorch finds none .*too old.*install a driver for CUDA 13.0",
    ),
    "CPU build": (lambda facts: facts["cuda"].update(gpus=[], built_for=None), "fails", "is built for CPUs"),
    "hidden": (
        lambda facts: facts.update(cuda={**facts["cuda"], "gpus": []}, cuda_visible_devices=""),
        "lacks",
        "CUDA_VISIBLE_DEVICES='' hides all 2 GPUs",
    ),
    "wrongly shown": (
        lambda facts: facts.update(
            cuda={**facts["cuda"], "gpus": [], "error": "No CUDA GPUs are available"}, cuda_visible_devices="gpu0"
        ),
        "fails",
        "finds none under CUDA_VISIBLE_DEVICES='gpu0' .No CUDA.*: unset CUDA_VISIBLE_DEVICES; if there are still none",
    ),
    "fewer": (lambda facts: facts["cuda"]["gpus"].pop(), "lacks", "the driver has 2 GPUs and PyTorch finds 1"),
    "no NVML": (lambda facts: facts["nvml"].update(gpus=[], error="mismatch"), "lacks", "does not answer .mismatch"),
    "old card": (
        lambda facts: facts["cuda"]["gpus"][0].update(has_kernels=False, capability="6.1"), "fails",
        "no kernels for A100 .capability 6.1",
    ),
    "busy": (lambda facts: facts["nvml"]["gpus"][1].update(free_bytes=10 * GiB), "lacks", "hold 70 GiB of A100"),
    "slot": (lambda facts: facts["nvml"]["gpus"][1]["pcie"].update(width=4), "lacks", "linked by 4 of 16 PCIe lanes"),
    "no NCCL": (lambda facts: facts["cuda"].update(nccl=None), "fails", "no NCCL for 2 GPUs"),
    "small shm": (lambda facts: facts["memory"].update(shm_free_bytes=64 * MiB), "lacks", "has 64 MiB.*--shm-size"),
    "small shm, CPU": (cpu(shm_free_bytes=64 * MiB), "fails", "2 ranks may need 132 MiB"),
    "little memory": (cpu(available_bytes=GiB), "fails", "1 GiB of memory are available; 2 ranks need 1.8 GiB"),
    "limited": (cpu(data_limit_bytes=GiB // 2), "fails", "RLIMIT_DATA is 512 MiB.*ulimit -d"),
    "read-only": (lambda facts: facts["disks"]["here"].update(writable=False), "lacks", "written: give --out"),
    "full": (lambda facts: facts["disks"]["downloads"].update(free_bytes=GiB), "lacks", "huggingface has 1 GiB free"),
}  # fmt: skip


def test_nothing_is_found_where_nothing_is_wrong(facts: dict[str, Any]) -> None:
    assert judge(facts) == []


@pytest.mark.parametrize("name", CASES)
def test_each_fault_is_found_alone(name: str, facts: dict[str, Any]) -> None:
    change, level, message = CASES[name]
    ill = copy.deepcopy(facts)
    change(ill)
    ((found, text),) = judge(ill)
    assert found == level
    assert re.search(message, text), text


def test_no_compiler_matters_on_cpus_alone(facts: dict[str, Any]) -> None:
    ill = copy.deepcopy(facts)
    ill["compiler"]["C++ compiler"] = None
    assert judge(ill) == []
    without_gpus(ill)
    ((level, text),) = judge(ill)
    assert level == "lacks"
    assert "go through gloo" in text


def test_decord_is_not_missed_where_it_has_no_wheel(facts: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    ill = copy.deepcopy(facts)
    package("decord", state="missing", version=None)(ill)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert len(judge(ill)) == 1
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert judge(ill) == []


def run(
    facts: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str
) -> tuple[object, str]:
    monkeypatch.setattr(doctor, "gather_facts", lambda: facts)
    with pytest.raises(SystemExit) as end:
        doctor.doctor(list(words))
    return end.value.code, capsys.readouterr().out


def test_one_screen(facts: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, page = run(facts, monkeypatch, capsys)
    assert code == 0
    assert page.endswith("can run here\n")
    assert "A100 80 GiB, bf16 yes, 25 GB/s from the host; A100" in " ".join(page.split())
    assert "GB/s from GPU 0 to the others: 250" in " ".join(page.split())
    ill = copy.deepcopy(facts)
    for name, (change, *_) in CASES.items():
        if name in ("missing", "missing part", "broken", "untested", "busy", "old card", "read-only"):
            change(ill)
    code, page = run(ill, monkeypatch, capsys)
    assert code == 1
    assert "would fail here: 3 reason(s)" in page
    marks = [line.split()[0] for line in page.splitlines() if line.startswith(("FAILS", "note"))]
    assert marks == ["FAILS"] * 3 + ["note"] * 4
    assert len(page.splitlines()) <= 50
    assert max(map(len, page.splitlines())) <= doctor.WIDTH


def test_json_is_for_programs(
    facts: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, page = run(facts, monkeypatch, capsys, "--json")
    found = json.loads(page)
    assert code == 0
    assert found["findings"] == []
    assert [package["name"] for package in found["packages"]] == list(PACKAGES)
    assert set(found["decoders"]["pyav"]["reads"]) == set(machine.SAMPLES)
