"""A list of labelled clips, read from CSV or JSONL. Needs no torch."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigvivit.config import ConfigError

SHOWN_FAULTS = 10
WHOLE_NUMBER = re.compile(r"-?[0-9]+")
Faults = list[tuple[int, str]]  # (line, what is wrong there); line 0 is the whole file


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

    Labels are all names, numbered in alphabetical order, or all numbers from 0, whose classes are named by number.
    Given `classes`, those of an earlier training, they must be among these. Paths are relative to the manifest.

    Raises ConfigError that lists every faulty line: missing files are found here, not in the middle of an epoch.
    """
    faults: Faults = []
    rows = read_rows(path, faults)
    if not rows and not faults:
        faults.append((0, "it holds no clips"))
    labels = [read_label(row.get("label"), line, faults) for line, row in rows]
    numbering, names = number_labels([line for line, _ in rows], labels, classes, faults)
    clips = []
    for (line, row), label in zip(rows, labels, strict=True):
        video = str(row.get("path") or "").strip()
        if not video:
            faults.append((line, "no path"))
        elif not os.path.isfile(path.parent / video):  # Path.is_file raises for a name that is too long
            faults.append((line, f"{shorten(video)} is not a file"))
        start, end = (read_seconds(row.get(key), key, line, faults) for key in ("start", "end"))
        if end is not None and end <= (start or 0.0):
            faults.append((line, f"end={end} is not after start={start or 0.0}"))
        clips.append(Clip(path.parent / video, numbering.get(label, -1), start, end))
    raise_faults(path, faults)
    return Manifest(path, tuple(clips), names)


def raise_faults(path: Path, faults: Faults) -> None:
    """Raise ConfigError that lists these faults, if there are any."""
    if faults:
        faults.sort(key=lambda fault: fault[0])
        shown = "".join(f"\n  - {f'line {line}: ' if line else ''}{what}" for line, what in faults[:SHOWN_FAULTS])
        more = f"\n  - and {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
        raise ConfigError(f"manifest {path} cannot be used:{shown}{more}")


def read_rows(path: Path, faults: Faults) -> list[tuple[int, dict[Any, Any]]]:
    """(line number, columns) of each row. Raises ConfigError for a file that is neither of the two formats."""
    if path.suffix not in (".csv", ".jsonl"):
        raise ConfigError(f"manifest {path} ends in {path.suffix or 'nothing'}: give a .csv or a .jsonl file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"manifest {path} cannot be read ({error.strerror}): check the path") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"manifest {path} is not UTF-8 text ({error}): save it as UTF-8") from None
    return read_csv(path, text, faults) if path.suffix == ".csv" else read_jsonl(text, faults)


def read_csv(path: Path, text: str, faults: Faults) -> list[tuple[int, dict[Any, Any]]]:
    """Rows under their header. Raises ConfigError where that lacks a column."""
    table = csv.DictReader(io.StringIO(text), strict=True)
    rows = []
    try:
        missing = {"path", "label"} - set(table.fieldnames or ())
        if missing:
            raise ConfigError(
                f"manifest {path} has no column {' and no column '.join(sorted(missing))} in its first line: "
                f"that line must name the columns, path,label[,start,end]"
            )
        for row in table:
            rows.append((table.line_num, row))
            if any(row.get(None, ())):  # where DictReader puts what has no column
                faults.append((table.line_num, "more values than columns: put a value that holds a comma in quotes"))
    except csv.Error as error:
        faults.append((table.line_num + 1, f"not CSV ({error}): is a quotation mark left open?"))
    return rows


def read_jsonl(text: str, faults: Faults) -> list[tuple[int, dict[Any, Any]]]:
    """The object of each line that is not blank."""
    rows = []
    for line, content in enumerate(text.split("\n"), start=1):  # splitlines would also split inside JSON strings
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except json.JSONDecodeError as error:
            faults.append((line, f"not JSON ({error.msg} at character {error.pos + 1})"))
            continue
        if isinstance(row, dict):
            rows.append((line, row))
        else:
            faults.append((line, "not a JSON object with path and label"))
    return rows


def read_label(value: Any, line: int, faults: Faults) -> str:
    """A label as text, empty where there is none."""
    if isinstance(value, bool) or not isinstance(value, str | int | None):
        faults.append((line, f"label {shorten(repr(value))} is neither a name nor a whole number"))
        return ""
    label = "" if value is None else str(value).strip()
    if not label:
        faults.append((line, "no label"))
    return label


def number_labels(
    lines: Sequence[int], labels: Sequence[str], classes: Sequence[str] | None, faults: Faults
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Each label's number, and the names of all classes; a fault for each line whose label has no number."""
    found = set(labels) - {""}
    numbers = {label: int(label) for label in found if WHOLE_NUMBER.fullmatch(label)}
    as_numbers = len(numbers) == len(found) > 0
    if classes is not None:
        numbering = {name: number for number, name in enumerate(classes)}
        if as_numbers and not found & numbering.keys():  # numbers of named classes
            numbering = {label: number for label, number in numbers.items() if 0 <= number < len(classes)}
        rule = (
            f"is none of the {len(classes)} classes trained with ({', '.join(classes[:8])}{', …' * (len(classes) > 8)})"
        )
    elif as_numbers:
        numbering = {label: number for label, number in numbers.items() if number >= 0}
        rule = "is below 0: number classes from 0"
        used = set(numbering.values())
        count = 1 + max(used, default=-1)
        if count - len(used) > count // 2:  # an identifier or a year is not a class number
            faults.append(
                (0, f"labels go up to {count - 1}, but {count - len(used)} numbers below have no clip: number from 0")
            )
            count = 0
        classes = [str(number) for number in range(count)]
    else:
        classes = sorted(found)
        return {name: number for number, name in enumerate(classes)}, tuple(classes)
    for line, label in zip(lines, labels, strict=True):
        if label and label not in numbering:
            faults.append((line, f"label {shorten(repr(label))} {rule}"))
    return numbering, tuple(classes)


def read_seconds(value: Any, key: str, line: int, faults: Faults) -> float | None:
    """A time in seconds, None where the column is absent or empty."""
    if value is None or value == "":
        return None
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= 0):
        faults.append((line, f"{key}={shorten(repr(value))} is not a time in seconds from 0"))
        return None
    return seconds


def shorten(value: str, length: int = 120) -> str:
    """A value that fits on a line of a message."""
    return value if len(value) <= length else value[: length - 1] + "…"
