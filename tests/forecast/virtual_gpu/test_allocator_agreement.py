"""Our model of the caching allocator against PyTorch's own on a virtual GPU: every block, segment and flush."""

from __future__ import annotations

import pytest

from bigvivit.units import GiB, MiB
from tests.forecast.virtual_gpu.agreement import Recorded, run_both

CASES = [
    pytest.param("", 1.0, 40 * GiB, False, id="default"),
    pytest.param("expandable_segments:True", 1.0, 1300 * MiB, False, id="expandable"),
    pytest.param("max_split_size_mb:30", 1.0, 1500 * MiB, False, id="max_split", marks=pytest.mark.slow),
    pytest.param(
        "garbage_collection_threshold:0.6,max_split_size_mb:40",
        *(0.02, 40 * GiB, False),
        id="garbage_collection",
        marks=pytest.mark.slow,
    ),
    pytest.param("", 1.0, 1100 * MiB, False, id="out_of_memory"),
    pytest.param(
        "roundup_power2_divisions:4,large_segment_size_mb:64",
        *(1.0, 40 * GiB, False),
        id="rounding",
        marks=pytest.mark.slow,
    ),
    pytest.param("", 1.0, 1100 * MiB, True, id="deferred"),
    pytest.param("expandable_segments:True", 1.0, 1100 * MiB, True, id="deferred_expandable", marks=pytest.mark.slow),
    pytest.param("max_split_size_mb:30", 1.0, 1100 * MiB, True, id="deferred_max_split", marks=pytest.mark.slow),
    pytest.param(
        "garbage_collection_threshold:0.5", 0.02, 40 * GiB, True, id="deferred_collection", marks=pytest.mark.slow
    ),
]


def compare(conf: str, fraction: float, memory: int, defers: bool, seed: int) -> Recorded:
    recorded, model = run_both(conf, fraction, memory, seed, defers=defers)
    assert model.addresses == recorded.addresses
    assert model == recorded
    return recorded


@pytest.mark.parametrize(("conf", "fraction", "memory", "defers"), CASES)
@pytest.mark.usefixtures("library")
def test_the_model_is_the_allocator(
    conf: str, fraction: float, memory: int, defers: bool, request: pytest.FixtureRequest
) -> None:
    recorded = compare(conf, fraction, memory, defers, seed=2)
    if "out_of_memory" in request.node.name:  # the case is there for these
        assert recorded.flushes > 0
        assert None in recorded.addresses


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 15))
@pytest.mark.parametrize(("conf", "fraction", "memory", "defers"), CASES)
@pytest.mark.usefixtures("library")
def test_the_model_is_the_allocator_for_any_program(
    conf: str, fraction: float, memory: int, defers: bool, seed: int
) -> None:
    compare(conf, fraction, memory, defers, seed)
