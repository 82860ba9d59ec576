"""`bigvivit replay`, and programs under other settings."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from bigvivit.forecast.alloc_conf import AllocatorSettings, parse_conf
from bigvivit.forecast.allocator import Allocator
from bigvivit.forecast.recording import Event, Trace
from bigvivit.forecast.replay import compare, compare_orders, what_if
from bigvivit.forecast.simulate import simulate
from bigvivit.forecast.snapshot import read_trace
from bigvivit.units import MiB
from tests.forecast.snapshots import dump, load, snapshot
from tests.launching import BIN, ROOT


def replay(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in (BIN / "bigvivit", "replay", *words)],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "COLUMNS": "160", "PYTHONPATH": str(ROOT)},
    )


@pytest.fixture
def published(shared: Callable[[str], Path]) -> Path:
    return shared("traces/cranberrii_memory_snapshot_ffe2e0c.jsonl.gz")


def test_a_snapshot_and_its_trace_say_the_same(published: Path, tmp_path: Path) -> None:
    header, events = load(published)
    path = dump(tmp_path / "snapshot.pickle", snapshot(header["final_segments"], events))
    answers = []
    for file in (published, path):
        done = replay(file, "--json", "--try-conf", "max_split_size_mb:512")
        assert done.returncode == 0, done.stderr
        answers.append(json.loads(done.stdout) | {"name": ""})
    assert answers[0] == answers[1]
    answer = answers[0]
    assert (answer["exact"], answer["segment_events"], answer["starts_midway"]) == (True, 152, True)
    recorded = sum(row[1] for row in header["initial_segments"]) + sum(row[2] for row in events if row[0] == "S")
    assert answer["recorded"]["peak_reserved_bytes"] == answer["recorded_peak_reserved_bytes"] == recorded
    assert recorded - answer["recorded"]["allocated_at_peak_bytes"] == answer["recorded"]["fragmentation_bytes"]
    assert [row["settings"] for row in answer["others"]] == [
        *("default", "expandable_segments:True", "max_split_size_mb:128", "roundup_power2_divisions:8"),
        "max_split_size_mb:512",
    ]


def test_the_table(published: Path) -> None:
    done = replay(published)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if "│" in line]
    assert rows[0][0] == "as recorded"
    assert rows[2][0] == "expandable_segments:True"
    assert {len(row) for row in rows} == {7}
    text = " ".join(done.stdout.split())
    assert "put 3505 of 3505 blocks at their recorded addresses" in text
    assert "taking of cached blocks of one size the one at the lowest address." in text
    assert "gave it back as recorded, all 152 times, and reserved as much at the peak." in text
    assert "The file does not say its settings; taken: default." in done.stdout
    assert "start on an empty device, and first allocate what was there" in done.stdout


def test_settings_that_were_not_in_force_are_seen(published: Path) -> None:
    done = replay(published, "--conf", "roundup_power2_divisions:1,large_segment_size_mb:40")
    assert done.returncode == 0, done.stderr
    assert "The model left the recording after" in " ".join(done.stdout.split())
    assert "Give them with --conf." in " ".join(done.stdout.split())


def test_a_smaller_device(shared: Callable[[str], Path]) -> None:
    """Less than was recorded is for the settings tried; the first row stays what was recorded."""
    path = shared("traces/silmont2000_mem_snapshot_b61be40.jsonl.gz")
    done = replay(path, "--json", "--capacity", "3500 MiB")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["exact"]
    default, expandable = answer["others"][:2]
    assert default["out_of_memory"]["requested_bytes"] == 512 * MiB
    assert default["out_of_memory"]["limit_bytes"] == 3500 * MiB
    assert default["flushes"] == 1
    assert expandable["out_of_memory"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing.pickle"], "error: missing.pickle cannot be read: No such file or directory\n"),
        (["README.md"], "error: README.md is no memory snapshot"),
        (["x", "--conf", "max_split_size_mb:1"], "error: allocator setting 'max_split_size_mb:1': must be"),
        (["x", "--try-conf", "no"], "error: allocator setting 'no': has no value"),
        (["x", "--capacity", "much"], "error: capacity=much: 'much' is no amount of memory; write 22.5GiB"),
    ],
)
def test_errors_are_one_line(words: list[str], message: str) -> None:
    done = replay(*words)
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_simulate_stops_at_what_cannot_be_had() -> None:
    """A forecast's stream: ids, sizes, streams; tensors without bytes take nothing."""
    events = [
        *[("a", 1, 0, 0), ("a", 2, 30 * MiB, 0), ("f", 1, 0, 0), ("a", 3, 30 * MiB, 7), ("f", 2, 0, 0)],
        *[("a", 4, 31 * MiB, 0), ("a", 5, 40 * MiB, 0), ("a", 6, 1, 0)],
    ]
    run = simulate(events, Allocator(capacity_bytes=64 * MiB))
    assert run.out_of_memory is not None
    assert (run.out_of_memory_event, run.out_of_memory.requested_bytes) == (6, 40 * MiB)
    assert (run.peak_reserved_bytes, run.peak_allocated_bytes) == (62 * MiB, 62 * MiB)
    assert run.flushes == 2
    with pytest.raises(KeyError):
        simulate([("f", 1, 0, 0)], Allocator())


