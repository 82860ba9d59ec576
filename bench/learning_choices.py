"""What stage 2 was given by default, against what else it could be: `python -m bench.learning_choices --data FOLDER
--tower FOLDER`.

Stage 2 on the published tower as `bench/real_clips.py` trains it, with one thing changed: the temporal transformer's
input, the size of the positions it begins with, or which frames make a clip. Folds 1 to 4 only, so that the recordings
of fold 0 stay unseen by what was chosen. Runs are kept as they come, and an interrupted bench goes on.
"""

from __future__ import annotations

import csv
import statistics
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from bench.real_clips import ARMS, FOLDS, ONE_VIEW, Arguments, fill_cache, interval, words, write_folds
from bigvivit import cli, train
from bigvivit.model.temporal import POSITION_STD
from bigvivit.training.report import run_bench, write_report
from bigvivit.training.summary import read_metrics

ARM = ARMS[0]


@dataclass(frozen=True)
class Choice:
    """One thing that is otherwise than by default."""

    name: str
    words: tuple[str, ...] = ()
    """In addition to those of `bench/real_clips.py`."""
    position_size: float = POSITION_STD["centred"]


CHOICES = (
    Choice("as shipped"),
    Choice("with a grid of 4 x 4 patches", ("--model.patch-grid", "4")),
    Choice("the original's temporal input", ("--model.temporal-input", "original"), POSITION_STD["original"]),
    Choice("every second frame", ("--clip.stride", "2")),
    Choice("every fourth frame", ("--clip.stride", "4")),
    Choice("positions of size 1", position_size=1.0),
    Choice("positions of size 4", position_size=4.0),
)


@dataclass(frozen=True, kw_only=True)
class ChoiceArguments(Arguments):
    """Train and evaluate each choice on each fold, and write the report."""

    out: Path = Path("runs/learning_choices")
    """Folder of the runs."""


def main(arguments: ChoiceArguments) -> None:
    """Rows, report."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    serials = write_folds(arguments)
    serials = serials[~np.isin(serials, FOLDS[0])]
    fill_cache(arguments, ARM.frames)
    rows = []
    shipped: np.ndarray | None = None
    for choice in track(CHOICES, description="choices"):
        folds = range(1, len(FOLDS))
        right = np.array([pair for fold in folds for pair in train_and_evaluate(arguments, choice, fold)], float)
        ordered, shuffled = right.T
        shipped = ordered if shipped is None else shipped
        low, high = interval(ordered - shipped, serials)
        rows.append(
            {
                "choice": choice.name,
                "clips": len(right),
                "top1": ordered.mean(),
                "top1_shuffled": shuffled.mean(),
                "over_shipped": (ordered - shipped).mean(),
                "over_shipped_low": low,
                "over_shipped_high": high,
                "resolved": bool(low > 0 or high < 0),
                "order_change_at_step_0": statistics.median(read_order(arguments, choice, fold) for fold in folds),
                "evidence": "measured",
            }
        )
    settings = {"arm": ARM.label, "folds": FOLDS[1:], "seed": 0, "preset": "small", "changed": changes()}
    stem = write_report(arguments.results, "learning_choices", device=torch.device("cpu"), settings=settings, rows=rows)
    print(f"wrote {stem}.json and .md")


def docs_table(rows: list[dict[str, Any]]) -> str:
    """The rows of a report as docs/learning.md shows them; a test holds the page to it."""
    lines = ["| | top-1 | shuffled | over what is shipped |", "| --- " * 4 + "|"]
    for row in rows:
        over = f"{row['over_shipped']:+.1%} ({row['over_shipped_low']:+.1%} to {row['over_shipped_high']:+.1%})"
        over = "" if row is rows[0] else over if row["resolved"] else "not resolved"
        lines.append(f"| {row['choice']} | {row['top1']:.1%} | {row['top1_shuffled']:.1%} | {over} |")
    return "\n".join(lines)


def changes() -> dict[str, str]:
    """What each choice is, in words of the command line and of the code."""
    return {choice.name: " ".join([*choice.words, f"POSITION_STD {choice.position_size}"]) for choice in CHOICES}


def train_and_evaluate(arguments: Arguments, choice: Choice, fold: int) -> list[tuple[bool, bool]]:
    """(right in order, right shuffled) of each clip of a fold. In this process, whose constant is another."""
    run = folder_of(arguments, choice, fold)
    form = "original" if "original" in choice.words else "centred"
    before, POSITION_STD[form] = POSITION_STD[form], choice.position_size
    try:
        if not (run / "eval.csv").exists():
            with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                train.main([*words(arguments, ARM, fold, 0), *choice.words, "--out", str(run)])
                cli.evaluate([str(run), "--manifest", str(arguments.out / f"test{fold}.csv"), *ONE_VIEW])
    finally:
        POSITION_STD[form] = before
    with (run / "eval.csv").open() as file:
        return [(row["top1"] == row["label"], row["top1_shuffled"] == row["label"]) for row in csv.DictReader(file)]


def folder_of(arguments: Arguments, choice: Choice, fold: int) -> Path:
    """Of one run."""
    return arguments.out / f"{choice.name} fold{fold}".replace(" ", "_").replace("'", "")


def read_order(arguments: Arguments, choice: Choice, fold: int) -> float:
    """What a run measured before its first step."""
    return float(read_metrics(folder_of(arguments, choice, fold) / "metrics.jsonl")[0]["order_change"])


if __name__ == "__main__":
    run_bench(main, ChoiceArguments, __doc__)
