"""From rows to constants, and to a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bigvivit.calibrate.calibration import read, write
from bigvivit.calibrate.constants import distil, errors
from bigvivit.calibrate.journal import Journal
from bigvivit.calibrate.page import write_page
from bigvivit.calibrate.rows import Row, list_rows
from bigvivit.commands.calibrate import SECONDS
from bigvivit.units import MiB

IDENTITY = {
    "device": "cuda", "card": "NVIDIA L4", "evidence": "measured", "torch": "2.14.1", "cuda": "13.0",
    "driver": "580.65", "capability": 89, "memory_bytes": 22 << 30, "cores": 8,
}  # fmt: skip


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "rows.jsonl", IDENTITY)


def add(journal: Journal, group: str, name: str, side: str = "device", **found: Any) -> None:
    evidence = "measured" if side == "device" else side
    row = {"key": f"{group}: {name}", "group": group, "name": name, "side": side, "evidence": evidence}
    journal.add({**row, "took_seconds": 1.0, **found})


def test_the_context_is_this_process_s_own(journal: Journal) -> None:
    """What the driver counts has other programs in it: on an H100 that others used it came to 3.3 GiB."""
    add(journal, "facts", "context", context_bytes=300 * MiB, others_bytes=50 * MiB)
    assert distil(journal).context_bytes is None  # nobody told processes apart after steps
    for number, outside in enumerate((340, None, 320, 350, 330)):
        size = None if outside is None else outside * MiB
        add(journal, "memory", str(number), outside_bytes=size)
    add(journal, "memory", "x", "virtual", outside_bytes=900 * MiB)
    assert distil(journal).context_bytes == (300 * MiB, 330 * MiB, 350 * MiB)


def test_what_is_missing_is_none_and_what_failed_too(journal: Journal, tmp_path: Path) -> None:
    add(journal, "facts", "context", failed="no answer")
    add(journal, "rates", "link", "device", to_gpu_pinned_per_second=25e9, memory_per_second=250e9)
    add(journal, "rates", "products", size=8192, bf16_per_second=80e12, fp32_per_second=20e12)
    add(journal, "facts", "workspaces", product_fp32_kept_bytes=9, convolution_bf16_scratch_bytes=3,
        convolution_fp32_scratch_bytes=5, norm_scratch_bytes=7)  # fmt: skip
    found = distil(journal)
    assert (found.context_bytes, found.disk_bandwidth) == (None, None)
    assert (found.host_bandwidth, found.bandwidth, found.rates) == (25e9, 250e9, {"bf16": 80e12, "fp32": 20e12})
    assert (found.workspace_bytes, found.scratch_bytes) == (9, 5)
    assert read(write(found, tmp_path / "calibration.json")) == found


def test_errors_are_of_what_was_measured(journal: Journal) -> None:
    add(journal, "memory", "a", allocated_bytes=100, reserved_bytes=200)
    add(journal, "memory", "a", "virtual", allocated_bytes=100, reserved_bytes=220)
    add(journal, "memory", "a", "forecast", allocated_bytes=90, reserved_bytes=200)
    add(journal, "memory", "b", failed="out of memory")
    (row,) = errors(journal)
    assert row["virtual_reserved_error"] == pytest.approx(0.1)
    assert row["forecast_allocated_error"] == pytest.approx(-0.1)
    assert row["virtual_allocated_error"] == row["forecast_reserved_error"] == 0


def test_the_report_says_what_failed_and_what_is_open(journal: Journal, tmp_path: Path) -> None:
    add(journal, "memory", "a", allocated_bytes=100 * MiB, reserved_bytes=200 * MiB, replay="exact")
    add(journal, "memory", "a", "forecast", allocated_bytes=90 * MiB, reserved_bytes=200 * MiB)
    add(journal, "memory", "b", failed="CUDA out of memory")
    add(journal, "capacity", "c", frames=64, beyond=True)
    rows = [Row("times", "late", 1.0, {"device": dict})]
    paths = write_page(journal, rows, distil(journal), tmp_path, ["No virtual card stands beside it: no compiler"])
    page = paths[0].read_text()
    for line in (
        "| a | 100 MiB | -10.00% | 200 MiB | +0.00% | exact |",
        "| memory: b | measured | CUDA out of memory |",
        "| c | 64+ |  |",
        "No virtual card stands beside it: no compiler",
        "Rows that not all have answered who could: 1 of times.",
    ):
        assert line in page, line
    record = json.loads(paths[1].read_text())
    assert [row["evidence"] for row in record["rows"]] == ["measured", "forecast", "measured", "measured"]
    assert paths[2].stat().st_size > 0


def test_rows_have_names_of_their_own_and_virtual_cards_no_twin(tmp_path: Path) -> None:
    for towers in ((), ("vit-demo",), ("vit-b", "vit-l", "vit-g")):
        rows = list_rows(IDENTITY, towers, tmp_path)
        assert len({row.key for row in rows}) == len(rows)
        assert any("virtual" in row.jobs for row in rows)
        assert all("device" in row.jobs for row in rows)
    alone = list_rows({**IDENTITY, "evidence": "virtual"}, (), tmp_path)
    assert not any("virtual" in row.jobs for row in alone)
    for device, seconds in SECONDS.items():
        assert sum(row.seconds for row in list_rows({**IDENTITY, "device": device}, (), tmp_path)) <= seconds
    recordings = [row.jobs["device"].args[1] for row in list_rows(IDENTITY, (), tmp_path) if row.group == "memory"]  # type: ignore[attr-defined]
    assert len(set(recordings)) == len(recordings)
