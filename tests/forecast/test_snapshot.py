"""Reading memory snapshots: what they hold, and that nothing in them is run."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import sqlite3
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bigvivit.config import ConfigError
from bigvivit.forecast.alloc_conf import AllocatorSettings, parse_conf
from bigvivit.forecast.replay import compare
from bigvivit.forecast.snapshot import read_trace
from bigvivit.units import MiB
from tests.forecast.snapshots import dump, load, snapshot
from tests.forecast.test_allocator import TRACES

BASE = 1 << 40
SMALL = [[BASE, 2 * MiB, 0, "small", 0, [[1024, "active_allocated", 1000], [2 * MiB - 1024, "inactive", 0]]]]
EVENTS = [("S", BASE, 2 * MiB, 0), ("a", BASE, 1000, 0)]


@pytest.mark.parametrize("name", TRACES)
def test_a_snapshot_gives_back_the_state_before_it(name: str, shared: Callable[[str], Path], tmp_path: Path) -> None:
    """The initial state that came with the trace is found again from the end, and the replay is exact. Sizes may be
    more than those of the header, where the first allocation behind a block shows its end."""
    header, events = load(shared(f"traces/{name}"))
    path = dump(tmp_path / "snapshot.pickle", snapshot(header["final_segments"], events, header["conf"] or None))
    trace = read_trace(path)
    found = [
        [
            *(part.address, part.size, part.stream, "small" if part.small else "large"),
            [[address - part.address, requested] for address, _, requested in part.live],
        ]
        for part in trace.initial
    ]
    wanted = sorted(header["initial_segments"] or [])
    assert found == [[*row[:4], [[offset, requested] for offset, _, requested in row[4]]] for row in wanted]
    assert trace.initial == read_trace(shared(f"traces/{name}")).initial
    assert trace.settings == AllocatorSettings(expandable_segments=header["expandable"])
    assert compare(trace).exact


def test_an_expandable_recording_that_starts_midway(shared: Callable[[str], Path], tmp_path: Path) -> None:
    """Cut anywhere, the rest is still exact: the state at the cut is found from the end."""
    header, events = load(shared("traces/Constructor-Sun_memory_snapshot_b5ef67c_dev2.jsonl.gz"))
    for cut in (1, 100, 333, 700, len(events) - 1):
        data = snapshot(header["final_segments"], events[cut:], "expandable_segments:True")
        found = compare(read_trace(dump(tmp_path / "snapshot.pickle", data)))
        assert found.exact
        assert found.blocks_matching == found.blocks


def test_settings_are_those_of_the_file_or_given(tmp_path: Path) -> None:
    path = dump(tmp_path / "with.pickle", snapshot(SMALL, EVENTS, "max_split_size_mb:64"))
    assert read_trace(path).settings == parse_conf("max_split_size_mb:64")
    assert read_trace(path).settings_known
    path = dump(tmp_path / "without.pickle", snapshot(SMALL, EVENTS))
    assert not read_trace(path).settings_known
    given = parse_conf("garbage_collection_threshold:0.5")
    assert read_trace(path, conf=given).settings == given


def test_settings_that_occur_elsewhere_in_the_file(tmp_path: Path) -> None:
    """The empty text is one object in Python, which PyTorch's events hold too; other texts are refused, not ignored."""
    for conf in ("", "max_split_size_mb:64"):
        data = snapshot(SMALL, EVENTS, conf)
        data["device_traces"][0][0]["user_metadata"] = conf
        path = dump(tmp_path / "again.pickle", data)
        if conf:
            with pytest.raises(ConfigError, match="its PYTORCH_CUDA_ALLOC_CONF is no text of its own"):
                read_trace(path)
        else:
            assert (read_trace(path).settings, read_trace(path).settings_known) == (AllocatorSettings(), True)


def test_older_snapshots(tmp_path: Path) -> None:
    """Without addresses of blocks, requested sizes, expandable segments, settings and pools."""
    data = snapshot(SMALL, EVENTS)
    del data["allocator_settings"]
    for part in data["segments"]:
        del part["is_expandable"], part["segment_pool_id"]
        for block in part["blocks"]:
            del block["address"]
    for item in data["device_traces"][0]:
        del item["pool_id"]
    assert compare(read_trace(dump(tmp_path / "old.pickle", data))).exact


def test_a_free_that_waits_for_another_stream(tmp_path: Path) -> None:
    """The block is given to nobody between the request and its completion. From the format; no trace has it."""
    second = BASE + 20 * MiB
    events = [
        *[("S", BASE, 20 * MiB, 0), ("a", BASE, 20 * MiB, 0), ("r", BASE, 20 * MiB, 0)],
        *[("S", second, 20 * MiB, 0), ("a", second, 20 * MiB, 0), ("f", BASE, 20 * MiB, 0), ("a", BASE, 20 * MiB, 0)],
    ]
    final = [[at, 20 * MiB, 0, "large", 0, [[20 * MiB, "active_allocated", 20 * MiB]]] for at in (BASE, second)]
    found = compare(read_trace(dump(tmp_path / "waits.pickle", snapshot(final, events))))
    assert found.exact
    assert found.blocks_matching == 3
    assert found.run.peak_allocated_bytes == 40 * MiB


