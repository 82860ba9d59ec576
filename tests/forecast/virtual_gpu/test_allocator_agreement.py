"""Our model of the caching allocator against PyTorch's own on a virtual GPU: every block, segment and flush."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version

import pytest

from bigvivit.forecast.alloc_conf import AllocatorSettings, parse_conf
from bigvivit.forecast.allocator import Allocator, OutOfMemory, oldest_segment_first
from bigvivit.forecast.blocks import Block
from bigvivit.forecast.hardware import find_accelerator
from bigvivit.forecast.overhead import context
from bigvivit.forecast.virtual_gpu import virtual_gpu
from bigvivit.units import GiB, MiB
from tests.forecast.virtual_gpu.programs import Operation, Recorded, random_program, run_program

CASES = [
    pytest.param("", 1.0, 40 * GiB, id="default"),
    pytest.param("expandable_segments:True", 1.0, 1300 * MiB, id="expandable"),
    pytest.param("max_split_size_mb:30", 1.0, 1500 * MiB, id="max_split", marks=pytest.mark.slow),
    pytest.param(
        "garbage_collection_threshold:0.6,max_split_size_mb:40",
        *(0.02, 40 * GiB),
        id="garbage_collection",
        marks=pytest.mark.slow,
    ),
    pytest.param("", 1.0, 1100 * MiB, id="out_of_memory"),
    pytest.param(
        "roundup_power2_divisions:4,large_segment_size_mb:64", 1.0, 40 * GiB, id="rounding", marks=pytest.mark.slow
    ),
]


def reservations(recorded: Recorded, settings: AllocatorSettings, memory: int) -> Callable[[int], int]:
    """The addresses that the driver gave: of segments, or of the range that each pool of expandable ones began."""
    made = [address for kind, address, _ in recorded.segments if kind == "S"]
    if settings.expandable_segments:
        made = []
        for kind, address, _ in recorded.segments:
            if kind == "M" and not any(0 <= address - start < memory * 9 // 8 for start in made):
                made.append(address)
    addresses = iter(made)
    return lambda size: next(addresses)


def replay(operations: list[Operation], recorded: Recorded, settings: AllocatorSettings, memory: int) -> Recorded:
    """The program through our model."""
    taken = context(find_accelerator("A100 80GB")).expected_bytes
    allocator = Allocator(
        settings,
        capacity_bytes=memory - taken,
        device_bytes=memory,
        reserve=reservations(recorded, settings, memory),
        oldest_segment_first=oldest_segment_first(version("torch")),
    )
    blocks: dict[int, Block] = {}
    addresses: list[int | None] = []
    for kind, number, size, stream in operations:
        if kind == "f":
            if number in blocks:
                allocator.free(blocks.pop(number))
            continue
        try:
            blocks[number] = allocator.malloc(size, stream)
            addresses.append(blocks[number].address)
        except OutOfMemory:
            addresses.append(None)
    return Recorded(
        addresses,
        [(event.kind, event.address, event.size) for event in allocator.log],
        allocator.allocated_bytes,
        allocator.reserved_bytes,
        allocator.peak_reserved_bytes,
        allocator.flushes,
    )


def compare(conf: str, fraction: float, memory: int, seed: int) -> Recorded:
    operations = random_program(seed, 3000, streams=2)
    with virtual_gpu("A100 80GB", memory_bytes=memory) as gpu:
        recorded = gpu.call(run_program, operations, conf, fraction)
    settings = replace(parse_conf(conf) if conf else AllocatorSettings(), per_process_memory_fraction=fraction)
    model = replay(operations, recorded, settings, memory)
    assert model.addresses == recorded.addresses
    assert model == recorded
    return recorded


@pytest.mark.parametrize(("conf", "fraction", "memory"), CASES)
@pytest.mark.usefixtures("library")
def test_the_model_is_the_allocator(conf: str, fraction: float, memory: int, request: pytest.FixtureRequest) -> None:
    recorded = compare(conf, fraction, memory, seed=2)
    if "out_of_memory" in request.node.name:  # the case is there for these
        assert recorded.flushes > 0
        assert None in recorded.addresses


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 15))
@pytest.mark.parametrize(("conf", "fraction", "memory"), CASES)
@pytest.mark.usefixtures("library")
def test_the_model_is_the_allocator_for_any_program(conf: str, fraction: float, memory: int, seed: int) -> None:
    compare(conf, fraction, memory, seed)
