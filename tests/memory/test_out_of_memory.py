"""Telling it apart, and letting go of what was held."""

from __future__ import annotations

import errno
import os
import weakref

import pytest
import torch

from bigvivit.memory.measure import Peak, measure_data
from bigvivit.memory.out_of_memory import Shortage, is_out_of_memory, measure_shortage
from bigvivit.units import MiB

CPU = torch.device("cpu")


def test_what_really_is_raised() -> None:
    with pytest.raises(RuntimeError) as torchs:
        torch.empty(1 << 60, dtype=torch.uint8)
    with pytest.raises(MemoryError) as pythons:
        bytearray(1 << 60)
    assert is_out_of_memory(torchs.value)
    assert is_out_of_memory(pythons.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert is_out_of_memory(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert is_out_of_memory(RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"))
    wrapped = ValueError("a worker failed")
    wrapped.__cause__ = torchs.value
    assert is_out_of_memory(wrapped)


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2 shapes"), KeyError("out of memory"), OSError(28, "full")]
)
def test_what_is_something_else(error: Exception) -> None:
    assert not is_out_of_memory(error)


def fail(size: int) -> None:
    held = torch.ones(size, dtype=torch.uint8)
    watched.append(weakref.ref(held))
    circle: list[object] = [held]
    circle.append(circle)
    try:
        torch.empty(1 << 60, dtype=torch.uint8)
    except RuntimeError as error:
        raise RuntimeError("out of memory in a step") from error


watched: list[weakref.ref[torch.Tensor]] = []


def test_what_the_failed_call_held_is_measured_and_let_go() -> None:
    before = measure_data()
    with pytest.raises(RuntimeError) as caught:
        fail(128 * MiB)
    assert watched[-1]() is not None
    shortage = measure_shortage(caught.value, CPU)
    assert watched[-1]() is None
    assert measure_data() < before + 32 * MiB
    assert shortage.message == "out of memory in a step"
    assert shortage.limit_bytes is None


def test_holes_are_taken_off_the_room() -> None:
    def usable(tensors: int, holes: int, held: Peak | None = None) -> int:
        return Shortage("", "", held or Peak(1), None, tensors, holes, 1000).usable_bytes

    assert usable(900, 0) == 666  # a third, however few there were
    assert usable(400, 400) == 500  # a half, as there were
    assert usable(600, 200, Peak(1, 600, 800)) == 1000  # CUDA's allocator is modelled, holes and all
