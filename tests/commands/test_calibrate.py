"""`bigvivit calibrate` as its users call it, on the CPU and on a virtual GPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bigvivit.calibrate.calibration import apply
from bigvivit.calibrate.constants import distil
from bigvivit.calibrate.journal import Journal
from bigvivit.commands.calibrate import is_usable, say_use
from bigvivit.config import ConfigError
from bigvivit.forecast.hardware import find_accelerator
from bigvivit.forecast.overhead import CUBLAS_WORKSPACE, context
from bigvivit.forecast.virtual_gpu import virtual_gpu
from bigvivit.forecast.virtual_gpu.build import build_library, cache_folder
from bigvivit.units import MiB
from tests.calibrate import jobs
from tests.launching import ROOT, call

CPU = ("calibrate", "--device", "cpu", "--only", "facts", "rates", "--seconds", "300")


def read_rows(out: Path) -> list[dict[str, object]]:
    """Without the first line, which says of what they are."""
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()[1:]]


def test_a_run_on_the_cpu_that_is_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And ends with what plan takes."""
    monkeypatch.setenv("BIGVIVIT_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    words = [sys.executable, "-m", "bigvivit.cli", *CPU, "--out", str(out)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    first = next(line for line in process.stdout if line.startswith("facts: process"))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = [row for row in read_rows(out) if row["name"] == "process"]
    with (out / "rows.jsonl").open("a") as file:
        file.write('{"key": "rates: memory", "si')
    done = call(*CPU, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "measured" in first
    rows = read_rows(out)
    assert [row["name"] for row in rows] == ["process", "memory", "products", "disk"]
    assert rows[:1] == before
    assert all(row["evidence"] == "measured" and "failed" not in row for row in rows)
    page = (out / "report.md").read_text()
    assert "| row | what | measured |" in page
    assert "| products | fp32 per second | " in page
    planned = call("plan", "--tower", "vit-demo", "--size", "48", "--frames", "8", "--hardware", "cpu")
    assert f"measured on this CPU on {time.strftime('%Y-%m')}" in planned.stdout, planned.stderr


def test_the_half_that_needs_no_gpu_is_answered_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For rows of an H100 that was rented, by the same PyTorch."""
    try:
        build_library()
    except ConfigError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("BIGVIVIT_CACHE", str(cache_folder()))
    words = ("calibrate", "--device", "none", "--only", "facts", "--out", tmp_path)
    refused = call(*words)
    assert (refused.returncode, "holds no rows of an earlier run" in refused.stderr) == (2, True)
    card = find_accelerator("H100")
    identity = {
        "device": "cuda", "card": "NVIDIA H100 80GB HBM3", "evidence": "measured", "torch": "1.0", "cuda": "13.0",
        "driver": "580", "capability": 90, "memory_bytes": card.memory_bytes, "cores": 16,
    }  # fmt: skip
    journal = tmp_path / "rows.jsonl"
    journal.write_text(json.dumps(identity) + "\n")
    refused = call(*words)
    assert (refused.returncode, "was measured with torch 1.0" in refused.stderr) == (2, True)
    for text in ('{"device": "cuda"}', "[]", "5"):
        journal.write_text(text + "\n")
        refused = call(*words)
        assert (refused.returncode, "rows.jsonl" in refused.stderr, "Traceback" in refused.stderr) == (2, True, False)
    journal.write_text(json.dumps({**identity, "torch": torch.__version__}) + "\n")
    listed = call(*words, "--list")
    keys = [line.split("  ")[-1] for line in listed.stdout.splitlines()[:-1]]
    assert keys == ["facts: workspaces", "facts: attention"]  # the context is the device's alone
    done = call(*words)
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in read_rows(tmp_path)}
    assert {(row["side"], row["evidence"]) for row in rows.values()} == {("virtual", "virtual")}
    assert set(rows) == {"workspaces", "attention"}
    assert rows["attention"]["vit-g_bf16_trains"] == "cudnn"  # as on a real one
    assert "bigvivit plan takes nothing of this" in done.stdout


def test_a_card_whose_processes_nvml_does_not_know_is_taken_without_its_context(tmp_path: Path) -> None:
    """As in most containers: the rest was measured all the same."""
    identity = {
        "device": "cuda", "card": "NVIDIA L4", "evidence": "measured", "torch": "2.14.1", "cuda": "13.0",
        "driver": "580", "capability": 89, "memory_bytes": 22 << 30, "cores": 8,
    }  # fmt: skip
    journal = Journal(tmp_path / "rows.jsonl", identity)
    assert not is_usable(distil(journal))
    row = {"group": "facts", "side": "device", "evidence": "measured"}
    journal.add({**row, "key": "facts: context", "context_bytes": 300 * MiB})
    journal.add({**row, "key": "facts: workspaces", "product_fp32_kept_bytes": 9 * MiB, "outside_bytes": None})
    found = distil(journal)
    assert (found.context_bytes, found.workspace_bytes, is_usable(found)) == (None, 9 * MiB, True)
    assert "but for the context" in say_use(found, tmp_path)
    card = find_accelerator("L4")
    assert context(apply(card, found)) == context(card)


def test_on_a_virtual_gpu_nothing_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of row is walked, and what it says is PyTorch's and the table's."""
    try:
        build_library()
    except ConfigError as error:
        pytest.skip(str(error))
    out = tmp_path / "out"
    keys = ["facts", "frames, layer-major", "frames, sgd", "rates: disk", "tower alone, vit-demo, 64 frames, cpu"]
    with virtual_gpu("T4") as gpu:
        words = ["--towers", "vit-demo", "--seconds", "300", "--out", str(out)]
        gpu.call(jobs.walk, words, [*keys, "capacity: vit-demo, stage 1, adamw"])
    rows = {(row["key"], row["side"]): row for row in read_rows(out)}
    assert {row["evidence"] for row in rows.values()} == {"virtual", "forecast"}
    assert not [row for row in rows.values() if "failed" in row]
    assert {str(row["group"]) for row in rows.values()} == {"facts", "memory", "rates", "times", "capacity"}
    card = find_accelerator("T4")
    assert rows["facts: context", "device"]["context_bytes"] == context(card).expected_bytes
    works = rows["facts: workspaces", "device"]
    assert works["product_fp32_kept_bytes"] == works["backward_fp32_kept_bytes"] == CUBLAS_WORKSPACE
    assert rows["facts: attention", "device"]["vit-g_fp16_trains"] == "memory_efficient"  # it has no flash
    for (_, side), row in rows.items():
        if row["group"] == "memory" and side == "device":
            assert row["replay"] == "exact"
            forecast = rows[str(row["key"]), "forecast"]
            assert forecast["allocated_bytes"] == pytest.approx(row["allocated_bytes"], rel=0.01)
            assert abs(int(str(forecast["reserved_bytes"])) - int(str(row["reserved_bytes"]))) <= 4 * MiB
    page = (out / "report.md").read_text()
    assert "Tesla T4: forecasts against it, virtual" in page
    assert "measured" not in page
    planned = call(
        "plan", "--tower", "vit-b", "--frames", "8", "--hardware", "T4", "--calibration", out / "calibration.json"
    )
    assert planned.returncode == 2
    assert "is of a virtual Tesla T4, on which nothing is measured" in planned.stderr


def test_what_cannot_be_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for words, said in (
        (("--towers", "vit-x"), "vit-x"),
        (("--seconds", "0"), "seconds=0 must be above 0"),
        (("--out", tmp_path / "file"), "is a file: give a folder"),
        (("--device", "cuda"), "device=cuda, but PyTorch finds no CUDA device"),
    ):
        done = call("calibrate", *words)
        assert done.returncode == 2, words
        assert said in done.stderr
        assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("*/rows.jsonl"))


def test_the_list_is_what_would_be_measured(tmp_path: Path) -> None:
    done = call("calibrate", "--device", "cpu", "--only", "rates", "--list", "--out", tmp_path / "out")
    assert [line.split("  ")[-1] for line in done.stdout.splitlines()[:-1]] == [
        "rates: memory", "rates: products", "rates: disk",
    ]  # fmt: skip
    assert not (tmp_path / "out").exists()
