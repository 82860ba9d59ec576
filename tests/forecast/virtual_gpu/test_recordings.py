"""Programs on virtual GPUs against published recordings of real ones: the same allocations and frees, one by one."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
from tests.forecast.virtual_gpu import recorded
from tests.forecast.virtual_gpu.versions import takes_workspaces


def read_recording(path: Path) -> list[tuple[str, int]]:
    """As `recorded.record_forward` gives its own."""
    with gzip.open(path, "rt") as file:
        events = [json.loads(line) for line in file][1:]
    numbers: dict[int, int] = {}
    found: list[tuple[str, int]] = []
    allocated = 0
    for kind, address, size, *_ in events:
        if kind == "a":
            numbers[address] = allocated
            allocated += 1
            found.append(("+", size))
        elif kind == "f":
            found.append(("-", numbers.pop(address)))
    return found


@takes_workspaces
@pytest.mark.parametrize(
    ("autocast", "name"),
    [
        (False, "silmont2000_memory_forward_fp32_128_769df2d"),
        (True, "silmont2000_memory_forward_bf16_128_d9ecf8b"),
    ],
)
def test_a_forward_pass_is_that_of_a_real_gpu(
    autocast: bool, name: str, shared: Callable[[str], Path], card: Callable[[str], Any]
) -> None:
    wanted = read_recording(shared(f"traces/{name}.jsonl.gz"))
    found = card("A100 80GB").call(recorded.record_forward, autocast)
    assert sum(kind == "+" for kind, _ in wanted) > 600
    # What autocast had cast is released at the end, in the order of a hash table of addresses.
    last = len(wanted) if not autocast else max(at for at, (kind, _) in enumerate(wanted) if kind == "+") + 1
    assert found[:last] == wanted[:last]
    assert sorted(found[last:]) == sorted(wanted[last:])
