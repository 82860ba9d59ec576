"""`bigvivit check`: which videos of a manifest training would stumble over, found before it starts."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tyro.conf import Positional

from bigvivit.config import ConfigError
from bigvivit.data.errors import DecodeError
from bigvivit.data.manifest import Faults, raise_faults, read_label, read_rows, read_seconds
from bigvivit.data.pool import Pool
from bigvivit.data.sampling import clip_span
from bigvivit.versions import require

SMALL_SIDE, LONG_RATIO = 64, 4
CHUNK_BYTES = 256 << 20
"""Of frames that are decoded at a time."""


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Decode every video of a manifest; write a clean manifest and a report. Exit code 1 where anything was found."""

    manifest: Positional[Path]
    """Manifest, CSV or JSONL. Here, a file that is missing is a finding like others."""
    out: Path | None = None
    """Folder for NAME.clean.csv (or .jsonl), NAME.check.json and NAME.check.txt [default: that of the manifest]."""
    jobs: int = 2
    """Processes that decode."""
    frames: int | None = None
    """Frames per clip in training: reports what is shorter."""
    stride: int = 1
    """Distance between two frames of a clip; 1 where training is given neither a stride nor frames per second."""
    decode: Literal["all", "ends"] = "all"
    """Every frame, or only the first, the middle and the last."""
    time_limit: float = 600.0
    """Seconds that one video may take."""

    def __post_init__(self) -> None:
        for name in ("jobs", "stride", "frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1")
        if not 0 < self.time_limit < float("inf"):
            raise ConfigError(f"time_limit={self.time_limit} is not a number of seconds above 0")


@dataclass(frozen=True)
class Row:
    """One line of the manifest."""

    line: int
    columns: dict[Any, Any]
    path: Path
    label: str
    start: float | None
    end: float | None


