"""The report: JSON of all rows, a Markdown page of what they say, and a picture of how far forecasts are off."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bigvivit.calibrate.calibration import Calibration
from bigvivit.calibrate.constants import errors
from bigvivit.calibrate.journal import Journal, Side
from bigvivit.calibrate.rows import Row
from bigvivit.training.report import format_cell
from bigvivit.units import format_bytes
from bigvivit.versions import has_package

HIDDEN = ("key", "group", "name", "side", "evidence", "took_seconds")
"""Of a row where it stands in a list of facts."""


def write_page(journal: Journal, rows: list[Row], calibration: Calibration, out: Path, notes: list[str]) -> list[Path]:
    """`report.md` and `.json` in the folder and, where matplotlib is, `.png`; replaced by every run."""
    from bigvivit.training.report import PACKAGES, read_command, read_commit
    from bigvivit.versions import read_versions

    versions = read_versions(PACKAGES)
    record = {
        "bench": "calibrate", "command": read_command(), "commit": read_commit(), "date": calibration.date,
        "machine": journal.identity, "versions": versions, "notes": notes, "rows": list(journal.rows.values()),
    }  # fmt: skip
    paths = [out / "report.md", out / "report.json"]
    paths[1].write_text(json.dumps(record, indent=2) + "\n")
    picture = out / "report.png"
    if has_package("matplotlib") and draw(journal, picture):
        paths.append(picture)
    lines = [
        f"# {journal.identity['card']}: forecasts against it, {journal.identity['evidence']}",
        "",
        f"`{record['command']}`, commit {record['commit']}, {calibration.date}; "
        + ", ".join(f"{name} {value}" for name, value in {**journal.identity, **versions}.items()),
        *(f"\n{note}" for note in notes),
        *tell_constants(calibration),
        *tell_memory(journal),
        *tell_capacities(journal),
        *tell_others(journal, ("facts", "rates", "times")),
        *tell_missing(journal, rows),
    ]
    if picture in paths:
        lines += ["", f"![Errors of forecasts]({picture.name})"]
    paths[0].write_text("\n".join(lines) + "\n")
    return paths


def table(headings: list[str], rows: list[list[str]]) -> Iterator[str]:
    """Of Markdown."""
    for cells in [headings, ["---"] * len(headings), *rows]:
        yield f"| {' | '.join(cells)} |"


def tell_constants(calibration: Calibration) -> Iterator[str]:
    """What `plan` takes."""
    yield from ("", "## Constants", "")
    sizes = calibration.context_bytes
    context = "" if sizes is None else ", ".join(f"{format_bytes(size)}" for size in sizes)
    what = "context: least, expected, most" if calibration.device == "cuda" else "process beside tensors"
    rows = [[what, context]]
    for name in ("memory_bytes", "workspace_bytes", "scratch_bytes"):
        rows.append([name.removesuffix("_bytes"), format_cell(name, getattr(calibration, name))])
    for name in ("bandwidth", "host_bandwidth", "disk_bandwidth"):
        rows.append([name.replace("_", " "), tell("per_second", getattr(calibration, name))])
    rows += [[f"products in {name}", f"{rate / 1e12:.3g} TFLOP/s"] for name, rate in calibration.rates.items()]
    yield from table(["constant", calibration.evidence], rows)


def tell_memory(journal: Journal) -> Iterator[str]:
    """Peaks beside those that were forecast."""
    found = [row for row in errors(journal) if row["group"] == "memory"]
    if not found:
        return
    yield from ("", "## Peaks of PyTorch's allocator over loading and three steps", "")
    columns = ["allocated", "reserved"] if journal.identity["device"] == "cuda" else ["allocated"]
    headings, sides = ["step"], sides_of(journal)
    for what in columns:
        headings += [f"{what}, {journal.identity['evidence']}", *sides]
    replayed = journal.identity["device"] == "cuda"
    rows = []
    for row in found:
        cells = [row["name"]]
        for what in columns:
            cells.append(format_cell(f"{what}_bytes", row[f"{what}_bytes"]))
            cells += [tell_error(row.get(f"{other}_{what}_error")) for other in sides]
        if replayed:
            own = journal.rows[f"memory: {row['name']}", "device"]
            cells.append(str(own.get("replay", "")))
        rows.append(cells)
    yield from table([*headings, *["replay"] * replayed], rows)


def tell_capacities(journal: Journal) -> Iterator[str]:
    """Frames beside those that were forecast."""
    found = [row for row in errors(journal) if row["group"] == "capacity"]
    if found:
        yield from ("", "## The most frames that fit, under so much of PyTorch's allocator", "")
        sides = sides_of(journal)
        rows = []
        for row in found:
            answers = [journal.found(f"capacity: {row['name']}", side) for side in ("device", *sides)]
            rows.append([row["name"], *("" if each is None else tell_frames(each) for each in answers)])
        yield from table(["step", journal.identity["evidence"], *sides], rows)


def tell_frames(row: dict[str, Any]) -> str:
    """`64`, or `1024+` where the search ended."""
    return f"{row['frames']}{'+' if row['beyond'] else ''}"


def sides_of(journal: Journal) -> list[Side]:
    """Who else answered, of whatever row."""
    others: tuple[Side, ...] = ("virtual", "forecast")
    return [side for side in others if any(found == side for _, found in journal.rows)]


def tell_others(journal: Journal, groups: tuple[str, ...]) -> Iterator[str]:
    """What is no peak, a line for each value, and the virtual card's beside it."""
    for group in groups:
        rows, sides = [], ["virtual"] if group == "facts" and "virtual" in sides_of(journal) else []
        for (key, side), found in journal.rows.items():
            if side != "device" or found["group"] != group or "failed" in found:
                continue
            other = journal.found(key, "virtual") or {}
            for name, value in found.items():
                if name not in HIDDEN:
                    beside = [tell(name, other[name]) if name in other else ""] * len(sides)
                    rows.append([found["name"], name.replace("_", " "), tell(name, value), *beside])
        if rows:
            yield from ("", f"## {group.capitalize()}", "")
            yield from table(["row", "what", str(journal.identity["evidence"]), *sides], rows)


