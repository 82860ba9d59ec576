"""What numbers were taken with: the record of a run, and the reports of benches."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from bigvivit.config import ConfigError, TrainConfig
from bigvivit.units import format_bytes
from bigvivit.versions import read_versions

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "torchvision", "transformers", "deepspeed", "decord", "av")
"""Whose versions numbers depend on."""


def describe_run(config: TrainConfig, *, engine: str, world: int, device: torch.device) -> dict[str, Any]:
    """Everything needed to run it again: command, resolved configuration, commit, versions, machine."""
    return {
        "command": read_command(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": read_commit(),
        "versions": read_versions(PACKAGES),
        "engine": engine,
        "ranks": world,
        "device": describe_device(device),
        "config": asdict(config),
    }


def read_commit() -> str | None:
    """The commit of the checkout this package runs from, `+` where files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


VIRTUAL = " (virtual)"
"""Behind the name of a GPU that is not there."""


def describe_device(device: torch.device) -> str:
    """The accelerator's or the processor's name."""
    import torch

    if device.type == "cuda":
        from bigvivit.forecast.virtual_gpu.inside import is_active

        return torch.cuda.get_device_name(device) + VIRTUAL * is_active()
    return str(torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine())


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What numbers were taken on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"device": describe_device(device), "cores": len(os.sched_getaffinity(0)), "memory_bytes": memory}


def write_report(
    folder: Path, bench: str, *, device: torch.device, settings: dict[str, Any], rows: list[dict[str, Any]]
) -> Path:
    """`<bench>_<machine>_<date>.json` and a `.md` table of the same rows; returns the path without its ending.

    Each row says `evidence`, measured, virtual or forecast, and carries the unit in each key. Of `settings`, which may
    also hold what all rows came to, the Markdown shows those that are one value.
    """
    now, machine, versions = datetime.now(timezone.utc), describe_machine(device), read_versions(PACKAGES)
    words = re.sub(r"\(.*?\)|[^a-z0-9]+", " ", f"{machine['device']} {machine['cores']} cores".lower())
    stem = folder / f"{bench}_{'-'.join(words.split())}_{now:%Y-%m-%d}"
    record = {
        "bench": bench,
        "command": read_command(),
        "commit": read_commit(),
        "date": now.isoformat(timespec="seconds"),
        "machine": machine,
        "versions": versions,
        "settings": settings,
        "rows": rows,
    }
    folder.mkdir(parents=True, exist_ok=True)
    stem.with_name(f"{stem.name}.json").write_text(json.dumps(record, indent=2, default=str) + "\n")
    keys = list(dict.fromkeys(key for row in rows for key in row))
    table = [keys, ["---"] * len(keys), *([format_cell(key, row.get(key)) for key in keys] for row in rows)]
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in table)
    memory = format_bytes(machine["memory_bytes"])
    head = f"# {bench}\n\n`{record['command']}`, commit {record['commit']}, {record['date']}\n\n"
    head += f"{machine['device']}, {machine['cores']} cores, {memory}; " + ", ".join(
        f"{name} {version}" for name, version in versions.items()
    )
    simple = {key: format_cell(key, value) for key, value in settings.items() if isinstance(value, str | int | float)}
    if simple:
        head += "\n\n" + ", ".join(f"{key} {value}" for key, value in simple.items())
    stem.with_name(f"{stem.name}.md").write_text(f"{head}\n\n{text}\n")
    return stem


def format_cell(key: str, value: Any) -> str:
    """A value for people, by the unit its key carries."""
    if value is None:
        return ""
    if key.endswith("_bytes"):
        return format_bytes(value)
    if key.startswith("top"):
        return f"{value:.1%}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def run_bench(main: Callable[[Any], None], arguments: type, description: str | None) -> None:
    """A bench's command line. A setting that cannot be ends with one message and exit code 2, as in `bigvivit`."""
    try:
        main(tyro.cli(arguments, description=description))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def read_command() -> str:
    """The command line of this process, without the folders before the program."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
