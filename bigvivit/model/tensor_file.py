"""Tensors of a safetensors file, read one by one at their places.

The library's `safe_open` maps the whole file privately, which counts as data: a tower of 2 GB cannot even be opened by
a process that may have 2.75 GB of it. What is read here goes into a buffer of its own, and nowhere else.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
LENGTH_BYTES, LONGEST_HEADER = 8, 100_000_000
"""The header's length as a little-endian number, and what the library allows for it."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    dtype: str
    """As the format calls it."""
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file."""
    nbytes: int


def read_entries(path: Path) -> dict[str, Entry]:
    """What the file holds, by name. Raises ValueError for one that is cut, or not in this format."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            if not 2 <= length <= min(size - LENGTH_BYTES, LONGEST_HEADER):
                raise ValueError(f"its header would have {length} bytes, the file has {size}")
            header: dict[str, Any] = json.loads(file.read(length))
            entries = {name: parse_entry(entry, length) for name, entry in header.items() if name != "__metadata__"}
        end = max((entry.offset + entry.nbytes for entry in entries.values()), default=LENGTH_BYTES + length)
        if end != size:
            raise ValueError(f"its tensors end at byte {end}, the file has {size}")
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): fetch it again") from None
    return entries


def parse_entry(entry: dict[str, Any], header_bytes: int) -> Entry:
    """One tensor's line of the header."""
    first, last = entry["data_offsets"]
    shape = tuple(entry["shape"])
    dtype = str(entry["dtype"])
    if any(type(number) is not int for number in (first, last, *shape)):  # JSON knows 1.0, true and Infinity too
        raise ValueError(f"a tensor of shape {list(shape)} from byte {first} to {last}")
    if not 0 <= first <= last or any(extent < 0 for extent in shape):
        raise ValueError(f"a tensor of shape {list(shape)} from byte {first} to {last}")
    if dtype in DTYPES and last - first != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"{last - first} bytes for a tensor of shape {list(shape)} in {dtype}")
    return Entry(dtype, shape, LENGTH_BYTES + header_bytes + first, last - first)


def read_tensor(path: Path, entry: Entry, rows: tuple[int, int] | None = None) -> Tensor:
    """A tensor of one of DTYPES, or the rows from `rows[0]` to before `rows[1]`. Raises ValueError for a short file."""
    dtype, shape, offset = DTYPES[entry.dtype], entry.shape, entry.offset
    if rows is not None:
        shape = (rows[1] - rows[0], *shape[1:])
        offset += rows[0] * math.prod(shape[1:]) * dtype.itemsize
    tensor = torch.empty(shape, dtype=dtype)
    view = memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    done = 0
    with path.open("rb", buffering=0) as file:
        while done < len(view):
            count = os.preadv(file.fileno(), [view[done:]], offset + done)
            if count == 0:
                raise ValueError(f"{path} has become shorter while it was read: fetch it again")
            done += count
    return tensor
