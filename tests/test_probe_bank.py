"""Many heads on one pass of the tower: each is what a run of its own would have come to, and the best is the run's."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.launching import LOSS_TOLERANCE, STAGE2, ZERO3, Runs, call, train
from tests.test_resume import kill_after

SAME = ["--optim.clip-norm", 0.3, "--optim.name", "adamw", "--save-every", 4, "--optim.epochs", 3]
PART_RATES = ["--optim.adapter-lr", 0.1, "--optim.temporal-lr", 0.1, "--optim.head-lr", 0.1]
LRS, DECAYS = (0.0005, 0.004), (0.0, 0.3)


def settings(runs: Runs, demo: Path, *more: object) -> list[object]:
    data = ["--data.train", demo / "train.csv", "--data.val", demo / "val.csv", "--init-from", runs["plain1"]]
    return [*STAGE2, *SAME, *data, *more]


def run(out: Path, *arguments: object) -> str:
    done = call("train", "--out", out, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def read_head(out: Path, number: int | None = None) -> list[tuple[float, ...]]:
    """(step, losses and top-1) of a run, or of one head of a bank."""
    prefix = "" if number is None else f"heads.{number}."
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    names = [f"{prefix}{name}" for name in ("loss", "val_loss", "val_top1")]
    return [(record["step"], *(record[name] for name in names if name in record)) for record in records]


@pytest.mark.parametrize("words", [(), ("--model.droplayer", 0.4), ("--optim.ema", 0.8, "--optim.head-lr", 0.002)])
def test_each_head_is_a_run_of_its_own(words: tuple[object, ...], runs: Runs, demo: Path, tmp_path: Path) -> None:
    """To the bit: rate, decay, state, gradient norm, stochastic depth and moving average are each head's own."""
    common = settings(runs, demo, *words)
    printed = run(tmp_path / "bank", *common, "--probe.lr", *LRS, "--probe.weight-decay", *DECAYS)
    assert "probe bank, by validation" in printed
    heads = json.loads((tmp_path / "bank" / "summary.json").read_text())["heads"]
    seen = set()
    for head in heads:
        out = tmp_path / f"run{head['head']}"
        run(out, *common, "--optim.lr", head["lr"], "--optim.weight-decay", head["weight_decay"])
        own = read_head(out)
        assert read_head(tmp_path / "bank", head["head"]) == own
        assert len(own) == 1 + 12 + 3
        assert (head["loss"], head["val_loss"]) == (own[-2][1], own[-1][1])
        seen.add(tuple(own))
        if head["best"]:
            ours, theirs = (load_file(tmp_path / name / "trainables.safetensors") for name in ("bank", out.name))
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [(head["lr"], head["weight_decay"]) for head in heads] == [(lr, decay) for lr in LRS for decay in DECAYS]
    assert len(seen) == 4  # so that equality means something
    scores = [(head["val_top1"], -head["val_loss"]) for head in heads]
    assert [head["best"] for head in heads] == [score == max(scores) for score in scores]


def test_depths(runs: Runs, demo: Path, tmp_path: Path) -> None:
    """Each from stage 1's weights as far as they go; the run's header says the best one's depth."""
    common = settings(runs, demo, "--optim.lr", 0.001)
    run(tmp_path / "bank", *common, "--probe.depth", 1, 2, 3)
    for number, depth in enumerate((1, 2, 3)):
        run(tmp_path / f"{depth}", *common, "--probe.depth", depth)
        assert read_head(tmp_path / "bank", number) == read_head(tmp_path / f"{depth}")
    run(tmp_path / "plain", *common)
    assert read_head(tmp_path / "plain") == read_head(tmp_path / "2")  # stage 1's depth
    (best,) = (head for head in json.loads((tmp_path / "bank" / "summary.json").read_text())["heads"] if head["best"])
    header = json.loads((tmp_path / "bank" / "checkpoint.json").read_text())
    assert header["model"]["temporal_depth"] == best["depth"]
    assert header["stage"] == 2


def test_the_best_head_is_an_ordinary_run(runs: Runs, demo: Path, tmp_path: Path) -> None:
    """For eval, predict and report; so is each checkpoint on the way."""
    out = tmp_path / "bank"
    printed = run(out, *settings(runs, demo, "--probe.lr", *LRS, "--probe.depth", 1, 3))
    assert "probe bank, by validation" in printed
    heads = json.loads((out / "summary.json").read_text())["heads"]
    (best,) = (head for head in heads if head["best"])
    video = next((demo / "clips").rglob("*.mp4"))
    evaluate = ["--manifest", demo / "val.csv", "--views", 1, "--crops", 1, "--workers", 0]
    assert call("eval", out, *evaluate).returncode == 0
    assert json.loads((out / "eval.json").read_text())["top1"] == best["val_top1"]
    assert call("predict", out, video, "--workers", 0).returncode == 0
    assert call("report", out).returncode == 0
    page = (out / "report.md").read_text()
    assert "## Heads" in page
    assert f"| {best['head']} | {best['lr']} | 0 | {best['depth']} |" in page
    assert not (out / "bank.safetensors").exists()
    kept = list((out / "checkpoints").glob("step-*"))
    for checkpoint in kept:
        assert call("eval", checkpoint, *evaluate).returncode == 0


