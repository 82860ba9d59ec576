"""A list of labelled clips, read from CSV or JSONL. Needs no torch."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigvivit.config import ConfigError

SHOWN_FAULTS = 10


@dataclass(frozen=True)
class Clip:
    """One video, or a part of one, and what it shows."""

    path: Path
    label: int
    start: float | None = None
    """Seconds from the video's beginning; None is its beginning."""
    end: float | None = None
    """Seconds from the video's beginning; None is its end."""


@dataclass(frozen=True)
class Manifest:
    """The clips of a file, and the classes their labels number."""

    path: Path
    clips: tuple[Clip, ...]
    classes: tuple[str, ...]


def read_manifest(path: Path, classes: Sequence[str] | None = None) -> Manifest:
    """Read `path,label[,start,end]`: a CSV file with a header, or JSON objects one per line; other columns are ignored.

    Labels are all names, numbered in alphabetical order, or all numbers from 0. Given `classes`, those of an earlier
    training, they must be among these. Paths are relative to the manifest.

    Raises ConfigError that lists every faulty line: missing files are found here, not in the middle of an epoch.
    """
    rows = list(read_rows(path))
    faults: list[str] = []
    if not rows:
        faults.append("it holds no clips")
    labels = [str(row.get("label") or "").strip() if row.get("label") != 0 else "0" for _, row in rows]
    numbering, label_faults = number_labels(
        [(line, label) for (line, _), label in zip(rows, labels, strict=True)], classes
    )
    faults += label_faults
    clips = []
    for (line, row), label in zip(rows, labels, strict=True):
        video = str(row.get("path") or "").strip()
        if not video:
            faults.append(f"line {line}: no path")
            continue
        if not (path.parent / video).is_file():
            faults.append(f"line {line}: {video} is not a file")
        start, end = (read_seconds(row.get(key), f"line {line}: {key}", faults) for key in ("start", "end"))
        if end is not None and end <= (start or 0.0):
            faults.append(f"line {line}: end={end} is not after start={start or 0.0}")
        clips.append(Clip(path.parent / video, numbering.get(label, -1), start, end))
    if faults:
        more = f"\n  - and {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
        lines = "".join(f"\n  - {fault}" for fault in faults[:SHOWN_FAULTS])
        raise ConfigError(f"manifest {path} cannot be used:{lines}{more}")
    names = tuple(classes) if classes is not None else tuple(sorted(numbering, key=numbering.__getitem__))
    return Manifest(path, tuple(clips), names)


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, columns) of each row. Raises ConfigError for a file that is neither of the two formats."""
    if path.suffix not in (".csv", ".jsonl"):
        raise ConfigError(f"manifest {path} ends in {path.suffix or 'nothing'}: give a .csv or a .jsonl file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"manifest {path} cannot be read ({error.strerror}): check the path") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"manifest {path} is not UTF-8 text ({error}): save it as UTF-8") from None
    if path.suffix == ".csv":
        table = csv.DictReader(text.splitlines())
        missing = {"path", "label"} - set(table.fieldnames or ())
        if missing:
            raise ConfigError(
                f"manifest {path} has no column {' and no column '.join(sorted(missing))} in its first line: "
                f"that line must name the columns, path,label[,start,end]"
            )
        yield from ((table.line_num, row) for row in table)
        return
    for line, content in enumerate(text.splitlines(), start=1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except json.JSONDecodeError as error:
            raise ConfigError(f"manifest {path}, line {line} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ConfigError(f"manifest {path}, line {line} is not a JSON object with path and label")
        yield line, row


def number_labels(labels: Sequence[tuple[int, str]], classes: Sequence[str] | None) -> tuple[dict[str, int], list[str]]:
    """Each label's number, and a fault for each line whose label has none. `labels` are (line, label)."""
    faults = [f"line {line}: no label" for line, label in labels if not label]
    found = {label for _, label in labels if label}
    as_numbers = bool(found) and all(label.isascii() and label.isdigit() for label in found)
    if classes is None:
        if as_numbers:
            count = 1 + max(int(label) for label in found)
            absent = sorted(set(range(count)) - {int(label) for label in found})
            if len(absent) > count // 2:  # an identifier or a year is not a class number
                faults.append(
                    f"labels go up to {count - 1}, but {len(absent)} numbers below have no clip: number from 0"
                )
            return {label: int(label) for label in found} | {str(i): i for i in absent}, faults
        return {label: number for number, label in enumerate(sorted(found))}, faults
    known = {name: number for number, name in enumerate(classes)}
    if as_numbers and not found & known.keys():  # numbers of named classes
        known = {str(number): number for number in range(len(classes))}
    shown = ", ".join(classes[:8]) + (", …" if len(classes) > 8 else "")
    faults += [
        f"line {line}: label {label!r} is none of the {len(classes)} classes trained with ({shown})"
        for line, label in labels
        if label and label not in known
    ]
    return known, faults


def read_seconds(value: Any, where: str, faults: list[str]) -> float | None:
    """A time in seconds, None where the column is absent or empty."""
    if value is None or value == "":
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= 0):
        faults.append(f"{where}={value!r} is not a time in seconds from 0")
        return None
    return seconds
