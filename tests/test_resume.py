"""A run that is killed goes on as if it had not been."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
import tyro
from safetensors.torch import load_file

from bigvivit.config import ConfigError, TrainConfig
from bigvivit.train import prepare
from bigvivit.training.progress import list_checkpoints
from tests.launching import LOSS_TOLERANCE, STAGE1, STAGE2, Runs, command, environment, read_losses, start, train

SAVING = ["--save-every", 2, "--keep", 2]


def kill_after(step: int, launcher: str, out: Path, *arguments: object) -> None:
    """Start a training and kill all of it with SIGKILL once the checkpoint of this step is there."""
    process = subprocess.Popen(
        command(launcher, "--out", out, *arguments),
        cwd=Path(__file__).parents[1],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not any(int(folder.name.removeprefix("step-")) >= step for folder in list_checkpoints(out)):
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:  # torchrun gives its ranks sessions of their own
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    psutil.wait_procs(family)


def kill_and_copy(runs: Runs, demo: Path, out: Path, stage: int, *more: object) -> list[object]:
    """A killed run of this stage in `out`; the arguments it was started with."""
    settings = STAGE1 if stage == 1 else [*STAGE2, "--init-from", runs["plain1"]]
    arguments = [*settings, "--data.train", demo / "train.csv", *SAVING, *more]
    kill_after(4, "python", out, *arguments)
    return arguments


DROP = ("--model.droplayer", 0.3)  # so that random states matter


@pytest.mark.parametrize(
    ("stage", "optimizer"),
    [
        pytest.param(1, "sgd", marks=pytest.mark.slow),
        (2, "adamw"),  # with averaged weights, which a checkpoint swaps with the weights themselves
        pytest.param(1, "adamw8bit", marks=pytest.mark.slow),
    ],
)
def test_the_plain_engine_goes_on_bit_for_bit(
    stage: int, optimizer: str, runs: Runs, demo: Path, tmp_path: Path
) -> None:
    more = ("--optim.ema", 0.9) if optimizer == "adamw" else ()
    arguments = kill_and_copy(runs, demo, tmp_path / "killed", stage, *DROP, "--optim.name", optimizer, *more)
    train("python", tmp_path / "whole", *arguments)
    printed = train("python", tmp_path / "killed", *arguments, "--resume")
    assert "going on from" in printed
    assert read_losses(tmp_path / "killed") == read_losses(tmp_path / "whole")
    ours, expected = (load_file(tmp_path / name / "trainables.safetensors") for name in ("killed", "whole"))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert not (tmp_path / "killed" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("optimizer", "launcher", "options"),
    [
        pytest.param("sgd", "torchrun", [], marks=pytest.mark.slow),
        pytest.param("adamw", "torchrun", ["--fsdp"], marks=pytest.mark.slow),
        pytest.param("averaged", "torchrun", ["--fsdp"], marks=pytest.mark.slow),
        pytest.param("adamw", "torchrun", ["--ds", "ds_configs/zero2.json"], marks=pytest.mark.slow),
        pytest.param("adamw", "deepspeed", ["--ds", "ds_configs/zero3.json"], marks=pytest.mark.slow),
        pytest.param("adamw", "deepspeed", ["--ds", "ds_configs/zero3_offload.json"], marks=pytest.mark.slow),
        pytest.param("sgd", "torchrun", ["--fsdp"], marks=pytest.mark.slow),
        pytest.param("sgd", "torchrun", ["--ds", "ds_configs/zero2.json"], marks=pytest.mark.slow),
        pytest.param("sgd", "deepspeed", ["--ds", "ds_configs/zero3.json"], marks=pytest.mark.slow),
    ],
)
def test_another_engine_goes_on_and_back(
    launcher: str, options: list, optimizer: str, runs: Runs, demo: Path, tmp_path: Path
) -> None:
    """Plain to two ranks of another engine, killed there too, and back to plain: the losses of one plain run."""
    more: list[object] = ["--optim.name", "sgd" if optimizer == "sgd" else "adamw"]
    more += ["--optim.lr", 0.02 if optimizer == "sgd" else 3e-4, "--optim.ema", 0.9 if optimizer == "averaged" else 0]
    arguments = kill_and_copy(runs, demo, tmp_path / "killed", 1, *more)
    there = list_checkpoints(tmp_path / "killed")[0]
    train("python", tmp_path / "whole", *arguments)
    kill_after(int(there.name[-2:]) + 2, launcher, tmp_path / "killed", *options, *arguments, "--resume")
    train("python", tmp_path / "killed", *arguments, "--resume")
    losses, expected = read_losses(tmp_path / "killed"), read_losses(tmp_path / "whole")
    assert losses == pytest.approx(expected, abs=LOSS_TOLERANCE)
    assert len(losses) == 8
    weights, others = (load_file(tmp_path / name / "trainables.safetensors") for name in ("killed", "whole"))
    for name, value in others.items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-3, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_offloaded_states_are_kept_like_others(stage: int, runs: Runs, demo: Path, tmp_path: Path) -> None:
    """ZeRO-Offload changes where the optimizer's states are, not what a checkpoint holds of them."""
    kept = {}
    for name, more in {"device": {}, "host": {"offload_optimizer": {"device": "cpu"}}}.items():
        ds = tmp_path / f"{name}.json"
        ds.write_text(json.dumps({"zero_optimization": {"stage": stage, **more}}))
        settings = [*STAGE2, "--init-from", runs["plain1"], "--data.train", demo / "train.csv", "--optim.name", "adamw"]
        out = tmp_path / name
        kill_after(4, "torchrun", out, *settings, "--ds", ds, "--save-every", 2, "--keep", 9, "--optim.lr", 3e-4)
        kept[name] = load_file(out / "checkpoints" / "step-00000004" / "optimizer.safetensors")
    assert kept["host"].keys() == kept["device"].keys()
    assert {key.rpartition(".")[2] for key in kept["host"]} == {"exp_avg", "exp_avg_sq", "step"}
    for key, value in kept["device"].items():
        torch.testing.assert_close(kept["host"][key], value, rtol=1e-5, atol=1e-8, msg=key)
    assert any(value.abs().max() > 0 for key, value in kept["host"].items() if key.endswith("exp_avg"))


