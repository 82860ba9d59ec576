"""Every lever of the plan under every engine, in both stages, alone, in pairs and together: the table of the bench."""

from __future__ import annotations

import pytest

from bench.lever_pairs import LEVERS, Entry, Lever, expect, judge, list_entries, run

BY_NAME: dict[str, Lever] = {lever.name: lever for lever in LEVERS}
TOGETHER = {
    1: ("recompute", "activations on host", "masters bf16"),
    2: ("recompute", "activations on host", "masters bf16", "tower on disk", "storage nf4", "layer by layer"),
}
FEW = 15
"""Of the pairs that train, every so many is walked by default; all are in the slow tests and in the report."""


def list_few(entries: list[Entry]) -> list[Entry]:
    """No lever, each by itself, all that is refused, and some of the pairs."""
    trained = [entry for entry in entries if expect(entry)[0] != "refused"]
    pairs = [entry for entry in trained if len(entry.levers) == 2]
    shift = sum(map(ord, entries[0].engine)) % FEW  # other pairs under other engines
    chosen = [entry for entry in trained if len(entry.levers) < 2] + pairs[shift::FEW]
    return [entry for entry in entries if entry in chosen or expect(entry)[0] == "refused"]


def check(entries: list[Entry]) -> None:
    base: dict[int, list[float]] = {}
    wrong = []
    for entry, found in zip(entries, run(entries), strict=True):
        if not entry.levers:
            assert not isinstance(found, str), found
            base[entry.stage] = found
        if fault := judge(entry, found, base[entry.stage]):
            wrong.append(f"stage {entry.stage}, {entry.names}: {fault}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["plain", "ddp", "zero1", "zero2", "zero3", "fsdp"])
def test_levers(engine: str) -> None:
    entries = list_few(list_entries(engine))
    together = [Entry(engine, stage, tuple(BY_NAME[name] for name in names)) for stage, names in TOGETHER.items()]
    check([*entries, *together])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["plain", "ddp", "zero1", "zero2", "zero3", "fsdp"])
def test_every_pair(engine: str) -> None:
    check(list_entries(engine))


def test_a_wrong_outcome_is_seen() -> None:
    base = [1.1, 0.9, 0.8, 0.6, 0.4]
    plain = {entry.names: entry for entry in list_entries("plain") if entry.stage == 2}
    assert judge(plain["recompute"], base, base) == ""
    assert "are 0.01 from" in judge(plain["recompute"], [1.1, 0.9, 0.8, 0.6, 0.41], base)
    assert "changed nothing" in judge(plain["storage nf4"], base, base)
    assert "learns nothing" in judge(plain["recompute"], [1.1] * 5, base)
    assert "refused: because" in judge(plain["recompute"], "because", base)
    assert "not refused" in judge(plain["optimizer on host"], base, base)
    assert "refused: no reason" in judge(plain["optimizer on host"], "no reason", base)
