"""Reading pickles of plain data as a stream: against Python's own unpickler, and how much stays in memory."""

from __future__ import annotations

import io
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bigvivit.config import ConfigError
from bigvivit.forecast.plain_pickle import FORGOTTEN, load
from bigvivit.forecast.snapshot import from_snapshot, read_trace
from bigvivit.units import MiB
from tests.forecast.snapshots import load as load_published
from tests.forecast.snapshots import snapshot
from tests.forecast.test_allocator import TRACES
from tests.forecast.test_snapshot import BASE, SMALL

KEYS = tuple(f"key {number}" for number in range(3000))


def invent(rng: random.Random, depth: int) -> Any:
    """Plain data of every kind and size of number, text and container. No list or dict occurs twice, and no list
    ends with texts, which may be references."""
    kind = rng.choice(["number", "text", "constant", *(["list", "dict", "tuple"] if depth else [])])
    if kind == "number":
        return rng.choice([rng.getrandbits(bits) * rng.choice([1, -1]) for bits in (7, 8, 15, 16, 31, 32, 63, 64, 900)])
    if kind == "text":
        return rng.choice("aß€𝄞") * rng.choice([0, 1, 100, 300])
    if kind == "constant":
        return rng.choice([None, True, False, 0.5, -1e300, ()])
    items = [invent(rng, depth - 1) for _ in range(rng.choice([0, 1, 2, 3, 4, 10]))]
    if kind == "list":
        return [*items, 0.5]
    return dict(zip(KEYS, items, strict=False)) if kind == "dict" else tuple(range(len(items)))


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_is_what_pickle_reads(protocol: int) -> None:
    """With containers beyond a pickler's thousand items, and a file and a text beyond what is read at once."""
    rng = random.Random(protocol)
    data = [
        *[invent(rng, 4) for _ in range(500)],
        *[dict.fromkeys(KEYS, 1), "long" * MiB, list(range(100_000)), "after"],
    ]
    whole = pickle.dumps(data, protocol=protocol)
    assert len(whole) > 4 * MiB
    texts = {letter * count for letter in "aß€𝄞" for count in (0, 1, 100, 300)}  # some are one object each time
    assert load(io.BytesIO(whole), {*KEYS, *texts}) == pickle.loads(whole)


def test_what_is_not_asked_for_is_dropped() -> None:
    frame = {"name": "forward", "line": 3}
    data = {"kept": 1, "dropped": [frame, frame], "again": [frame] * 2500, "word": "kept", "other": ["no word"] * 2}
    found = load(io.BytesIO(pickle.dumps(data)), ["kept", "again", "word", "other"])
    assert found.pop("other")[1] is FORGOTTEN
    assert found == {"kept": 1, "word": "kept", "again": [FORGOTTEN] * 3}  # once for each thousand


@pytest.mark.parametrize("data", [{"a"}, frozenset("a"), b"bytes", bytearray(2), print, 1j, 1 << 3000])
def test_other_data_is_refused(data: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"it holds [A-Z_0-9]+, which a memory snapshot never does: nothing of it was run"
    ):
        load(io.BytesIO(pickle.dumps([data])), [])


def with_stacks(data: dict[str, Any], depth: int, new: int) -> dict[str, Any]:
    """The same events with stacks of `depth` known frames each, behind `new` ones of their own in every second."""
    frames = [{"name": f"f{number}", "filename": "model.py", "line": number} for number in range(depth + 300)]
    for number, event in enumerate(event for events in data["device_traces"] for event in events):
        event["frames"] = frames[number % 300 : number % 300 + depth]
        if number % 2:
            event["frames"][:0] = [{"name": f"g{number}", "filename": f"{i}.py", "line": i} for i in range(new)]
    return data


@pytest.mark.parametrize("name", TRACES)
def test_stacks_change_nothing(name: str, shared: Callable[[str], Path], tmp_path: Path) -> None:
    """The trace is that of the whole dict, as Python's unpickler gives it."""
    header, events = load_published(shared(f"traces/{name}"))
    data = with_stacks(snapshot(header["final_segments"], events, header["conf"] or None), 20, 3)
    path = tmp_path / "snapshot.pickle"
    path.write_bytes(pickle.dumps(data))
    assert read_trace(path) == from_snapshot(pickle.loads(path.read_bytes()), path.name, None, None)


def heavy(path: Path) -> None:
    """8000 events, with stacks of 1000 frames and ten new ones."""
    rows = [("S", BASE, 2 * MiB, 0), *[(kind, BASE, 1000, 0) for kind in "arf" * 2666], ("a", BASE, 1000, 0)]
    path.write_bytes(pickle.dumps(with_stacks(snapshot(SMALL, rows), 1000, 10)))


MEASURE = """
import sys
from pathlib import Path
from bigvivit.forecast.snapshot import read_trace

def largest():
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024

before = largest()
assert len(read_trace(Path(sys.argv[1])).events) == 8000
print(largest() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_stacks_take_no_memory(tmp_path: Path) -> None:
    """Of a process of its own, since the most that this one had is already more."""
    path = tmp_path / "heavy.pickle"
    heavy(path)
    assert path.stat().st_size > 36 * MiB
    done = subprocess.run([sys.executable, "-c", MEASURE, path], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 16 * MiB


def test_a_file_with_stacks_cut_short_or_changed(tmp_path: Path) -> None:
    """One message each time, wherever it is."""
    path, rng = tmp_path / "snapshot.pickle", random.Random(1)
    rows = [("S", BASE, 2 * MiB, 0), *[(kind, BASE, 1000, 0) for kind in "arf" * 10], ("a", BASE, 1000, 0)]
    whole = pickle.dumps(with_stacks(snapshot(SMALL, rows), 100, 5))
    for end in rng.sample(range(len(whole)), 100):
        path.write_bytes(whole[:end])
        with pytest.raises(ConfigError, match="is no memory snapshot, or cut short"):
            read_trace(path)
    refused = 0
    for position in rng.sample(range(len(whole)), 300):
        path.write_bytes(whole[:position] + rng.randbytes(1) + whole[position + 1 :])
        try:
            read_trace(path)
        except ConfigError:
            refused += 1
    assert 0 < refused < 300