def test_a_failed_request_says_how_much_there_was(tmp_path: Path) -> None:
    """20 MiB reserved, 8 free: the replay fails where the recording did, and goes on. No trace has it."""
    after = BASE + 32 * MiB
    events = [
        *[("S", BASE, 20 * MiB, 0), ("a", BASE, 20 * MiB, 0), ("o", 8 * MiB, 12 * MiB, 0)],
        *[("S", after, 2 * MiB, 0), ("a", after, 512, 0)],
    ]
    final = [
        [BASE, 20 * MiB, 0, "large", 0, [[20 * MiB, "active_allocated", 20 * MiB]]],
        [after, 2 * MiB, 0, "small", 0, [[512, "active_allocated", 512], [2 * MiB - 512, "inactive", 0]]],
    ]
    found = compare(read_trace(dump(tmp_path / "failed.pickle", snapshot(final, events))))
    assert found.flushes.least_bytes == 28 * MiB
    assert (found.exact, found.run.failed, found.run.out_of_memory) == (True, 1, None)


# --- files that are none ---------------------------------------------------------------------------------------------


class Evil:
    """Unpickled by pickle.load, it would make a file."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def hostile(target: Path) -> dict[str, bytes]:
    """Pickles that run `touch target` in several ways, where pickle.load is used."""
    command = f"touch {target}"
    data = snapshot(SMALL, EVENTS)
    data["segments"][0]["frames"] = Evil(command)
    return {
        "reduce": pickle.dumps(Evil(command)),
        "inside": pickle.dumps(data),
        "protocol 0": pickle.dumps(Evil(command), protocol=0),
        "protocol 2": pickle.dumps(Evil(command), protocol=2),
        "instance": f"(S'{command}'\nios\nsystem\n.".encode(),
        "builtins": f"cbuiltins\neval\n(V__import__('os').system('{command}')\ntR.".encode(),
        "object": b"(cos\nsystem\nX" + struct.pack("<I", len(command)) + command.encode() + b"o.",
        "partial": pickle.dumps((__import__("functools").partial(os.system, command),)),
        "registry": b"\x80\x02\x82\x01.",
        "persistent": b"\x80\x02U\x01aQ.",
        "torch": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n.",
    }


@pytest.mark.parametrize("kind", hostile(Path("target")))
def test_nothing_in_the_file_is_run(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    path = tmp_path / "snapshot.pickle"
    path.write_bytes(hostile(target)[kind])
    with pytest.raises(ConfigError) as raised:
        read_trace(path)
    assert not target.exists()
    assert str(path) in str(raised.value)
    if kind not in ("registry", "persistent"):
        assert "which a memory snapshot never does: nothing of it was run" in str(raised.value)


def test_the_hostile_files_are_hostile(tmp_path: Path) -> None:
    """The same bytes in pickle.loads do run."""
    target = tmp_path / "target"
    for kind in ("reduce", "protocol 0", "instance", "builtins", "object"):
        pickle.load(io.BytesIO(hostile(target)[kind]))
        assert target.exists(), kind
        target.unlink()


def test_a_file_cut_short_anywhere(tmp_path: Path) -> None:
    whole, path = pickle.dumps(snapshot(SMALL, EVENTS)), tmp_path / "snapshot.pickle"
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(ConfigError, match="no memory snapshot, or cut short"):
            read_trace(path)
    path.write_bytes(whole)
    read_trace(path)


def test_a_file_changed_anywhere(tmp_path: Path) -> None:
    """Every byte but the one replaced: read, or refused in one message; never another exception."""
    whole, path = pickle.dumps(snapshot(SMALL, EVENTS)), tmp_path / "snapshot.pickle"
    refused = 0
    for position in range(len(whole)):
        for value in (0, 0x52, 0x63, 0xFF):
            path.write_bytes(whole[:position] + bytes([value]) + whole[position + 1 :])
            try:
                compare(read_trace(path))
            except ConfigError:
                refused += 1
    assert refused > len(whole)


@pytest.mark.parametrize(
    "data",
    [
        *(
            b"",
            b"no pickle at all",
            b"\x80\x04.",
            b"\x1f\x8b",
            b"\x1f\x8bxxxxxxxxxxxxxxxx",
            b"\x80\x05" + b"(" * 100000,
        ),
        b"\x80\x04]r\xff\xff\xff\x7f.",  # a memo of 16 GiB in nine bytes
        b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40),  # a terabyte of bytes
        b"\x80\x05\x96" + struct.pack("<Q", 1 << 40),
        b"\x80\x02" + b"]" * 50000 + b"a" * 49999 + b".",
        gzip.compress(b"[]\n"),
        gzip.compress(b'{"expandable": false}\n["a", 1]\n'),
        gzip.compress(b'{"expandable": false}\n["a", 1, "2", 0]\n'),
        gzip.compress(b'{"expandable": false}\n["f", 1099511627776, 512, 0]\n'),
        gzip.compress(b'{"expandable": false, "n_events": 3}\n["a", 1, 2, 0]\n'),
        gzip.compress(b'{"expandable": true}\n["M", 0, 1e30, 0]\n'),
        gzip.compress(b"[" * 100000),
    ],
)
def test_what_is_no_snapshot(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "snapshot.pickle"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"snapshot\.pickle (cannot be replayed|is no memory snapshot)"):
        read_trace(path)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_trace(tmp_path / "missing.pickle")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_trace(tmp_path)


def edited(**changes: Any) -> dict[str, Any]:
    return {**snapshot(SMALL, EVENTS), **changes}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "no dict with a list of `segments`"),
        (edited(segments=3), "no dict with a list of `segments`"),
        (edited(device_traces=None), "no `device_traces`"),
        (edited(device_traces=[[], []]), "holds no events: call .*_record_memory_history"),
        (edited(segments=[]), "its events do not lead to its final state"),
        (edited(segments=[{}]), "a segment is no dict with `blocks`"),
        (edited(device_traces=[[{"action": "alloc"}]]), "KeyError: 'addr'"),
        (snapshot(SMALL, [*EVENTS, ("a", BASE, 1000, 0)]), "do not lead to its final state|where one is"),
        (snapshot(SMALL, [*EVENTS, ("f", BASE, 1000, 0)]), "is freed but there"),
        (snapshot(SMALL, [("r", BASE, 1000, 0), ("r", BASE, 1000, 0)]), "twice"),
        (snapshot(SMALL, EVENTS, "max_split_size_mb:1"), "must be a whole number of MiB"),
    ],
)
def test_snapshots_that_contradict_themselves(data: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        read_trace(dump(tmp_path / "snapshot.pickle", data))


def test_private_pools_without_a_name_are_refused(tmp_path: Path) -> None:
    """Older recordings say of segments only that they are of a CUDA graph's pool, not of blocks."""
    data = snapshot(SMALL, EVENTS)
    data["segments"][0]["segment_pool_id"] = (1, 0)
    for event in data["device_traces"][0]:
        del event["pool_id"]
    with pytest.raises(ConfigError, match="events do not say whose they are: record it with a newer PyTorch"):
        read_trace(dump(tmp_path / "graphs.pickle", data))


