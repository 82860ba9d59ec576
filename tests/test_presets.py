"""Presets: what they add, and to what."""

from __future__ import annotations

import pytest

from bigvivit.presets import PRESETS, parse_train, spell_out

NEEDED = ["--out", "run", "--data.train", "train.csv", "--clip.frames", "8"]


@pytest.mark.parametrize(("preset", "stage"), PRESETS)
def test_every_preset_is_a_configuration(preset: str, stage: str) -> None:
    config = parse_train(["--preset", preset, "--stage", stage, "--model.tower", "vit-b", *NEEDED], "train")
    assert (config.preset, config.optim.name, config.optim.lr) == (preset, "adamw", 1e-3)
    assert config.model.temporal_depth == 2


def test_what_is_given_comes_first() -> None:
    words = [
        "--preset=small",
        "--stage=2",
        "--model.tower",
        "vit-b",
        "--optim.lr",
        "0.5",
        "--optim.weight_decay=0",
        *NEEDED,
    ]
    config = parse_train(words, "train")
    assert (config.optim.lr, config.optim.weight_decay, config.optim.batch_size) == (0.5, 0.0, 32)


@pytest.mark.parametrize("stage", ["1", "2"])
def test_the_warm_up_goes_with_the_length_that_is_given(stage: str) -> None:
    words = ["--preset", "small", "--stage", stage, "--model.tower", "vit-b", *NEEDED]
    for length in (["--optim.epochs", "3"], ["--optim.epochs=3"]):
        optim = parse_train([*words, *length], "train").optim
        assert (optim.epochs, optim.warmup_epochs) == (3, 0.3)
    optim = parse_train([*words, "--optim.steps", "120"], "train").optim
    assert (optim.count_steps(10), optim.count_warmup(10)) == (120, 10)
    assert parse_train([*words, "--optim.epochs", "3", "--optim.warmup-epochs", "1"], "train").optim.warmup_epochs == 1


def test_a_stage_2_takes_its_depth_from_the_stage_1_it_starts_from() -> None:
    words = ["--preset", "small", "--stage", "2"]
    assert "--model.temporal-depth" in spell_out(words)
    assert "--model.temporal-depth" not in spell_out([*words, "--init-from", "runs/stage1"])


def test_without_a_preset_nothing_is_added(capsys: pytest.CaptureFixture[str]) -> None:
    assert spell_out(["--stage", "2", *NEEDED]) == []
    parse_train(["--stage", "1", "--model.tower", "vit-b", *NEEDED], "train")
    assert capsys.readouterr().err == ""
    with pytest.raises(SystemExit):
        parse_train(["--preset", "large", "--stage", "1", "--model.tower", "vit-b", *NEEDED], "train")
