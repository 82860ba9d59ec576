"""Frame vectors on disk: what a frozen tower made of a clip's view, kept for later epochs, seeds, folds and runs.

A folder holds the vectors of one key (tower, types, sampling, augmentation). Each process that fills it writes shards
of its own: `NAME.safetensors`, one tensor [rows, views, tubelets, width] of fixed capacity, and with it `NAME.jsonl`,
a line for each row that is there. A row counts once its line is whole and its CRC-32, over what the line says and the
row's bytes, agrees: whenever a process is killed, or a disk is full, what was kept before stays. Readers map the shards
and may read while others write.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import shutil
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bigvivit.config import ConfigError
from bigvivit.data.manifest import Clip
from bigvivit.units import MiB, format_bytes

if TYPE_CHECKING:
    from typing_extensions import Buffer

log = logging.getLogger("bigvivit")
FORMAT = 1
SHARD_BYTES = 256 * MiB
"""Capacity of a shard; its file has holes until rows fill them."""
HEADER_BYTES = 4096
"""Of a shard before its tensor; longer than any header, so that it can be written again in place."""
SAFETENSORS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM}
Key = tuple[str, float | None, float | None, int]
"""File, start and end of the clip, number of the view."""


@dataclass
class Row:
    """Where one view's vectors are."""

    shard: Path
    number: int
    stamp: str
    """Of the file when it was read."""
    identity: str
    """What the checksum covers besides the row's bytes."""
    crc: int
    checked: bool = False


@dataclass
class Tail:
    """How far a journal has been read."""

    offset: int = 0
    refused: bool = False


