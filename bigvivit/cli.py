"""The `bigvivit` command."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro

from bigvivit.config import ConfigError, EvalConfig, ReplayConfig


def main() -> None:
    """Run the subcommand that the command line names."""
    commands: dict[str, tuple[Callable[[list[str]], None], str]] = {
        "train": (train, "train one stage"),
        "eval": (evaluate, "accuracy of a finished run"),
        "report": (report, "one table of finished and evaluated runs"),
        "replay": (replay, "what GPU memory fragmentation cost, from a memory snapshot"),
        "demo": (demo, "write the demo's clips"),
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
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def train(argv: list[str]) -> None:
    """`bigvivit train`."""
    from bigvivit.train import main as train_main

    train_main(argv)


def evaluate(argv: list[str]) -> None:
    """`bigvivit eval RUN --manifest …`."""
    config = tyro.cli(EvalConfig, args=argv, prog="bigvivit eval")

    from bigvivit.eval import evaluate_run

    result = evaluate_run(config)
    print(f"top-1 {result['top1']:.1%}  top-5 {result['top5']:.1%}  of {result['clips']} clips")


def report(argv: list[str]) -> None:
    """`bigvivit report RUN [RUN ...]`."""

    def arguments(runs: Annotated[tuple[Path, ...], tyro.conf.Positional]) -> tuple[Path, ...]:
        """One table of finished and evaluated runs."""
        return runs

    runs = tyro.cli(arguments, args=argv, prog="bigvivit report")

    from rich.console import Console

    from bigvivit.training.report import build_table

    Console().print(build_table(list(runs)))


def replay(argv: list[str]) -> None:
    """`bigvivit replay SNAPSHOT`."""
    config = tyro.cli(ReplayConfig, args=argv, prog="bigvivit replay")

    from bigvivit.forecast.replay_report import replay_snapshot

    replay_snapshot(config)


def demo(argv: list[str]) -> None:
    """`bigvivit demo FOLDER`."""
    from bigvivit.data.demo import main as demo_main

    demo_main(argv)
