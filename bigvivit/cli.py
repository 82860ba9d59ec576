"""The `bigvivit` command."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro

from bigvivit.config import ConfigError, EvalConfig
from bigvivit.memory.ranks import tell_once
from bigvivit.training.checkpoint import CANNOT_WRITE
from bigvivit.training.stop import STOPPED
from bigvivit.versions import require

SHOWN_CLASSES, SHOWN_FAILURES = 20, 10
UNLIMITED = 10_000
"""Columns of a terminal that is none."""


def main() -> None:
    """Run the subcommand that the command line names."""
    commands: dict[str, tuple[Callable[[list[str]], None], str]] = {
        "train": (train, "train one stage"),
        "cache": (cache, "compute a frozen tower's vectors ahead of training"),
        "eval": (evaluate, "accuracy of trained runs"),
        "predict": (predict, "what a trained run takes videos for"),
        "plan": (plan, "whether a training step fits hardware that need not be here"),
        "dryrun": (dryrun, "whether any PyTorch program fits a GPU that is not here: run it on a virtual one"),
        "calibrate": (calibrate, "what this machine's GPU or CPU says of the forecasts, in minutes"),
        "drift": (drift, "what storing a tower in bf16, fp16, int8 or nf4 costs"),
        "towers": (towers, "the towers known by name: size, memory, tokens"),
        "check": (check, "find the videos of a manifest that cannot be read"),
        "report": (report, "a page with curves of each run, and one table of all"),
        "replay": (replay, "what GPU memory fragmentation cost, from a memory snapshot"),
        "demo": (demo, "write the demo's clips"),
        "doctor": (doctor, "what this machine has, and what is missing for what"),
    }
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        width = max(map(len, commands))
        lines = "\n".join(f"  {command:{width}}  {text}" for command, (_, text) in commands.items())
        print(f"usage: bigvivit COMMAND ...\n\n{lines}\n\nbigvivit COMMAND --help says more.")
        return
    if name not in commands:
        print(f"error: bigvivit has no command {name!r}: one of {', '.join(commands)}", file=sys.stderr)
        sys.exit(2)
    try:
        commands[name][0](sys.argv[2:])
    except ConfigError as error:
        tell_once(f"error: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(STOPPED)
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def train(argv: list[str]) -> None:
    """`bigvivit train`."""
    from bigvivit.train import main as train_main

    train_main(argv)


def cache(argv: list[str]) -> None:
    """`bigvivit cache`, with the flags of `bigvivit train`."""
    from bigvivit.fill_cache import fill_cache
    from bigvivit.presets import parse_train

    argv = [word for word in argv if not word.startswith("--local_rank=")]  # of DeepSpeed's launcher
    fill_cache(parse_train(argv, "bigvivit cache"))


def evaluate(argv: list[str]) -> None:
    """`bigvivit eval RUN [RUN ...] --manifest …`."""
    config = tyro.cli(EvalConfig, args=argv, prog="bigvivit eval")

    from bigvivit.eval import evaluate_runs

    results = evaluate_runs(config)
    for result in results:
        print(describe_result(result))
    if len(results) > 1:
        print_table(
            ["run", "frames", "top-1", "top-5", "top-1, frames shuffled", "not read"],
            [
                [
                    result["run"],
                    result["frames"],
                    f"{result['top1']:.1%}",
                    f"{result['top5']:.1%}",
                    f"{result['shuffled']['top1']:.1%}" if "shuffled" in result else "-",
                    len(result["failed"]),
                ]
                for result in results
            ],
        )


def describe_result(result: dict[str, Any]) -> str:
    """Classes, the worst first, and the line that counts."""
    known = [entry for entry in result["per_class"] if entry["clips"]]
    worst = sorted(known, key=lambda entry: entry["accuracy"])[:SHOWN_CLASSES]
    print_table(
        [f"{result['run']}: class", "clips", "correct", "accuracy"],
        [[entry["class"], entry["clips"], entry["correct"], f"{entry['accuracy']:.1%}"] for entry in worst],
    )
    if len(known) > len(worst):
        print(f"and {len(known) - len(worst)} classes with better accuracy, in eval.json")
    for entry in result["failed"][:SHOWN_FAILURES]:
        print(f"not read: {entry['reason']}")
    line = f"top-1 {result['top1']:.1%}  top-5 {result['top5']:.1%}  of {result['clips']} clips"
    if "shuffled" in result:
        line += f"; frames shuffled: top-1 {result['shuffled']['top1']:.1%}"
    failed = len(result["failed"])
    return line + (f"; {failed} videos could not be read and are not counted" if failed else "")


def print_table(headings: list[str], rows: list[list[object]], least: tuple[str, ...] = ()) -> None:
    """A table on the terminal, without the columns that are `least` needed, in this order, where it is too narrow; in a
    pipe a line for each row, whatever its length."""
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Column, Table
    from rich.text import Text

    def build(left_out: tuple[str, ...]) -> Table:
        shown = [number for number, heading in enumerate(headings) if heading not in left_out]
        # As text: rich would read a class or a folder named [x] as a style.
        columns = [Column(Text(headings[number]), no_wrap=bool(least and number), overflow="fold") for number in shown]
        table = Table(*columns) if console.is_terminal else Table(*columns, box=None, pad_edge=False)
        for row in rows:
            table.add_row(*(Text(str(row[number])) for number in shown))
        return table

    console = Console()
    if not console.is_terminal:
        console = Console(width=UNLIMITED)
        console.print(build(()))
        return
    endless, count = console.options.update(width=UNLIMITED), 0
    while count < len(least) and Measurement.get(console, endless, build(least[:count])).maximum > console.width:
        count += 1
    console.print(build(least[:count]))
    if count:
        console.print(Text(f"in a wider terminal, or with --json, also: {', '.join(least[:count])}"))


def predict(argv: list[str]) -> None:
    """`bigvivit predict RUN VIDEO [VIDEO ...]`; exit code 1 where one could not be read."""
    from bigvivit.predict import PredictConfig, as_json
    from bigvivit.predict import predict as predict_videos

    config = tyro.cli(PredictConfig, args=argv, prog="bigvivit predict")

    failed = False
    for prediction in predict_videos(config):
        failed |= prediction.error is not None
        if config.json:
            print(json.dumps(as_json(prediction)), flush=True)
        elif prediction.error is not None:
            print(f"error: {prediction.error}", file=sys.stderr)
        else:
            rows: list[list[object]] = [[label, f"{probability:.1%}"] for label, probability in prediction.labels]
            print_table([str(prediction.path), "probability"], rows)
    sys.exit(1 if failed else 0)


def drift(argv: list[str]) -> None:
    """`bigvivit drift RUN_OR_TOWER --manifest …`."""
    from bigvivit.drift import DriftConfig, measure_drift
    from bigvivit.units import format_bytes

    result = measure_drift(tyro.cli(DriftConfig, args=argv, prog="bigvivit drift"))
    headings = ["storage", "tower", "cosine, mean", "cosine, least"]
    rows: list[list[object]] = [
        [row["storage"], format_bytes(row["stored_bytes"]), f"{row['cosine_mean']:.6f}", f"{row['cosine_min']:.6f}"]
        for row in result["rows"]
    ]
    if "top1" in result["rows"][0]:
        headings += ["top-1", "change", "predictions changed"]
        for cells, row in zip(rows, result["rows"], strict=True):
            cells += [f"{row['top1']:.1%}", f"{row['top1_change']:+.1%}", row["predictions_changed"]]
    print_table(headings, rows)
    line = f"frame vectors of {result['clips']} clips of {result['frames']} frames against those of fp32 weights"
    failed = len(result["failed"])
    print(line + (f"; {failed} videos could not be read and are not counted" if failed else ""))


def towers(argv: list[str]) -> None:
    """`bigvivit towers`."""

    def arguments(*, json: bool = False) -> bool:
        """List the towers known by name. A model of their families loads by hub id or folder without being listed.

        Args:
            json: Print a list of objects, with the source of each tower's dimensions.
        """
        return json

    as_json = tyro.cli(arguments, args=argv, prog="bigvivit towers")

    from dataclasses import asdict

    from bigvivit.model.catalog import TIMM
    from bigvivit.model.timm_towers import has_timm
    from bigvivit.towers import list_towers
    from bigvivit.units import format_bytes, format_count

    if as_json:
        print(json.dumps([asdict(row) for row in list_towers()], indent=2))
        return
    print_table(
        ["tower", "parameters", "bf16", "tokens", "patch@image", "layers/width/heads/MLP", "vector", "mean", "fp16"],
        [
            [
                row.name, format_count(row.parameters), format_bytes(row.bf16_bytes), row.tokens,
                f"{row.patch}@{row.image}", row.dimensions, row.vector, row.normalisation, row.fp16,
            ]
            for row in list_towers()
        ],
        least=("mean", "fp16", "vector", "layers/width/heads/MLP", "patch@image", "tokens", "bf16"),
    )  # fmt: skip
    if not has_timm():
        print(f'with pip install "bigvivit[timm]" also {", ".join(TIMM)}')


def check(argv: list[str]) -> None:
    """`bigvivit check MANIFEST`; exit code 1 where something was found."""
    from bigvivit.data.check import CheckConfig, describe, has_findings
    from bigvivit.data.check import check as check_manifest

    found = check_manifest(tyro.cli(CheckConfig, args=argv, prog="bigvivit check"))
    print(describe(found), end="")
    sys.exit(1 if has_findings(found) else 0)


def plan(argv: list[str]) -> None:
    """`bigvivit plan --tower … --frames … --hardware …`."""
    from bigvivit.plan import PlanConfig
    from bigvivit.plan import plan as forecast

    forecast(tyro.cli(PlanConfig, args=argv, prog="bigvivit plan"))


def dryrun(argv: list[str]) -> None:
    """`bigvivit dryrun --gpu … -- COMMAND`; exit code 1 where it does not fit."""
    from bigvivit.commands.dryrun import dryrun as dryrun_main

    dryrun_main(argv)


def calibrate(argv: list[str]) -> None:
    """`bigvivit calibrate`."""
    from bigvivit.commands.calibrate import calibrate as calibrate_main

    calibrate_main(argv)


def report(argv: list[str]) -> None:
    """`bigvivit report RUN [RUN ...]`."""

    def arguments(runs: Annotated[tuple[Path, ...], tyro.conf.Positional]) -> tuple[Path, ...]:
        """Write report.md and report.png into each run's folder; print one table of all, and draw several together."""
        return runs

    runs = tyro.cli(arguments, args=argv, prog="bigvivit report")
    require("pictures of runs", "matplotlib")
    if not runs:
        raise ConfigError("no run is given: name the folder of at least one")

    from rich.console import Console

    from bigvivit.training.summary import build_table, draw_comparison, write_page

    pages = [write_page(run) for run in runs]
    if len(runs) > 1:
        pages += draw_comparison(list(runs))
    Console().print(build_table(list(runs)))
    for page in pages:
        print(f"wrote {page}")


def replay(argv: list[str]) -> None:
    """`bigvivit replay SNAPSHOT`."""
    from bigvivit.forecast.replay_report import ReplayConfig, replay_snapshot

    replay_snapshot(tyro.cli(ReplayConfig, args=argv, prog="bigvivit replay"))


def demo(argv: list[str]) -> None:
    """`bigvivit demo FOLDER`."""
    from bigvivit.data.demo import main as demo_main

    demo_main(argv)


def doctor(argv: list[str]) -> None:
    """`bigvivit doctor`; exit code 1 where the main job would fail."""
    from bigvivit.commands.doctor import doctor as doctor_main

    doctor_main(argv)


if __name__ == "__main__":
    main()