class FeatureStore:
    """The vectors of one key and kind; rows are [views, tubelets, width]."""

    def __init__(
        self, folder: Path, key: str, shape: tuple[int, int, int], dtype: torch.dtype, *, by_content: bool = False
    ) -> None:
        """`key` says what the rows were made with; `by_content` knows a file by its SHA-256, not by path, size and
        time. Raises ConfigError where the folder cannot be made."""
        self.folder, self.key, self.shape, self.dtype, self.by_content = folder, key, shape, dtype, by_content
        self.row_bytes = math.prod(shape) * dtype.itemsize
        self.rows: dict[Key, list[Row]] = {}
        """All that was written for a key: a file that changed, or a row that was torn, has more than one."""
        self.tails: dict[Path, Tail] = {}
        self.maps: dict[Path, np.ndarray] = {}
        self.files: dict[Path, tuple[str, str]] = {}
        self.writer: Writer | None = None
        with explain_no_space(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self.refresh()

    def refresh(self) -> None:
        """Learn of rows that other processes have added."""
        for journal in sorted(self.folder.glob("*.jsonl")):
            tail = self.tails.setdefault(journal, Tail())
            if tail.refused or (self.writer is not None and journal == self.writer.journal_path):
                continue
            for line in read_lines(journal, tail):
                if journal not in self.maps:
                    reason = self.open_shard(journal, line)
                    if reason is not None:
                        tail.refused = True
                        log.warning("cache: shard %s is not used, its vectors are computed again: %s", journal, reason)
                        break
                    continue
                self.add_line(journal, line)

    def open_shard(self, journal: Path, first: str) -> str | None:
        """Map the shard whose journal begins with this line; returns the reason why it cannot be used."""
        try:
            header = json.loads(first)
            said = header["format"], header["key"], tuple(header["shape"]), header["dtype"]
        except (ValueError, KeyError, TypeError):
            return "it is torn: its first line is damaged"
        if said != (FORMAT, self.key, self.shape, SAFETENSORS[self.dtype]):
            return "it is foreign: made by another tower, type, sampling or version"
        try:
            self.maps[journal] = map_shard(journal.with_suffix(".safetensors"), self.row_bytes)
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"it is torn: {error}"
        return None

    def add_line(self, journal: Path, line: str) -> None:
        """A row's line; one that a killed process, or a full disk, left unfinished says nothing."""
        try:
            entry = json.loads(line)
            crc, number, stamp = entry.pop("crc32"), entry.pop("row"), entry["stamp"]
            known = self.rows.setdefault((entry["file"], entry["start"], entry["end"], entry["view"]), [])
        except (ValueError, KeyError, TypeError, AttributeError):
            return
        if isinstance(number, int) and 0 <= number < len(self.maps[journal]):
            known.append(Row(journal, number, stamp, json.dumps(entry, sort_keys=True), crc))

    def identify(self, path: Path) -> tuple[str, str]:
        """(file, stamp): by its place, with size and time for a stamp, or by its content. Raises OSError."""
        if path not in self.files:
            if self.by_content:
                self.files[path] = f"sha256:{content_checksum(path)}", ""
            else:
                found = os.stat(path)
                self.files[path] = os.path.realpath(path), f"{found.st_size} bytes, {found.st_mtime_ns} ns"
        return self.files[path]

    def find(self, clip: Clip, view: int) -> Row | None:
        """The row of this view; None where there is none, or none to trust. Bytes are checked at their first use."""
        try:
            file, stamp = self.identify(clip.path)
        except OSError:
            return None  # whoever decodes it says so
        key = file, clip.start, clip.end, view
        reasons = []
        for row in self.rows.get(key, ()):
            if row.stamp != stamp:
                reasons.append(f"the file has changed since ({row.stamp}, now {stamp})")
            elif not row.checked and checksum(row.identity, self.maps[row.shard][row.number]) != row.crc:
                reasons.append(
                    f"row {row.number} of {row.shard.with_suffix('.safetensors')} is torn: its CRC-32 differs"
                )
            else:
                row.checked = True
                return row
        if self.rows.pop(key, None):
            log.warning("cache: vectors of %s are computed again: %s", clip.path, "; ".join(reasons))
        return None

    def holds(self, clip: Clip, view: int) -> bool:
        """`find` without looking at the bytes, or saying anything: for forecasts."""
        try:
            file, stamp = self.identify(clip.path)
        except OSError:
            return False
        return any(row.stamp == stamp for row in self.rows.get((file, clip.start, clip.end, view), ()))

    def read(self, row: Row) -> Tensor:
        """A copy of the row [views, tubelets, width]."""
        return torch.from_numpy(self.maps[row.shard][row.number].copy()).view(self.dtype).view(self.shape)

    def append(self, clip: Clip, view: int, vectors: Tensor) -> None:
        """Keep a row. Raises ConfigError where the disk is full; what is there stays whole."""
        assert vectors.shape == self.shape, (vectors.shape, self.shape)
        file, stamp = self.identify(clip.path)
        identity = {"file": file, "stamp": stamp, "start": clip.start, "end": clip.end, "view": view}
        text = json.dumps(identity, sort_keys=True)
        data = vectors.to(self.dtype).contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        crc = checksum(text, data)
        with explain_no_space(self.folder):
            if self.writer is not None and self.writer.used == self.writer.capacity:
                self.close()
            if self.writer is None:
                self.writer = Writer(self)
            number = self.writer.append(data, {"row": 0, **identity, "crc32": crc})
        journal = self.writer.journal_path
        if journal not in self.maps:
            self.maps[journal] = map_shard(journal.with_suffix(".safetensors"), self.row_bytes)
        self.rows[file, clip.start, clip.end, view] = [Row(journal, number, stamp, text, crc, checked=True)]

    def close(self) -> None:
        """Put what this process wrote on the disk, and cut its shard to the rows it has."""
        if self.writer is not None:
            with explain_no_space(self.folder):
                self.writer.close()
            if self.writer.used:
                self.tails[self.writer.journal_path] = Tail(self.writer.journal_path.stat().st_size)
            self.writer = None


class Writer:
    """One shard that this process appends to."""

    def __init__(self, store: FeatureStore) -> None:
        self.store, self.used = store, 0
        self.capacity = max(1, SHARD_BYTES // store.row_bytes)
        self.journal_path = store.folder / f"{uuid.uuid4().hex[:16]}.jsonl"
        # Unbuffered: what has been written outlives this process.
        self.data = self.journal_path.with_suffix(".safetensors").open("xb", buffering=0)
        self.write_header(self.capacity)
        os.ftruncate(self.data.fileno(), HEADER_BYTES + self.capacity * store.row_bytes)
        self.journal = self.journal_path.open("xb", buffering=0)
        shape, dtype = list(store.shape), SAFETENSORS[store.dtype]
        self.write_line({"format": FORMAT, "key": store.key, "shape": shape, "dtype": dtype})

    def write_header(self, rows: int) -> None:
        """The safetensors header of so many rows, padded with spaces as the format allows."""
        tensor = {
            "dtype": SAFETENSORS[self.store.dtype],
            "shape": [rows, *self.store.shape],
            "data_offsets": [0, rows * self.store.row_bytes],
        }
        text = json.dumps({"__metadata__": {"key": self.store.key}, "vectors": tensor}).encode()
        length = HEADER_BYTES - 8
        write_whole(self.data, length.to_bytes(8, "little") + text.ljust(length), 0)

    def append(self, data: bytes, entry: dict[str, Any]) -> int:
        """The row's bytes, then the line that makes them count."""
        number = self.used
        write_whole(self.data, data, HEADER_BYTES + number * len(data))
        self.write_line({**entry, "row": number})
        self.used += 1
        return number

    def write_line(self, entry: dict[str, Any]) -> None:
        """One line at the end of the journal."""
        write_whole(self.journal, json.dumps(entry).encode() + b"\n", os.fstat(self.journal.fileno()).st_size)

    def close(self) -> None:
        """Cut the shard to its rows; one without any, on a disk that was full, goes."""
        if self.used == 0:
            self.data.close()
            self.journal.close()
            self.journal_path.with_suffix(".safetensors").unlink()
            self.journal_path.unlink()
            return
        self.write_header(self.used)
        os.ftruncate(self.data.fileno(), HEADER_BYTES + self.used * self.store.row_bytes)
        for file in (self.data, self.journal):
            os.fsync(file.fileno())
            file.close()


def checksum(identity: str, data: Buffer) -> int:
    """CRC-32 over what a row is and what it holds."""
    return zlib.crc32(data, zlib.crc32(identity.encode()))


def content_checksum(path: Path) -> str:
    """SHA-256 of a video, read in blocks."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            total.update(block)
    return total.hexdigest()


def write_whole(file: FileIO, data: bytes, offset: int) -> None:
    """Every byte, or an OSError."""
    view = memoryview(data)
    while view:
        count = os.pwrite(file.fileno(), view, offset)
        view, offset = view[count:], offset + count


def read_lines(journal: Path, tail: Tail) -> Iterator[str]:
    """The whole lines after those that were read before."""
    with journal.open("rb") as file:
        file.seek(tail.offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            tail.offset += len(line)
            yield line.decode(errors="replace")


def map_shard(path: Path, row_bytes: int) -> np.ndarray:
    """The rows of a shard as bytes [rows, row_bytes], mapped. Raises ValueError, and OSError, for one not whole."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length != HEADER_BYTES - 8:
            raise ValueError(f"{path.name} begins with {length}, not {HEADER_BYTES - 8}")
        rows = json.loads(file.read(length))["vectors"]["shape"][0]
        size = os.fstat(file.fileno()).st_size
    if size != HEADER_BYTES + rows * row_bytes:
        raise ValueError(f"{path.name} has {size} bytes, not the {HEADER_BYTES + rows * row_bytes} of {rows} rows")
    return np.memmap(path, np.uint8, "r", offset=HEADER_BYTES, shape=(rows, row_bytes))


@contextmanager
def explain_no_space(folder: Path) -> Iterator[None]:
    """Turn what a failed write raises into a ConfigError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        there = next(existing for existing in (folder, *folder.absolute().parents) if existing.is_dir())
        raise ConfigError(
            f"data.cache: frame vectors could not be written into {folder} ({error.strerror}): the disk has "
            f"{format_bytes(shutil.disk_usage(there).free)} free. What is there stays whole: make room, or give "
            f"another folder, fewer --data.cache-views or --data.cache-dtype bf16"
        ) from None
