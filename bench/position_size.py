"""How large temporal positions should be at first, `python bench/position_size.py --data FOLDER --tower FOLDER`.

Stage 2 on the published tower as `bench/real_clips.py` trains it, with nothing changed but the size of the positions it
begins with, and the original's form. Folds 1 to 4, so that the recordings of fold 0 stay unseen by what was chosen.
"""

from __future__ import annotations

import csv
import statistics
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import torch
from rich.progress import track

from bench.real_clips import ARMS, FOLDS, ONE_VIEW, Arguments, fill_cache, words, write_folds
from bigvivit import cli, train
from bigvivit.model.temporal import POSITION_STD
from bigvivit.training.report import run_bench, write_report
from bigvivit.training.summary import read_metrics

SIZES = (1.0, 2.0, 4.0)
ARM = ARMS[0]


@dataclass(frozen=True, kw_only=True)
class SizeArguments(Arguments):
    """Train and evaluate each size on each fold, and write the report."""

    out: Path = Path("runs/position_size")
    """Folder of the runs."""


def main(arguments: SizeArguments) -> None:
    """Rows, report."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_folds(arguments)
    fill_cache(arguments, ARM.frames)
    shipped = POSITION_STD["centred"]
    forms = [("centred", size) for size in SIZES] + [("original", POSITION_STD["original"])]
    rows = []
    for form, size in track(forms, description="sizes"):
        POSITION_STD[form] = size
        right = [
            correct for fold in range(1, len(FOLDS)) for correct in train_and_evaluate(arguments, form, size, fold)
        ]
        ordered, shuffled = (sum(column) / len(right) for column in zip(*right, strict=True))
        row = {"temporal_input": form, "position_size": size, "shipped": (form, size) == ("centred", shipped)}
        row["order_change"] = statistics.median(
            read_order(arguments, form, size, fold) for fold in range(1, len(FOLDS))
        )
        rows.append({**row, "clips": len(right), "top1": ordered, "top1_shuffled": shuffled, "evidence": "measured"})
    settings = {"arm": f"{ARM.name}, {ARM.frames} frames", "folds": FOLDS[1:], "seed": 0}
    stem = write_report(arguments.results, "position_size", device=torch.device("cpu"), settings=settings, rows=rows)
    print(f"wrote {stem}.json and .md")


def train_and_evaluate(arguments: Arguments, form: str, size: float, fold: int) -> list[tuple[bool, bool]]:
    """(right in order, right shuffled) of each clip of a fold. In this process, whose constant is another."""
    run = folder_of(arguments, form, size, fold)
    if not (run / "eval.csv").exists():
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            train.main([*words(arguments, ARM, fold, 0), "--model.temporal-input", form, "--out", str(run)])
            cli.evaluate([str(run), "--manifest", str(arguments.out / f"test{fold}.csv"), *ONE_VIEW])
    with (run / "eval.csv").open() as file:
        return [(row["top1"] == row["label"], row["top1_shuffled"] == row["label"]) for row in csv.DictReader(file)]


def folder_of(arguments: Arguments, form: str, size: float, fold: int) -> Path:
    """Of one run."""
    return arguments.out / f"{form}_{size}_fold{fold}"


def read_order(arguments: Arguments, form: str, size: float, fold: int) -> float:
    """What a run measured before its first step."""
    return float(read_metrics(folder_of(arguments, form, size, fold) / "metrics.jsonl")[0]["order_change"])


if __name__ == "__main__":
    run_bench(main, SizeArguments, __doc__)