@pytest.mark.slow
def test_eight_bit_states_go_on_where_they_lie(runs: Runs, demo: Path, tmp_path: Path) -> None:
    """Sharded, they fit the same number of ranks only; there the losses are those of fp32 states that never stopped."""
    out, zero3 = tmp_path / "killed", ("--ds", "ds_configs/zero3.json")
    arguments = [*STAGE1, "--data.train", demo / "train.csv", "--optim.name", "sgd8bit", *SAVING]
    kill_after(4, "torchrun", out, *arguments, *zero3)
    for options in ((), zero3):  # whole on one rank; under ZeRO-3, but on one
        done = start("python", "--out", out, *arguments, *options, "--resume")
        assert done.returncode == 2
        assert "the 8-bit states of optim.name=sgd8bit lie as stage 3 on 2 ranks left them" in done.stderr
    train("torchrun", out, *arguments, *zero3, "--resume")
    assert read_losses(out) == pytest.approx(read_losses(runs["plain1"]), abs=LOSS_TOLERANCE)


def test_what_cannot_be_gone_on_from_is_refused(runs: Runs, demo: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    arguments = kill_and_copy(runs, demo, out, 1)
    newest, before = list_checkpoints(out)

    def refusal(*more: object) -> str:
        words = [str(word) for word in ("--out", out, *arguments, *more)]
        with pytest.raises(ConfigError) as refused:
            prepare(tyro.cli(TrainConfig, args=words))
        return str(refused.value)

    assert f"holds a run that stopped at {newest.name}: add --resume" in refusal()
    assert "optim.lr=0.5, but the run has 0.02" in refusal("--resume", "--optim.lr", 0.5)

    other = tmp_path / "other.csv"
    clips = (demo / "train.csv").read_text().replace("clips/", f"{demo}/clips/").splitlines()
    other.write_text("\n".join(clips[:-1]) + "\n")
    assert "is not the manifest that" in refusal("--resume", "--data.train", other)

    way_out = f"delete {newest} to go on from {before.name}"
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    tower = [path for path in files if path.parent.name == "tower" and path.suffix == ".safetensors"]
    assert len(tower) > 2
    for file in set(files) - set(tower):
        blob = file.read_bytes()
        digit = next(
            place for place in reversed(range(len(blob))) if chr(blob[place]).isdigit() or file.suffix != ".json"
        )
        edited = bytearray(blob)
        edited[digit] ^= 1  # still JSON where it was
        for wrong in (blob[: len(blob) // 2], bytes(edited), b""):
            file.write_bytes(wrong)
            message = refusal("--resume")
            assert str(newest) in message, file
            assert file.name in message, file
            assert way_out in message, file
        file.unlink()
        assert way_out in refusal("--resume"), file
        file.write_bytes(blob)
    # The tower is checked where it is read, after torch is there.
    blob = tower[0].read_bytes()
    for wrong in (blob[: len(blob) // 2], blob[:-1] + bytes([blob[-1] ^ 1])):
        tower[0].write_bytes(wrong)
        done = start("python", "--out", out, *arguments, "--resume")
        assert done.returncode == 2
        assert str(newest) in done.stderr
        assert way_out in done.stderr
        assert "Traceback" not in done.stderr


def test_a_loss_that_is_no_number_stops_with_its_clips(demo: Path, tmp_path: Path) -> None:
    """Of both ranks: which one spoiled the gradient they share cannot be told while both losses are numbers."""
    done = start("torchrun", "--out", tmp_path / "run", *STAGE1, "--data.train", demo / "train.csv", "--optim.lr", 1e30)
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: step "))
    assert "no finite number any more" in line
    assert line.count(".mp4") == 8
    assert done.stderr.count("exitcode  : 2") == 2
    assert not (tmp_path / "run" / "checkpoint.json").exists()
