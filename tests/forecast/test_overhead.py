"""What lies outside the allocator."""

from __future__ import annotations

import pytest

from bigvivit.config import ConfigError
from bigvivit.forecast.accelerators import ACCELERATORS, Accelerator
from bigvivit.forecast.hardware import accelerator_by_hand, find_accelerator
from bigvivit.forecast.overhead import capacity, forecast_overhead
from bigvivit.units import GiB, MiB


@pytest.mark.parametrize("row", ACCELERATORS, ids=lambda row: row.name)
def test_every_part_has_a_range_and_a_source(row: Accelerator) -> None:
    overhead = forecast_overhead(row, ranks=8, display=True)
    for part in overhead.parts:
        assert 0 <= part.low_bytes <= part.expected_bytes <= part.high_bytes
        assert len(part.source) > 15
    low, expected, high = overhead.outside()
    assert low < expected < high < row.memory_bytes
    worst, likely, best = capacity(row, overhead)
    assert (worst, likely, best) == (row.memory_bytes - high, row.memory_bytes - expected, row.memory_bytes - low)


def test_the_published_numbers() -> None:
    """Values as the cited threads give them."""
    assert forecast_overhead(find_accelerator("3090")).outside()[0] == 287_047_680  # pytorch/pytorch#86509
    workspace = forecast_overhead(find_accelerator("A100 40GB")).parts[1]
    assert workspace.inside
    assert {workspace.low_bytes, workspace.expected_bytes, workspace.high_bytes} == {8_519_680}
    assert forecast_overhead(find_accelerator("H100")).parts[1].expected_bytes == 32 * MiB
    for ranks in (1, 2):
        nccl = [
            part for part in forecast_overhead(find_accelerator("A100 40GB"), ranks=ranks).parts if "comm" in part.name
        ]
        assert [part.expected_bytes for part in nccl] == [688 * MiB] * (ranks - 1)  # NVIDIA/nccl#964


def test_what_is_inside_is_not_taken_twice() -> None:
    overhead = forecast_overhead(find_accelerator("H100"))
    assert sum(overhead.outside()) + sum(overhead.workspaces()) == sum(
        part.low_bytes + part.expected_bytes + part.high_bytes for part in overhead.parts
    )


def test_communicators_and_a_monitor_add_up() -> None:
    card = find_accelerator("2080 Ti")
    alone = forecast_overhead(card).outside()
    both = [forecast_overhead(card, ranks=8, communicators=count).outside() for count in (1, 2)]
    assert [b - a for a, b in zip(alone, both[0], strict=True)] == [b - a for a, b in zip(*both, strict=True)]
    assert forecast_overhead(card, display=True).outside()[2] - alone[2] == GiB


def test_the_difference_is_explained_by_size() -> None:
    lines = forecast_overhead(find_accelerator("2080 Ti"), ranks=8).explain()
    assert lines[0].startswith("collectives, 1 communicator: 256 MiB (32 MiB to 1.6 GiB), outside the allocator; ")
    assert "no measurement found" in lines[0]
    assert lines[-1].startswith("cuBLAS workspace, per thread: 8.12 MiB (8.12 MiB to 8.12 MiB), inside")


def test_errors() -> None:
    with pytest.raises(ConfigError, match="ranks=0"):
        forecast_overhead(find_accelerator("T4"), ranks=0)
    card = accelerator_by_hand(GiB)
    with pytest.raises(ConfigError, match="1 GiB of given by hand"):
        capacity(card, forecast_overhead(card))