def tell_missing(journal: Journal, rows: list[Row]) -> Iterator[str]:
    """Rows that failed, and those that time was too short for."""
    failed = [row for row in journal.rows.values() if "failed" in row]
    if failed:
        yield from ("", "## Failed", "")
        yield from table(["row", "class", "why"], [[row["key"], row["evidence"], row["failed"]] for row in failed])
    left = [row for row in rows if any((row.key, side) not in journal.rows for side in row.jobs)]
    if left:
        groups = ", ".join(
            f"{sum(row.group == group for row in left)} of {group}"
            for group in dict.fromkeys(row.group for row in left)
        )
        yield from ("", f"Rows that not all have answered who could: {groups}. The same command goes on there.")


def tell(name: str, value: Any) -> str:
    """A value for people."""
    if name.endswith("per_second") and value is not None:
        return f"{value / 1e12:.3g} T/s" if value >= 1e12 else f"{value / 1e9:.3g} G/s"
    return format_cell(name, value)


def tell_error(share: float | None) -> str:
    """A difference, as what was forecast differs from what was measured."""
    return "" if share is None else f"{share:+.2%}"


def describe_row(row: dict[str, Any]) -> str:
    """A line while it is measured."""
    if "failed" in row:
        return f"{row['key']}: failed ({row['evidence']}): {row['failed']}"
    shown = [f"{name.replace('_', ' ')} {tell(name, value)}" for name, value in row.items() if name not in HIDDEN]
    return f"{row['key']} ({row['evidence']}): {', '.join(shown[:3])}"


def draw(journal: Journal, path: Path) -> bool:
    """How far each forecast of a peak is from the device's; False where there is nothing to draw."""
    rows = [row for row in errors(journal) if row["group"] == "memory"]
    kinds = {
        f"{other}, {what}": [
            (number, row[key]) for number, row in enumerate(rows) if (key := f"{other}_{what}_error") in row
        ]
        for what in ("allocated", "reserved")
        for other in ("virtual", "forecast")
    }
    kinds = {name: points for name, points in kinds.items() if points}
    if not kinds:
        return False
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.25 * len(rows)), layout="constrained")
    for (name, points), mark in zip(kinds.items(), "osx+", strict=False):
        axes.plot([100 * error for _, error in points], [number for number, _ in points], mark, label=name)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set_xlabel(f"error of the peak, % of what was {journal.identity['evidence']}")
    axes.set_title(str(journal.identity["card"]))
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True