def test_an_sqlite_database_is_named(tmp_path: Path) -> None:
    path = tmp_path / "snapshot.db"
    with sqlite3.connect(path) as base:
        base.execute("create table events (action text)")
    with pytest.raises(ConfigError, match="is an SQLite database, not a pickle: write the snapshot with"):
        read_trace(path)


def test_blocks_outside_every_segment_are_refused(tmp_path: Path) -> None:
    """As of programs that write events without the segments around them."""
    data = snapshot(SMALL, [*EVENTS, ("a", BASE + 8 * MiB, 1000, 0), ("f", BASE + 8 * MiB, 1000, 0)])
    with pytest.raises(ConfigError, match="a block of 1000 B at 0x10000800000, outside every segment"):
        read_trace(dump(tmp_path / "snapshot.pickle", data))


def test_several_devices(tmp_path: Path) -> None:
    data = snapshot(SMALL, EVENTS)
    data["device_traces"][1] = snapshot(SMALL, EVENTS)["device_traces"][0]
    path = dump(tmp_path / "two.pickle", data)
    with pytest.raises(ConfigError, match=r"devices \[0, 1\]: choose one, --device 0"):
        read_trace(path)
    assert compare(read_trace(path, device=0)).exact
    with pytest.raises(ConfigError, match="no events of device 2"):
        read_trace(path, device=2)


def test_a_published_trace_cut_short(shared: Callable[[str], Path], tmp_path: Path) -> None:
    whole = shared("traces/silmont2000_mem_snapshot_b61be40.jsonl.gz").read_bytes()
    path = tmp_path / "trace.jsonl.gz"
    for end in (3, 100, len(whole) - 9, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(ConfigError, match="cut short"):
            read_trace(path)


def test_the_message_of_a_contradiction_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl.gz"
    rows = [{"expandable": False, "initial_segments": [[BASE, 2 * MiB, 0, "small", [[0, 4 * MiB, 512]]]]}]
    path.write_bytes(gzip.compress("\n".join(json.dumps(row) for row in rows).encode()))
    with pytest.raises(ConfigError, match="overlaps another, or leaves its segment"):
        compare(read_trace(path))
