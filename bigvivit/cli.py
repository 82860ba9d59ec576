"""The `bigvivit` command."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro

from bigvivit.config import ConfigError, EvalConfig


def main() -> None:
    """Run the subcommand that the command line names."""
    commands: dict[str, tuple[Callable[[list[str]], None], str]] = {
        "train": (train, "train one stage"),
        "eval": (evaluate, "accuracy of a finished run"),
        "check": (check, "find the videos of a manifest that cannot be read"),
        "report": (report, "one table of finished and evaluated runs"),
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


def check(argv: list[str]) -> None:
    """`bigvivit check MANIFEST`; exit code 1 where something was found."""
    from bigvivit.data.check import CheckConfig, describe, has_findings
    from bigvivit.data.check import check as check_manifest

    found = check_manifest(tyro.cli(CheckConfig, args=argv, prog="bigvivit check"))
    print(describe(found), end="")
    sys.exit(1 if has_findings(found) else 0)


def report(argv: list[str]) -> None:
    """`bigvivit report RUN [RUN ...]`."""

    def arguments(runs: Annotated[tuple[Path, ...], tyro.conf.Positional]) -> tuple[Path, ...]:
        """One table of finished and evaluated runs."""
        return runs

    runs = tyro.cli(arguments, args=argv, prog="bigvivit report")

    from rich.console import Console

    from bigvivit.training.report import build_table

    Console().print(build_table(list(runs)))


def demo(argv: list[str]) -> None:
    """`bigvivit demo FOLDER`."""
    from bigvivit.data.demo import main as demo_main

    demo_main(argv)