def check(config: CheckConfig) -> dict[str, Any]:
    """Scan, write the clean manifest and both reports, and return the report. Raises ConfigError."""
    require("reading videos", "av")
    folder = config.out or config.manifest.parent
    rows = read_for_check(config.manifest)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{config.manifest.stem}.check.txt").touch()  # now rather than after hours of decoding
    except OSError as error:
        raise ConfigError(f"out={folder} cannot be written ({error.strerror}): give another folder, --out") from None
    found = scan([row.path for row in rows], config)
    report, kept = judge(rows, found, config)
    write_clean(config.manifest, folder, kept)
    stem = folder / config.manifest.stem
    Path(f"{stem}.check.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    Path(f"{stem}.check.txt").write_text(describe(report), encoding="utf-8", errors="backslashreplace")
    return report


def read_for_check(path: Path) -> list[Row]:
    """The manifest's lines, whether or not their files are there. Raises ConfigError for what is wrong in its text."""
    faults: Faults = []
    rows = []
    for line, columns in read_rows(path, faults):
        video = str(columns.get("path") or "").strip()
        if not video:
            faults.append((line, "no path"))
        label = read_label(columns.get("label"), line, faults)
        start, end = (read_seconds(columns.get(key), key, line, faults) for key in ("start", "end"))
        if end is not None and end <= (start or 0.0):
            faults.append((line, f"end={end} is not after start={start or 0.0}"))
        rows.append(Row(line, columns, path.parent / video, label, start, end))
    if not rows and not faults:
        faults.append((0, "it holds no clips"))
    raise_faults(path, faults)
    return rows


def scan(paths: list[Path], config: CheckConfig) -> dict[Path, dict[str, Any]]:
    """What each file holds, or its `reason` for not being read."""
    from rich.console import Console
    from rich.progress import track

    pool = Pool(Inspect(config.decode), config.jobs, time_limit=config.time_limit)
    try:
        futures = {path: pool.submit(path) for path in dict.fromkeys(paths)}
        found = {}
        shown = track(futures.items(), "checking", console=Console(stderr=True), disable=not sys.stderr.isatty())
        for path, future in shown:
            try:
                found[path] = future.result()
            except DecodeError as error:
                found[path] = {"reason": str(error).removeprefix(f"{path} ").removeprefix(f"{path}: ")}
        return found
    finally:
        pool.close()


@dataclass(frozen=True)
class Inspect:
    """What a worker does with a path."""

    decode: str

    def __call__(self, path: Path, slot: np.ndarray | None) -> dict[str, Any]:
        from bigvivit.data.decode import open_video

        video = open_video(path)
        count = len(video)
        shape = video.read([0]).shape
        step = max(1, CHUNK_BYTES // shape[1:].numel())
        if self.decode == "all":
            for first in range(0, count, step):
                video.read(range(first, min(first + step, count)))
        else:
            video.read([0, count // 2, count - 1])
        try:
            checksum = hashlib.sha256()
            with path.open("rb") as file:
                while block := file.read(1 << 20):  # hashlib.file_digest needs Python 3.11
                    checksum.update(block)
        except OSError as error:
            raise DecodeError(f"{path} cannot be read: {error.strerror}") from None
        size = {"height": shape[2], "width": shape[3]}
        return {"frames": count, "fps": video.fps, **size, "decoder": video.decoder, "sha256": checksum.hexdigest()}


def judge(rows: list[Row], found: dict[Path, dict[str, Any]], config: CheckConfig) -> tuple[dict[str, Any], list[Row]]:
    """The report, and the lines that a clean manifest keeps: those that can be read, of equal clips the first."""
    report: dict[str, Any] = {
        "manifest": str(config.manifest),
        "decoded": config.decode,
        "clips": len(rows),
        "files": len(found),
        "decoders": dict(Counter(file["decoder"] for file in found.values() if "decoder" in file)),
        **{name: [] for name in ("unreadable", "shorter", "duplicates", "odd_sizes")},
    }
    first: dict[Any, Row] = {}
    kept = []
    for row in rows:
        file = found[row.path]
        entry: dict[str, Any] = {"line": row.line, "path": str(row.columns["path"])}
        if "reason" in file:
            report["unreadable"].append({**entry, "reason": file["reason"]})
            continue
        content = (file["sha256"], row.start, row.end)
        if content in first:
            same = first[content]
            note = "" if same.label == row.label else f", which is labelled {same.label!r} and not {row.label!r}"
            reason = f"the same clip as line {same.line}, {same.columns['path']}{note}"
            report["duplicates"].append({**entry, "reason": reason})
            continue
        first[content] = row
        kept.append(row)
        beginning = round((row.start or 0.0) * file["fps"])
        frames = min(file["frames"], file["frames"] if row.end is None else round(row.end * file["fps"])) - beginning
        needed = clip_span(config.frames, config.stride) if config.frames else 1
        if frames < needed:
            reason = f"{max(frames, 0)} frames between start and end, where a clip spans {needed}"
            report["shorter"].append({**entry, "reason": reason})
        short, long = sorted((file["height"], file["width"]))
        if short < SMALL_SIDE or long > LONG_RATIO * short or short % 2 or long % 2:
            report["odd_sizes"].append({**entry, "reason": f"{file['width']} x {file['height']} pixels"})
    report["kept"] = len(kept)
    report["classes_lost"] = sorted({row.label for row in rows} - {row.label for row in kept})
    return report, kept


def has_findings(report: dict[str, Any]) -> bool:
    """Whether anything is wrong with the manifest's clips."""
    return any(report[name] for name in ("unreadable", "shorter", "duplicates", "odd_sizes"))


def write_clean(manifest: Path, folder: Path, rows: list[Row]) -> None:
    """The kept lines with all their columns; paths are relative to where they are written."""
    lines = [
        {**row.columns, "path": os.path.relpath(os.path.abspath(row.path), os.path.abspath(folder))} for row in rows
    ]
    target = folder / f"{manifest.stem}.clean{manifest.suffix}"
    with target.open("w", newline="", encoding="utf-8") as file:
        if manifest.suffix == ".jsonl":
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        else:
            names = list(lines[0]) if lines else ["path", "label"]
            table = csv.DictWriter(file, names, lineterminator="\n")
            table.writeheader()
            table.writerows(lines)


def describe(report: dict[str, Any]) -> str:
    """The report for people."""
    decoders = ", ".join(f"{count} by {name}" for name, count in report["decoders"].items()) or "none"
    lines = [
        f"{report['manifest']}: {report['clips']} clips of {report['files']} files; read {decoders}",
        f"{report['kept']} clips are kept in the clean manifest",
    ]
    for name, heading in (
        ("unreadable", "unreadable, left out"),
        ("duplicates", "duplicates, left out"),
        ("shorter", "shorter than asked, kept: their frames are spread over the whole clip"),
        ("odd_sizes", f"odd sizes, kept: a side uneven or below {SMALL_SIDE}, or one {LONG_RATIO} times the other"),
    ):
        if report[name]:
            lines += ["", f"{len(report[name])} {heading}"]
            lines += [f"  line {entry['line']}: {entry['path']}: {entry['reason']}" for entry in report[name]]
    if report["classes_lost"]:
        lines += ["", f"classes without a clip that is kept: {', '.join(report['classes_lost'])}"]
    return "\n".join(lines) + "\n"
