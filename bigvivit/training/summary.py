"""`bigvivit report`: a run as a page, and runs side by side, finished or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Column, Table
from rich.text import Text

from bigvivit.config import ConfigError
from bigvivit.training.checkpoint import HEADER
from bigvivit.training.metrics import HEADS, head_cells
from bigvivit.training.plots import draw_curves
from bigvivit.training.progress import flatten
from bigvivit.training.report import format_cell
from bigvivit.units import format_bytes, format_count

ROWS = (
    ("stage", "stage", str),
    ("frames per clip", "frames", str),
    ("trainable parameters", "trainable_parameters", format_count),
    ("frozen parameters", "frozen_parameters", format_count),
    ("seconds per step", "seconds_per_step", lambda value: f"{value:.3f}"),
    ("peak memory of a rank", "peak_bytes", format_bytes),
    ("measured by", "peak_measured_by", str),
    ("top-1", "top1", lambda value: f"{value:.1%}"),
    ("top-5", "top5", lambda value: f"{value:.1%}"),
    ("videos not read", "failed", lambda value: str(len(value))),
    ("top-1, frames shuffled", "top1_shuffled", lambda value: f"{value:.1%}"),
    ("output changed by reversing a clip, over another clip, at step 0", "order_change", lambda value: f"{value:.2g}"),
)
"""Heading, key and how it is written."""


def read_run(run: Path) -> dict[str, Any]:
    """What a run's folder says: `run.json`, and as far as they are there its metrics, summary and accuracies.

    Raises ConfigError for a folder that no training has written to, and for a damaged file.
    """
    record = read_json(run / "run.json")
    metrics = read_metrics(run / "metrics.jsonl")
    training = [entry for entry in metrics if "loss" in entry]
    last = {key: training[-1][key] for key in ("seconds_per_step", "peak_bytes")} if training else {}
    known = {
        "stage": record["config"]["stage"],
        "frames": record["config"]["clip"]["frames"],
        **last,
        **read_if_there(run / "summary.json"),
        **read_if_there(run / "eval.json"),
    }
    known["top1_shuffled"] = known.get("shuffled", {}).get("top1")
    known["order_change"] = next((entry["order_change"] for entry in metrics if "order_change" in entry), None)
    return {"record": record, "metrics": metrics, "known": known, "finished": (run / HEADER).exists()}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a run's folder. Raises ConfigError where it is missing or damaged."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path} is not there: give the folder that a training was told with --out") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error})") from None
    return content


def read_if_there(path: Path) -> dict[str, Any]:
    """`read_json`, and nothing where the file is missing."""
    return read_json(path) if path.exists() else {}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a run; the last line of one that is running, or was killed, may be torn."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def cells(known: dict[str, Any]) -> list[tuple[str, str]]:
    """(heading, value) of each row; a dash for what is not known."""
    return [(heading, write(known[key]) if known.get(key) is not None else "-") for heading, key, write in ROWS]


def build_table(runs: list[Path]) -> Table:
    """One column per run."""
    table = Table("", *(Column(Text(str(run))) for run in runs), title="bigvivit")  # as text: [x] would be a style
    columns = [cells(read_run(run)["known"]) for run in runs]
    for entries in zip(*columns, strict=True):
        table.add_row(entries[0][0], *(Text(value) for _, value in entries))
    return table


def draw_comparison(runs: list[Path]) -> list[Path]:
    """`comparison.png` in the last run's folder, the curves of all over each other; none where no step is logged."""
    metrics = {str(run): records for run in runs if (records := read_run(run)["metrics"])}
    if not metrics:
        return []
    path = runs[-1] / "comparison.png"
    draw_curves(path, metrics)
    return [path]


def row(*values: Any) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(str(value).replace('|', '&#124;') for value in values)} |"


COUNTERS = {
    "process_bytes": "process, RSS",
    "allocated_bytes": "tensors, CUDA allocator",
    "reserved_bytes": "reserved by it",
    "retries": "its retries",
    "device_bytes": "whole device at the end, NVML",
}
"""Of `memory.measure.Peak`, as people know them."""


def describe_memory(ranks: list[dict[str, int | None]]) -> list[str]:
    """A table of each rank's peaks by every counter that there was, and the greatest."""
    names = [name for name in COUNTERS if any(rank.get(name) is not None for rank in ranks)]
    peaks: dict[str, dict[str, int | None]] = {f"rank {number}": rank for number, rank in enumerate(ranks)}
    peaks["greatest"] = {name: max((rank[name] or 0 for rank in ranks), default=0) for name in names}
    lines = [row("measured", *(COUNTERS[name] for name in names)), row(*["---"] * (len(names) + 1))]
    for who, values in peaks.items():
        lines.append(row(who, *(format_cell(name, values.get(name)) for name in names)))
    return lines


def write_page(run: Path) -> Path:
    """`report.md` and `report.png` in the run's folder: numbers, curves, settings, environment."""
    found = read_run(run)
    record, metrics, known = found["record"], found["metrics"], found["known"]
    lines = [f"# {run.name}", ""]
    if not found["finished"]:
        steps = metrics[-1]["step"] if metrics else 0
        lines += [f"Not finished: {steps} steps are logged.", ""]
    if "top1" not in known:
        lines += ["Not evaluated: `bigvivit eval` adds accuracies.", ""]
    lines += ["| | |", "| --- | --- |", *(row(*pair) for pair in cells(known)), ""]
    if metrics:
        draw_curves(run / "report.png", {run.name: metrics})
        lines += ["![Loss, validation, learning rate and memory by step](report.png)", ""]
    if "memory" in known:
        lines += ["## Memory", "", *describe_memory(known["memory"]), ""]
    if "heads" in known:
        lines += ["## Heads", "", row(*HEADS, ""), row(*["---"] * (len(HEADS) + 1))]
        lines += [row(*head_cells(entry)) for entry in known["heads"]] + [""]
    if "per_class" in known:
        lines += ["## Classes", "", "| class | clips | correct | accuracy |", "| --- | --- | --- | --- |"]
        for entry in known["per_class"]:
            accuracy = "-" if entry["accuracy"] is None else f"{entry['accuracy']:.1%}"
            lines.append(row(entry["class"], entry["clips"], entry["correct"], accuracy))
        lines += ["", "![Who is taken for whom](eval.png)", ""]
    for title, entries in (("in training", known.get("failed_clips")), ("in evaluation", known.get("failed"))):
        if entries:
            lines += [f"## Videos that could not be read {title}", ""]
            lines += [f"- {entry['path']}: {entry['reason']}" for entry in entries] + [""]
    lines += ["## Settings", "", "| | |", "| --- | --- |"]
    lines += [row(*pair) for pair in flatten(record["config"]).items()]
    lines += ["", "## Environment", "", "| | |", "| --- | --- |"]
    environment = {key: value for key, value in record.items() if key != "config"}
    lines += [row(*pair) for pair in flatten(environment).items()]
    path = run / "report.md"
    path.write_text("\n".join(lines) + "\n")
    return path
