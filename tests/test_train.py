"""The main job from its command lines: both stages, on the plain engine and on ZeRO-3 with two gloo ranks."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TimmWrapperConfig

from bigvivit.model.weights import tower_checksum
from tests.launching import LOSS_TOLERANCE, STAGE1, STAGE2, Runs, call, read_losses, start, train
from tests.model.reference import TIMM_MODELS


@pytest.mark.parametrize("stage", [1, 2])
def test_zero3_on_two_ranks_gives_the_losses_of_one_plain_process(stage: int, runs: Runs) -> None:
    plain, zero = read_losses(runs[f"plain{stage}"]), read_losses(runs[f"zero{stage}"])
    assert len(plain) == len(zero) == 8
    assert max(plain) - min(plain) > 100 * LOSS_TOLERANCE  # so much that agreement means something
    assert zero == pytest.approx(plain, abs=LOSS_TOLERANCE)


@pytest.mark.parametrize("stage", [1, 2])
def test_and_the_same_weights(stage: int, runs: Runs) -> None:
    files = ["trainables.safetensors"] + [f"tower/layers.{i}.safetensors" for i in range(4) if stage == 1]
    for file in files:
        plain, zero = load_file(runs[f"plain{stage}"] / file), load_file(runs[f"zero{stage}"] / file)
        assert plain.keys() == zero.keys()
        for name in plain:
            torch.testing.assert_close(zero[name], plain[name], rtol=0, atol=1e-3, msg=name)


def test_stage_2_starts_from_stage_1_and_says_what_took_effect(runs: Runs) -> None:
    for name in ("plain2", "zero2"):
        printed = runs.printed[name]
        assert "froze tower: 906 k parameters, 1.73 MiB bf16, 0 B optimizer state" in printed
        skipped = re.findall(r"not transferred: (\S+) \((.*)\)", printed)
        assert [entry for entry, _ in skipped] == [
            f"adapter.fc{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")
        ]
    assert read_losses(runs["plain2"])[0] < read_losses(runs["plain1"])[0] + 0.1


def test_stage_2_on_a_tower_as_it_was_published(demo: Path, tmp_path: Path) -> None:
    """Without a stage 1: a residual adapter, as after one, and the tower's own weights."""
    tower = ["--model.tower", "vit-demo", "--model.tower-init", "random", "--model.temporal-depth", 2]
    done = call("train", *STAGE2, *tower, "--data.train", demo / "train.csv", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    header = json.loads((tmp_path / "run" / "checkpoint.json").read_text())
    assert (header["stage"], header["tower_folder"], header["model"]["temporal_depth"]) == (2, None, 2)
    assert header["clip_seconds"] > 0
    names = load_file(tmp_path / "run" / "trainables.safetensors").keys()
    assert {name.split(".")[0] for name in names} == {"adapter", "temporal", "head"}
    done = call("eval", tmp_path / "run", "--manifest", demo / "val.csv", "--views", 1, "--crops", 1, "--workers", 0)
    assert done.returncode == 0, done.stderr


def test_training_ends_when_validation_no_longer_improves(runs: Runs, demo: Path, tmp_path: Path) -> None:
    """At a rate of nearly nothing no validation is better than the first."""
    words = [*STAGE2, "--init-from", runs["plain1"], "--data.train", demo / "train.csv", "--data.val", demo / "val.csv"]
    words += ["--optim.lr", 1e-9, "--optim.patience", 2, "--save-every", 1, "--out", tmp_path / "run"]
    done = call("train", *words)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 3
    assert (tmp_path / "run" / "checkpoint.json").exists()


def test_a_checkpoint_names_its_tower_and_does_not_repeat_it(runs: Runs) -> None:
    first = json.loads((runs["plain1"] / "checkpoint.json").read_text())
    second = json.loads((runs["plain2"] / "checkpoint.json").read_text())
    assert (first["tower_folder"], second["tower_folder"]) == ("tower", "../plain1/tower")
    assert first["tower_checksum"] == second["tower_checksum"] == tower_checksum(runs["plain1"] / "tower")
    names = load_file(runs["plain2"] / "trainables.safetensors").keys()
    assert {name.split(".")[0] for name in names} == {"adapter", "temporal", "head"}


def test_what_a_run_was(runs: Runs) -> None:
    record = json.loads((runs["zero2"] / "run.json").read_text())
    assert record["engine"] == "zero3"
    assert record["ranks"] == 2
    assert record["config"]["model"]["tower"] == "vit-demo"  # resolved from stage 1
    assert "--init-from" in record["command"]
    assert record["versions"]["torch"] == torch.__version__.partition("+")[0]
    summary = json.loads((runs["zero2"] / "summary.json").read_text())
    tensors = load_file(runs["zero2"] / "trainables.safetensors")
    assert summary["trainable_parameters"] == sum(tensor.numel() for tensor in tensors.values())
    files = (runs["plain1"] / "tower").glob("*.safetensors")
    assert summary["frozen_parameters"] == sum(tensor.numel() for file in files for tensor in load_file(file).values())
    assert summary["steps"] == 8
    assert summary["peak_bytes"] > 100 * 2**20


def test_another_tower_than_the_one_trained_with_is_refused(runs: Runs, demo: Path, tmp_path: Path) -> None:
    file = runs["zero1"] / "tower" / "pool.safetensors"
    blob = bytearray(file.read_bytes())
    blob[-1] ^= 1
    file.write_bytes(blob)
    try:
        done = start(
            "python",
            "--out",
            tmp_path / "run",
            *STAGE2,
            "--data.train",
            demo / "train.csv",
            "--init-from",
            runs["zero1"],
        )
    finally:
        blob[-1] ^= 1
        file.write_bytes(blob)
    assert done.returncode == 2
    assert "is not the one this run was trained with" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--clip.frames", 7], "clip.frames=7 is not a multiple of model.tubelet=2; try 6 or 8"),
        (["--clip.size", 50], "clip.size=50 is not a multiple of the patch of tower vit-demo, 12 pixels; try 48 or 60"),
        (["--optim.batch-size", 1000], "optim.batch_size=1000 is more than the 32 clips"),
        (["--model.tower-init", "pretrained"], "model.tower=vit-demo is a size without published weights"),
        (["--device", "cuda"], "device=cuda, but PyTorch finds no CUDA device"),
        (["--ds", "none.json"], "ds=none.json cannot be read"),
    ],
)
def test_wrong_settings_end_in_one_message(arguments: list, message: str, demo: Path, tmp_path: Path) -> None:
    done = start("python", "--out", tmp_path / "run", *STAGE1, "--data.train", demo / "train.csv", *arguments)
    assert done.returncode == 2
    assert f"error: {message}" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "tubelet"),
    [("eva02_tiny_patch14_224", 2), pytest.param("vit_tiny_r_s16_p8_224", 1, marks=pytest.mark.slow)],
)
def test_both_stages_on_a_tower_from_timm(name: str, tubelet: int, demo: Path, tmp_path: Path) -> None:
    """Stage 2 opens what stage 1 trained and wrote; a hybrid takes single frames."""
    TimmWrapperConfig(architecture=name, model_args=TIMM_MODELS[name]).save_pretrained(tmp_path / "tower")
    size = TIMM_MODELS[name]["img_size"]
    own = ["--clip.size", size, "--clip.resize", size, "--optim.epochs", 1]
    first = ["--model.tower", tmp_path / "tower", "--model.tubelet", tubelet]
    data = ["--data.train", demo / "train.csv"]
    train("python", tmp_path / "1", *STAGE1, *own, *first, *data)
    printed = train("python", tmp_path / "2", *STAGE2, *own, *data, "--init-from", tmp_path / "1")
    assert "froze tower" in printed
    header = json.loads((tmp_path / "2" / "checkpoint.json").read_text())
    assert header["tower_checksum"] == tower_checksum(tmp_path / "1" / "tower")
    for stage in "12":
        losses = read_losses(tmp_path / stage)
        assert len(losses) == 4
        assert max(losses) - min(losses) > 10 * LOSS_TOLERANCE
        assert all(math.isfinite(loss) for loss in losses)


def test_a_finished_run_is_not_overwritten(runs: Runs, demo: Path) -> None:
    before = (runs["plain1"] / "checkpoint.json").read_bytes()
    done = start("python", "--out", runs["plain1"], *STAGE1, "--data.train", demo / "train.csv")
    assert done.returncode == 2
    assert "holds a finished run" in done.stderr
    assert (runs["plain1"] / "checkpoint.json").read_bytes() == before


def test_deepspeed_goes_on_without_a_compiler(runs: Runs, demo: Path, tmp_path: Path) -> None:
    """One line says so; also one process without a launcher under ZeRO, and ZeRO-2."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "python").symlink_to(sys.executable)
    printed = train(
        "python",
        tmp_path / "run",
        *("--ds", "ds_configs/zero2.json", *STAGE1, "--data.train", demo / "train.csv"),
        env={"PATH": str(tools)},
    )
    lines = [line for line in printed.splitlines() if "compiler" in line]
    assert lines == ["DeepSpeed's shared-memory op is not used (no C++ compiler): collectives go through gloo"], printed
    assert read_losses(tmp_path / "run") == pytest.approx(read_losses(runs["plain1"]), abs=LOSS_TOLERANCE)