def test_a_killed_bank_goes_on(runs: Runs, demo: Path, tmp_path: Path) -> None:
    words = settings(runs, demo, "--probe.lr", *LRS, "--probe.depth", 1, 2, "--save-every", 2)
    words += ["--data.cache", tmp_path / "cache", "--optim.ema", 0.8]
    kill_after(4, "python", tmp_path / "killed", *words)
    # Processes of their own, as the killed one: sums of another number of threads differ in the last bit.
    assert "step 1/12" not in train("python", tmp_path / "killed", *words, "--resume")
    train("python", tmp_path / "whole", *words)
    for number in range(4):
        assert read_head(tmp_path / "killed", number) == read_head(tmp_path / "whole", number)
    ours, theirs = (load_file(tmp_path / name / "trainables.safetensors") for name in ("killed", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_other_heads_are_refused_when_it_goes_on(runs: Runs, demo: Path, tmp_path: Path) -> None:
    words = settings(runs, demo, "--save-every", 2)
    kill_after(2, "python", tmp_path / "bank", *words, "--probe.lr", *LRS)
    done = call("train", "--out", tmp_path / "bank", *words, "--probe.lr", 0.1, "--resume")
    assert done.returncode == 2
    assert "probe.lr=[0.1], but the run has [0.0005, 0.004]" in done.stderr


def test_a_head_that_diverges_ends_alone(runs: Runs, demo: Path, tmp_path: Path) -> None:
    common = settings(runs, demo, "--optim.name", "sgd", "--optim.warmup-epochs", 0)
    run(tmp_path / "bank", *common, "--probe.lr", 1e30, 0.02)
    lost, other = json.loads((tmp_path / "bank" / "summary.json").read_text())["heads"]
    assert (lost["loss"], lost["val_loss"], lost["best"]) == (None, None, False)
    assert math.isfinite(other["val_loss"])
    assert other["best"]
    run(tmp_path / "run", *common, "--optim.lr", 0.02)
    assert read_head(tmp_path / "bank", 1) == read_head(tmp_path / "run")
    done = call("train", "--out", tmp_path / "all", *common, "--probe.lr", 1e30, 1e31)
    assert done.returncode == 2
    assert "no finite number any more" in done.stderr


@pytest.mark.parametrize("words", [(), pytest.param(("--fsdp",), marks=pytest.mark.slow)])
def test_on_two_ranks(words: tuple[str, ...], runs: Runs, demo: Path, tmp_path: Path) -> None:
    common = settings(runs, demo, "--optim.name", "sgd", "--probe.lr", 0.005, 0.02, "--probe.depth", 1, 2)
    common += ["--data.cache", tmp_path / "cache", "--memory.recompute", 1]
    run(tmp_path / "plain", *common)
    train("torchrun", tmp_path / "two", *common, *words)
    for number in range(4):
        plain, two = (read_head(tmp_path / name, number) for name in ("plain", "two"))
        assert len(plain) == len(two) == 1 + 12 + 3
        for ours, theirs in zip(two, plain, strict=True):
            assert ours[:2] == pytest.approx(theirs[:2], abs=LOSS_TOLERANCE * (10 if len(theirs) == 3 else 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--probe.lr", 0.1, 0.1], "probe.lr=(0.1, 0.1) lists a value twice"),
        (["--probe.lr", 0], "probe.lr=(0.0,) must be numbers above 0"),
        (["--probe.depth", 0], "probe.depth=(0,) must be numbers from 1"),
        (["--probe.lr", 0.1, *PART_RATES], "those to try would change nothing"),
        (["--probe.lr", 0.1, *ZERO3], "DeepSpeed clips the gradients of all heads as one"),
        (["--probe.depth", 1, 2, "--model.droplayer", 0.1], "heads of several depths would draw other random numbers"),
    ],
)
def test_wrong_settings(arguments: list[object], message: str, runs: Runs, demo: Path, tmp_path: Path) -> None:
    done = call("train", "--out", tmp_path / "run", *settings(runs, demo), *arguments)
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "run").exists()


def test_a_bank_needs_validation_and_stage_2(demo: Path, runs: Runs, tmp_path: Path) -> None:
    data = ["--data.train", demo / "train.csv", "--probe.lr", 0.1]
    done = call("train", "--out", tmp_path / "run", *STAGE2, "--init-from", runs["plain1"], *data)
    assert "needs data.val: the best head by validation" in done.stderr
    words = ["--stage", 1, "--clip.frames", 8, "--model.tower", "vit-demo", "--data.val", demo / "val.csv"]
    assert "give --stage 2" in call("train", "--out", tmp_path / "run", *words, *data).stderr