def test_fragmentation_is_what_was_reserved_and_not_used() -> None:
    run = simulate([("a", 1, 12 * MiB, 0), ("f", 1, 0, 0), ("a", 2, 13 * MiB, 0)], Allocator())
    assert run.peak_reserved_bytes == 26 * MiB
    assert run.allocated_at_peak_bytes == 14 * MiB  # 1 MiB is left of a segment, too little to split
    assert run.requested_at_peak_bytes == 13 * MiB
    assert run.fragmentation_bytes == 12 * MiB
    assert run.fragmentation_cost_bytes == 12 * MiB


def test_what_was_there_before_is_allocated_first(published: Path) -> None:
    trace = read_trace(published)
    run = what_if(trace, AllocatorSettings(), None)
    assert run.peak_allocated_bytes > sum(size for part in trace.initial for _, size, _ in part.live)


def test_deferred_frees_cost_memory() -> None:
    """The same program with and without a second stream on a block that is freed."""
    block = [Event("a", 1 << 40, 32 * MiB, 0), Event("r", 1 << 40, 32 * MiB, 0)]
    later, done = Event("a", 1 << 41, 32 * MiB, 0), Event("f", 1 << 40, 32 * MiB, 0)
    for events, peak in (([*block, done, later], 32), ([*block, later, done], 64)):
        trace = Trace("program", (), tuple(events), parse_conf(""), settings_known=True)
        assert what_if(trace, AllocatorSettings(), None).peak_reserved_bytes == peak * MiB


def odd_recording(seed: int) -> Trace:
    """Of an allocator that gives each block a segment of its own, at the lowest address that is free."""
    rng, events, live = random.Random(seed), [], {}
    for _ in range(300):
        if live and rng.random() < 0.5:
            place = rng.choice(list(live))
            size = live.pop(place)
            events += [Event(kind, place, size, 0) for kind in "rf"]
            if rng.random() < 0.5:
                events.append(Event("s", place, 20 * MiB, 0))
            else:
                live[place] = size  # the segment is kept, and its block taken again
                events.append(Event("a", place, size, 0))
        else:
            place = next(number * 64 * MiB for number in range(1, 999) if number * 64 * MiB not in live)
            live[place] = rng.choice([2, 5, 9]) * MiB
            events += [Event("S", place, 20 * MiB, 0), Event("a", place, live[place], 0)]
    return Trace(f"odd {seed}", (), tuple(events), AllocatorSettings(), settings_known=True)


def test_a_capacity_reaches_the_recorded_run(shared: Callable[[str], Path]) -> None:
    """With more memory than the least that explains a flush, the device was not full: the program emptied the cache."""
    path = shared("traces/HugePandaCoder_my_snapshot_0072096.jsonl.gz")
    found = []
    for words in ([], ["--capacity", "40 GiB"]):
        done = replay(path, "--json", *words)
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        found.append((answer["exact"], answer["recorded"]["flushes"], answer["times_emptied"]))
    assert found == [(True, 1, 1), (True, 0, 2)]


def test_a_peak_is_described_at_its_fullest() -> None:
    """One segment, reserved once, filled later."""
    events = [("a", 1, 2 * MiB, 0), ("f", 1, 0, 0), ("a", 2, 9 * MiB, 0), ("a", 3, 9 * MiB, 0), ("f", 2, 0, 0)]
    run = simulate(events, Allocator())
    assert (run.peak_reserved_bytes, run.allocated_at_peak_bytes) == (20 * MiB, 18 * MiB)
    assert run.requested_at_peak_bytes == 18 * MiB


def test_the_order_of_the_recorded_torch_is_found() -> None:
    """Two cached segments of one size: torch 2.14 takes the older one, before that it was the lower one."""
    high, low, size = 1 << 41, 1 << 40, 12 * MiB
    made = [Event(kind, place, size, 0) for place in (high, low) for kind in "Sa"]
    freed = [Event(kind, place, size, 0) for place in (high, low) for kind in "rf"]
    for place, newer in ((low, False), (high, True)):
        events = (*made, *freed, Event("a", place, size, 0))
        found, oldest = compare_orders(Trace("program", (), events, AllocatorSettings(), settings_known=True))
        assert (oldest, found.blocks_matching) == (newer, 3)


def test_frees_that_a_flush_waits_for_come_after_the_request() -> None:
    """A block that another stream used is free when the device is full and PyTorch waits for it: until then the request
    could not have it. Had it been free before, no memory would have been asked for."""
    old, new = 1 << 40, 1 << 41
    events = [
        *(Event("S", old, 40 * MiB, 0), Event("a", old, 40 * MiB, 0), Event("r", old, 40 * MiB, 0)),
        *(Event("f", old, 40 * MiB, 0), Event("s", old, 40 * MiB, 0)),
        *(Event("S", new, 40 * MiB, 0), Event("a", new, 40 * MiB, 0)),
    ]
    between = (*events[:3], Event("S", new, 2 * MiB, 0), Event("a", new, 512, 0), *events[3:])
    moved = tuple(
        event._replace(address=1 << 42) if index > 4 and event.address == new else event
        for index, event in enumerate(between)
    )
    trace = Trace("program", (), moved, AllocatorSettings(), settings_known=True)
    found = compare(trace)
    assert found.flushes.least_bytes == 42 * MiB
    assert (found.exact, found.blocks_matching, found.run.flushes) == (True, 3, 1)


def test_a_recording_that_the_model_leaves_is_replayed_to_its_end() -> None:
    """With no address given to two segments at once."""
    found = [compare(odd_recording(seed)) for seed in range(20)]
    assert not any(each.exact for each in found)
    assert all(each.run.out_of_memory is None and not each.run.failed for each in found)
