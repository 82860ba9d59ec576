"""`bigvivit plan`, as its users call it."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch

from bigvivit.forecast.snapshot import read_trace
from bigvivit.plan import PlanConfig, find_hardware, to_json
from bigvivit.trial_virtual import VirtualStep, VirtualVerdict
from bigvivit.units import GiB, MiB
from tests.launching import call


def plan(*words: str) -> subprocess.CompletedProcess[str]:
    return call("plan", *words)


def test_it_says_whether_it_fits_and_why(tmp_path: Path) -> None:
    page, snapshot = tmp_path / "line.html", tmp_path / "snapshot.pickle"
    words = ["--tower", "vit-h", "--frames", "32", "--hardware", "RTX 3090", "--explain"]
    done = plan(*words, "--timeline", str(page), "--snapshot", str(snapshot))
    assert done.returncode == 0, done.stderr
    assert "fits (virtual)" in done.stdout or "fits (forecast)" in done.stdout
    for word in ("tower", "gradients", "optimizer state", "largest tensors", "loaded kernels", "break-even"):
        assert word in done.stdout
    assert "<svg" in page.read_text()
    assert "http" not in page.read_text()
    live = peak = 0
    for event in read_trace(snapshot).events:
        live += {"a": 1, "f": -1}.get(event.kind, 0) * event.size
        peak = max(peak, live)
    assert peak == json.loads(plan(*words, "--json").stdout)["trace"]["peak_bytes"]


@pytest.mark.slow  # a trace of every lever
def test_what_does_not_fit_says_what_would() -> None:
    words = ["--tower", "vit-demo", "--stage", "1", "--size", "216", "--frames", "64", "--clips", "8"]
    words += ["--temporal-depth", "2", "--classes", "8", "--hardware", "2GiB"]
    done = plan(*words)
    assert "does not fit (forecast)" in done.stdout, done.stderr
    first = re.search(r"^ {2}1\. (.*)$", done.stdout, re.MULTILINE)
    assert first is not None, done.stdout
    given = first[1].split()
    kept = [
        word for flag, value in zip(words[::2], words[1::2], strict=True) if flag not in given for word in (flag, value)
    ]
    assert ": fits (forecast)" in plan(*kept, *given).stdout, given


def test_corrections_are_named_sized_and_left_out() -> None:
    words = [
        "--tower",
        "vit-demo",
        "--size",
        "48",
        "--frames",
        "8",
        "--stage",
        "1",
        "--hardware",
        "A100 80GB",
        "--explain",
    ]
    words += ["--optimizer", "adamw8bit"]
    made, left = (plan(*words, *more).stdout for more in ([], ["--without", "attention", "workspaces"]))
    for name in ("attention", "in-place", "workspaces"):
        assert re.search(rf"^  {name}: -?\d+", made, re.MULTILINE), made
    assert re.findall(r"^  (\S+): left out", left, re.MULTILINE) == ["attention", "workspaces"]


def test_what_does_not_fit_says_what_it_could_not_get() -> None:
    done = plan("--tower", "vit-g", "--frames", "8", "--stage", "1", "--hardware", "2080 Ti", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["fits"] == {"worst": False, "expected": False, "best": False}
    assert "out of memory" in found["out_of_memory"] or found["evidence"] == "forecast"
    words = ["--tower", "vit-g", "--frames", "8", "--stage", "1", "--hardware", "11GiB", "--json"]  # no card
    traced = json.loads(plan(*words).stdout)
    assert traced["evidence"] == "forecast"
    assert "not a card of the table" in traced["not_virtual"]
    assert sum(traced["trace"]["composition_bytes"].values()) == traced["peak_bytes"] > traced["capacity_bytes"]["best"]


def test_what_a_virtual_gpu_does_not_answer_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the reason in the same line, and not as a traceback."""
    from bigvivit import trial_virtual
    from bigvivit.forecast.virtual_gpu import VirtualGpuError

    def end(*_: object) -> None:
        raise VirtualGpuError("the child process on virtual GPUs ended (SIGABRT):\nno answer to cusolverDnCreate")

    monkeypatch.setattr(trial_virtual, "run_on_virtual_gpu", end)
    done = plan("--tower", "vit-demo", "--size", "48", "--frames", "8", "--hardware", "RTX 3090")
    assert (done.returncode, "fits (forecast)" in done.stdout) == (0, True), done.stderr
    assert "not run on a virtual GPU: the child process on virtual GPUs ended (SIGABRT): no answer to" in done.stdout


def test_a_card_of_the_table_runs_on_a_virtual_gpu() -> None:
    """PyTorch's own numbers, which a trace comes near."""
    if torch.version.cuda is None:
        pytest.skip("PyTorch without CUDA")
    words = ["--tower", "vit-b", "--stage", "1", "--frames", "8", "--hardware", "RTX 3090"]
    found = json.loads(plan(*words, "--json", "--explain").stdout)
    assert found["evidence"] == "virtual"
    assert found["fits"] == {"worst": True, "expected": True, "best": True}
    assert found["reserved_bytes"] % (2 * MiB) == 0
    assert found["peak_bytes"] == pytest.approx(found["trace"]["peak_bytes"], rel=0.1)


