"""Memory of virtual GPUs as PyTorch sees it: what fits, what its error says, devices, streams, deferred frees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bigvivit.forecast.hardware import find_accelerator
from bigvivit.forecast.overhead import context
from bigvivit.forecast.virtual_gpu import virtual_gpu
from bigvivit.units import GiB, MiB
from tests.forecast.virtual_gpu import programs


@pytest.mark.usefixtures("library")
def test_out_of_memory_is_pytorchs_own_error() -> None:
    row = find_accelerator("T4")
    with virtual_gpu("T4") as gpu:
        fit, message, driver = gpu.call(programs.run_out_of_memory)
    room = row.memory_bytes - context(row).expected_bytes
    assert fit == room // GiB
    assert "CUDA out of memory. Tried to allocate 1024.00 MiB. GPU 0 has a total capacity of 14.56 GiB" in message
    assert f"this process has {(fit * GiB + context(row).expected_bytes) / GiB:.2f} GiB memory in use" in message
    assert f"{fit}.00 GiB is allocated by PyTorch" in message
    assert driver == fit * GiB + context(row).expected_bytes


def test_each_device_counts_for_itself(card: Callable[[str], Any]) -> None:
    (here, here_driver), (there, there_driver) = card("T4").call(programs.use_both_devices)
    assert (here, there) == (4 * MiB, 4 * MiB)
    least = context(find_accelerator("T4")).expected_bytes + 20 * MiB
    assert here_driver >= least
    assert there_driver >= least


def test_blocks_that_another_stream_uses_stay_taken(card: Callable[[str], Any]) -> None:
    assert card("T4").call(programs.defer_frees) == [60 * MiB, 30 * MiB]


def test_snapshots_are_recorded(card: Callable[[str], Any]) -> None:
    assert card("T4").call(programs.snapshot_kinds) >= {"alloc", "free_requested", "free_completed"}


@pytest.mark.usefixtures("library")
def test_what_is_offloaded_takes_no_memory_of_the_host() -> None:
    """A step that offloads 28 GiB can be planned on a laptop."""
    with virtual_gpu("T4") as gpu:
        resident, total, locked = gpu.call(programs.offload_to_pinned_memory)
    assert resident < 16 * MiB
    assert total == 0
    assert locked == 256 * MiB
