"""Settings that go together, by one name: `--preset small`. What a command line says itself comes first."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import tyro

from bigvivit.config import TrainConfig
from bigvivit.memory.ranks import rank_and_world

SMALL = {
    "--optim.name": "adamw",
    "--optim.lr": "1e-3",
    "--optim.weight-decay": "0.05",
    "--optim.batch-size": "32",
}
PRESETS: dict[tuple[str, str], dict[str, str]] = {
    ("small", "1"): {
        **SMALL,
        "--optim.tower-lr": "5e-5",
        "--optim.layer-decay": "0.75",
        "--optim.epochs": "15",
        "--optim.warmup-epochs": "1.5",
        "--model.temporal-depth": "2",
    },
    ("small", "2"): {**SMALL, "--optim.epochs": "60", "--optim.warmup-epochs": "6"},
}
"""By preset and stage. `small` is for some hundred clips: chosen by cross-validation on 130 clips of ten gestures
(docs/learning.md), with the usual rates of fine-tuning for a tower that stage 1 trains."""
STARTS_ANEW = {"--model.temporal-depth": "2"}
"""Of stage 2 without a stage 1, which would say so itself."""


def parse_train(argv: Sequence[str], prog: str) -> TrainConfig:
    """The configuration that a command line of training describes, presets spelt out."""
    added = spell_out(argv)
    if added and rank_and_world()[0] == 0:
        print(f"--preset: {' '.join(added)}", file=sys.stderr)
    return tyro.cli(TrainConfig, args=[*argv, *added], prog=prog)


def spell_out(argv: Sequence[str]) -> list[str]:
    """The settings that the preset of a command line adds to it, its warm-up as a tenth of the epochs that the line may
    give; none for a name that is not known, which tyro refuses."""
    given = {word.partition("=")[0].replace("_", "-"): word.partition("=")[2] for word in argv if word.startswith("--")}
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        if word in ("--preset", "--stage", "--optim.epochs"):
            given[word] = following
    preset = dict(PRESETS.get((given.get("--preset", ""), given.get("--stage", "")), {}))
    if preset and given["--stage"] == "2" and "--init-from" not in given:
        preset |= STARTS_ANEW
    if preset and "--optim.steps" in given:  # which has a warm-up of its own
        del preset["--optim.epochs"], preset["--optim.warmup-epochs"]
    elif preset and (epochs := as_number(given.get("--optim.epochs", ""))) is not None:
        preset["--optim.warmup-epochs"] = f"{epochs / 10:.3g}"
    return [word for flag, value in preset.items() if flag not in given for word in (flag, value)]


def as_number(text: str) -> float | None:
    """None for what is none, which tyro refuses."""
    try:
        return float(text)
    except ValueError:
        return None
