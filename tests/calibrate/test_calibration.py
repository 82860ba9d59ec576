"""What was measured takes the place of tables' constants for its own card, and for no other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bigvivit.calibrate import calibration
from bigvivit.calibrate.calibration import Calibration, choose, file_name, find, find_cpu, keep, read, write
from bigvivit.config import ConfigError
from bigvivit.forecast.card import judge_on_host
from bigvivit.forecast.hardware import find_accelerator
from bigvivit.forecast.overhead import capacity, forecast_overhead
from bigvivit.forecast.sharding import TowerSize, explain_sharding
from bigvivit.forecast.trace import Trace
from bigvivit.forecast.tracker import Allocation, Event
from bigvivit.units import GiB, MiB
from tests.launching import call

L4 = Calibration(
    card="NVIDIA L4", device="cuda", evidence="measured", date="2026-11-26T10:00:00+00:00", torch="2.14.1", cuda="13.0",
    driver="580.65", capability=89, memory_bytes=22 * GiB, context_bytes=(300 * MiB, 350 * MiB, 380 * MiB),
    workspace_bytes=9 * MiB, scratch_bytes=5 * MiB, rates={"bf16": 80e12}, bandwidth=250e9, host_bandwidth=20e9,
    disk_bandwidth=2e9,
)  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(calibration, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(calibration, "read_nvml", lambda: {"driver": None, "gpus": []})
    return tmp_path / "cache" / "calibrations"


def test_it_takes_the_place_of_the_tables_constants() -> None:
    table = find_accelerator("L4")
    assert choose(table, "auto") is table
    keep(L4)
    card = choose(table, "auto")
    assert card.memory_bytes == 22 * GiB
    overhead = forecast_overhead(card)
    assert overhead.outside() == (300 * MiB, 350 * MiB, 380 * MiB)
    assert overhead.workspaces() == (9 * MiB, 9 * MiB, 14 * MiB)
    assert capacity(card, overhead) == tuple(22 * GiB - size * MiB for size in (380, 350, 300))
    assert "measured on this card on 2026-11-26 (driver 580.65, torch 2.14.1)" in overhead.explain()[0]
    assert choose(table, "none") is table


def test_rates_are_those_that_were_reached() -> None:
    tower = TowerSize(stored_bytes=2 * 10**9, largest_layer_bytes=10**8, operations=10**12)
    keep(L4)
    lines = {
        option: "\n".join(
            explain_sharding(
                tower, choose(find_accelerator("L4"), option), ranks=8, tubelets=64, groups=1, frames=2, compute="bf16"
            )
        )
        for option in ("none", "auto")
    }
    assert "64 tubelets in 0.8 s: bf16 at 100% of 80 TFLOP/s" in lines["auto"]
    assert "at 40% of" in lines["none"]
    assert "fetches for 0.1 s a step" in lines["auto"]


def test_another_cards_is_not_taken(cache: Path) -> None:
    keep(L4)
    table = find_accelerator("A100 80GB")
    assert choose(table, "auto") is table
    path = cache / file_name("NVIDIA L4", "580.65")
    with pytest.raises(ConfigError, match="was measured on NVIDIA L4, which is not A100 80GB: leave it out"):
        choose(table, str(path))


def test_the_newest_is_taken_and_of_the_card_that_is_here_the_drivers(monkeypatch: pytest.MonkeyPatch) -> None:
    newer = replace(L4, driver="590.1", date="2026-12-01T10:00:00+00:00", workspace_bytes=10 * MiB)
    for each in (newer, L4):
        keep(each)
    card = find_accelerator("L4")
    assert find(card) == newer
    here = {"driver": "580.65", "gpus": [{"name": "NVIDIA L4"}]}
    monkeypatch.setattr(calibration, "read_nvml", lambda: here)
    assert find(card) == L4
    monkeypatch.setattr(calibration, "read_nvml", lambda: {**here, "driver": "600.1"})
    assert find(card) is None
    monkeypatch.setattr(calibration, "read_nvml", lambda: {"driver": "600.1", "gpus": [{"name": "Tesla T4"}]})
    assert find(card) == newer


def test_what_a_virtual_card_said_is_refused(tmp_path: Path, cache: Path) -> None:
    virtual = replace(L4, evidence="virtual")
    with pytest.raises(ConfigError, match="on which nothing is measured"):
        keep(virtual)
    path = write(virtual, tmp_path / "calibration.json")
    with pytest.raises(ConfigError, match=rf"calibration: {path} is of a virtual NVIDIA L4, on which nothing is"):
        choose(find_accelerator("L4"), str(path))
    write(virtual, cache / "by-hand.json")
    assert find(find_accelerator("L4")) is None


def test_a_file_that_is_none(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep(L4)
    (cache / "broken.json").write_text('{"card": "NVIDIA L4"}')
    assert find(find_accelerator("L4")) == L4
    assert "passed over: calibration=" in capsys.readouterr().err
    for text in ("{", "[]", '{"card": 3}'):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ConfigError, match=r"other\.json is no file of bigvivit calibrate"):
            read(tmp_path / "other.json")
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read(tmp_path / "none.json")


def test_plan_takes_it_and_says_so() -> None:
    if torch.version.cuda is None:
        pytest.skip("PyTorch without CUDA")
    words = ("plan", "--tower", "vit-demo", "--size", "48", "--frames", "8", "--hardware", "L4")
    path = keep(L4)
    done = call(*words)
    assert "350 MiB, measured on this card on 2026-11-26 (driver 580.65, torch 2.14.1)" in done.stdout, done.stderr
    own = json.loads(call(*words, "--json", "--calibration", path).stdout)
    assert own["capacity_bytes"] == {
        name: 22 * GiB - size * MiB for name, size in (("worst", 380), ("expected", 350), ("best", 300))
    }
    assert (own["evidence"], own["calibration"]["workspace_bytes"]) == ("virtual", 9 * MiB)
    refused = call(*words, "--calibration", write(replace(L4, evidence="virtual"), path))
    assert (refused.returncode, "Traceback" in refused.stderr) == (2, False)
    assert "is of a virtual NVIDIA L4" in refused.stderr


CPU = replace(
    L4, card="Some CPU", device="cpu", driver=None, cuda=None, capability=None, memory_bytes=8 * GiB,
    context_bytes=(900 * MiB, 950 * MiB, 950 * MiB), workspace_bytes=None, scratch_bytes=None,
)  # fmt: skip


def test_a_cpu_has_what_a_process_leaves(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run bigvivit calibrate --device cpu once"):
        find_cpu("auto")
    path = write(CPU, tmp_path / "cpu.json")
    processor = find_cpu(str(path))
    with pytest.raises(ConfigError, match="is of NVIDIA L4, which is no CPU"):
        find_cpu(str(write(L4, tmp_path / "gpu.json")))
    place = 8 * GiB - 950 * MiB
    for size, fits in ((place, (True, True, True)), (place + 1, (False, False, True))):
        one = Allocation(0, size, "cpu", 1, "forward", "activations", "", "", (size,), torch.uint8)
        verdict = judge_on_host(Trace([Event(one, size, 1, "forward")]), processor)
        assert verdict.fits == fits
    words = ("plan", "--tower", "vit-demo", "--size", "48", "--frames", "8", "--hardware", "cpu", "--calibration", path)
    done = call(*words)
    assert "fits (forecast)" in done.stdout, done.stderr
    assert "beside tensors        950 MiB, measured on this CPU on 2026-11-26 (torch 2.14.1)" in done.stdout
