"""The levers of a trial, and the words that pull them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import tyro

from bigvivit.advice import PLAN, TRAIN, Room, ask_for_advice, build_levers, fit, suggest, words
from bigvivit.config import OptimConfig, TrainConfig
from bigvivit.forecast.advisor import Forecast
from bigvivit.memory.ds_json import micro_batch_size
from bigvivit.memory.plan import MemoryPlan
from bigvivit.plan import PlanConfig
from bigvivit.trial import Trial
from bigvivit.units import GiB, MiB, parse_bytes

SMALL: dict[str, Any] = {"tower": "vit-demo", "size": 48, "temporal_depth": 1, "classes": 3, "frames": 16, "clips": 4}
TRIALS = {
    "stage 1": Trial(stage=1, optimizer="adamw", **SMALL),
    "stage 2": Trial(stage=2, **SMALL),
    "paper": Trial(
        stage=2, plan=MemoryPlan(group="all", chunk="all", compute="bf16"), **{**SMALL, "size": 216, "frames": 128}
    ),
    "two ranks": Trial(stage=2, world=2, **SMALL),
}
TRAINING = ["--out", "run", "--data.train", "train.csv", "--model.tower", "vit-demo", "--optim.batch-size"]


def every_option(host: bool) -> list[tuple[Trial, Trial]]:
    return [
        (trial, option)
        for trial in TRIALS.values()
        for lever in build_levers(host=host)
        for option in lever.options(trial)
    ]


def test_words_ask_training_for_what_was_forecast() -> None:
    options = every_option(host=True)
    assert len(options) > 40
    for before, after in options:
        batch = before.clips * before.accumulate * before.world
        own = ["--stage", before.stage, *(["--init-from", "x"] if before.stage == 2 else []), *TRAINING, batch]
        own += ["--clip.frames", before.frames, "--optim.name", before.optimizer]
        own += ["--memory.group", before.plan.group, "--memory.chunk", before.plan.chunk]
        own += ["--memory.compute", before.plan.compute]
        told = tyro.cli(TrainConfig, args=[*map(str, own), *words(before, after, TRAIN).split()])
        assert told.memory == after.plan
        found = (told.clip.frames, told.optim.name, told.optim.accumulate, told.fsdp)
        assert found == (after.frames, after.optimizer, after.accumulate, after.fsdp)
        assert micro_batch_size(told.optim, before.world) == after.clips


def test_words_ask_plan_for_what_was_forecast() -> None:
    for before, after in every_option(host=True):
        own: list[object] = [
            "--tower",
            "vit-demo",
            "--hardware",
            "1GiB",
            "--stage",
            before.stage,
            "--frames",
            before.frames,
        ]
        own += ["--clips", before.clips, "--optimizer", before.optimizer, "--ranks", before.world]
        own += ["--memory.group", before.plan.group, "--memory.chunk", before.plan.chunk]
        own += ["--memory.compute", before.plan.compute]
        told = tyro.cli(PlanConfig, args=[*map(str, own), *words(before, after, PLAN).split()])
        assert (told.memory, told.frames, told.clips) == (after.plan, after.frames, after.clips)
        assert (told.optimizer, told.fsdp) == (after.optimizer, after.fsdp)


def test_nothing_is_moved_to_a_host_that_is_the_device() -> None:
    for _, option in every_option(host=False):
        assert option.plan.placement in ("device", "disk")
        assert not option.plan.offload_activations


def test_every_option_can_be_trained() -> None:
    """An option that is refused only where it is built would end all advice."""
    trials = (Trial(stage=2, fused=True, **SMALL), Trial(stage=1, fused=True, ema=0.9, **SMALL))
    options = [option for trial in trials for lever in build_levers(host=True) for option in lever.options(trial)]
    built = [OptimConfig(name=option.optimizer, fused=option.fused, ema=option.ema) for option in options]
    assert len(built) > 10
    assert {config.fused for config in built} == {True}


def sizes(composition: list[str]) -> dict[str, int]:
    """Bytes by cause, of the bars."""
    bars = [re.match(r"  (.*?) +([0-9.]+ [KMG]?i?B) +█", line) for line in composition]
    return {bar[1]: parse_bytes(bar[2]) for bar in bars if bar is not None}


@pytest.mark.parametrize(
    ("name", "lever", "saved"),
    [("stage 1", "recompute", "activations"), ("paper", "group", "workspace"), ("two ranks", "fsdp", "tower")],
)
def test_levers_take_off_what_they_are_for(name: str, lever: str, saved: str) -> None:
    trial = TRIALS[name]
    options = [option for entry in build_levers(host=False) for option in entry.options(trial)]
    option = next(option for option in options if lever in words(trial, option, TRAIN))
    before, after = (sizes(fit(setting, Room(GiB, cuda=False))[1]) for setting in (trial, option))
    assert after.get(saved, 0) < before[saved]


def test_the_lines_name_the_settings_in_their_order() -> None:
    trial = TRIALS["stage 1"]
    lines = list(suggest(trial, lambda t: Forecast(1024, t.plan.recompute == 1 or t.clips == 1), TRAIN, host=False))
    assert lines[1:4:2] == ["  1. --optim.accumulate 4", "  2. --memory.recompute 1"]
    assert lines[2] == "     1 KiB at the peak (forecast); the same numbers"
    (only,) = suggest(trial, lambda t: Forecast(1024, False), TRAIN, host=False)
    assert "nothing that can be set" in only


@pytest.mark.slow
def test_zero_is_asked_about_again_and_again() -> None:
    """DeepSpeed's engine on fake tensors leaves its process unusable for another."""
    ds = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 10**6},
    }
    lines = ask_for_advice(Trial(stage=1, world=2, ds=ds, **SMALL), Room(24 * MiB, cuda=False))
    assert "  1. --optim.accumulate 2" in lines or "  1. --optim.accumulate 4" in lines, lines


def test_it_says_so_where_nothing_can_be_forecast() -> None:
    (only,) = ask_for_advice(Trial(stage=1, **{**SMALL, "tower": "./none"}), Room(GiB, cuda=False))
    assert only.startswith("nothing can be forecast: ")
    assert "./none" in only