def test_one_of_several_ranks_runs_on_a_virtual_gpu() -> None:
    """A rank of eight keeps an eighth of weights, gradients and momentum under FSDP2, whose code is the real one."""
    if torch.version.cuda is None:
        pytest.skip("PyTorch without CUDA")
    words = ["--tower", "vit-b", "--stage", "1", "--frames", "8", "--hardware", "RTX 3090", "--json"]
    found = json.loads(plan(*words, "--ranks", "8", "--fsdp", "--explain").stdout)
    assert found["evidence"] == "virtual"
    assert found["peak_bytes"] == pytest.approx(found["trace"]["peak_bytes"], rel=0.1)
    assert found["capacity_bytes"]["expected"] < 24 * GiB - 400 * MiB - 128 * MiB  # context and NCCL


def test_ddp_on_a_virtual_gpu_is_the_same_each_time() -> None:
    """Its first buckets are gone in the second step, as on a GPU, whose steps take longer."""
    if torch.version.cuda is None:
        pytest.skip("PyTorch without CUDA")
    words = ["--tower", "vit-b", "--frames", "8", "--hardware", "RTX 3090", "--json", "--ranks", "8", "--explain"]
    peaks = [json.loads(plan(*words).stdout) for _ in range(2)]
    assert peaks[0]["peak_bytes"] == peaks[1]["peak_bytes"]
    assert peaks[0]["peak_bytes"] == pytest.approx(peaks[0]["trace"]["peak_bytes"] + 17 * 10**6, rel=0.03)


def test_settings_are_for_programs_too() -> None:
    config = PlanConfig(tower="vit-b", frames=8, hardware="24GiB", ds=Path("zero3"))
    verdict = VirtualVerdict(VirtualStep(1, 2, 0, None), (True, True, True), (1, 2, 3))
    settings = to_json(config, find_hardware("24GiB"), None, verdict)["settings"]
    assert settings["memory"]["storage"] == "bf16"
    assert settings["probe"] == {"lr": [], "weight_decay": [], "depth": []}
    assert settings["ds"] == "zero3"


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["8", "64"])
def test_sharding_over_ranks_that_do_not_exist(ranks: str) -> None:
    words = ["--tower", "vit-l", "--frames", "32", "--hardware", "T4", "--ranks", ranks, "--json"]
    alone, zero = (
        json.loads(plan(*words, *more).stdout)["peak_bytes"] for more in ([], ["--ds", "ds_configs/zero3.json"])
    )
    assert zero < alone - 303 * 10**6  # half of the tower's bytes in bf16


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hardware", "GTX 9999"], "hardware='GTX 9999' is not in the table"),
        (["--hardware", "24GiB", "--frames", "7"], "frames"),
        (["--hardware", "24GiB", "--tower", "no/such-tower-here"], "no/such-tower-here"),
        (["--hardware", "24GiB", "--fsdp", "--ds", "ds_configs/zero3.json"], "two ways to shard"),
        (["--hardware", "24GiB", "--fsdp", "--optimizer", "sgd8bit"], "bitsandbytes cannot update FSDP2's"),
        (["--hardware", "100MiB"], "give more"),
        (["--hardware", "24GiB", "--stage", "1", "--memory.placement", "disk"], "memory.placement"),
        (["--hardware", "24GiB", "--ranks", "0"], "ranks=0 must be at least 1"),
    ],
)
def test_wrong_settings(words: list[str], message: str) -> None:
    done = plan("--tower", "vit-b", "--frames", "8", *words)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_heads_of_a_probe_bank_and_cached_vectors() -> None:
    """Each head's weights, gradients and state count; a cached step is without the tower's work."""

    def peak(*words: str) -> int:
        common = ["--tower", "vit-demo", "--size", "48", "--frames", "32", "--clips", "4", "--hardware", "24GiB"]
        done = plan(*common, "--json", *words)
        assert done.returncode == 0, done.stderr
        return int(json.loads(done.stdout)["peak_bytes"])

    one, three = peak("--probe.lr", "0.1"), peak("--probe.lr", "0.3", "0.1", "--probe.depth", "4")
    weights = 4 * 12 * 128 * 128 * 4  # of four layers, without biases and norms, in fp32
    assert three - one > 3 * weights  # with gradients and momentum
    paper = ["--clips", "32", "--memory.group", "all", "--memory.chunk", "all"]
    assert peak("--cached", *paper) < peak(*paper)
    assert "leave --probe out" in plan("--tower", "vit-demo", "--frames", "8", "--hardware", "24GiB", "--stage", "1",
                                       "--probe.lr", "0.1").stderr  # fmt: skip
