"""The cards that a virtual GPU can show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bigvivit.config import ConfigError
from bigvivit.forecast.accelerators import ACCELERATORS
from bigvivit.forecast.hardware import find_accelerator
from bigvivit.forecast.overhead import context
from bigvivit.forecast.virtual_gpu import environment
from bigvivit.forecast.virtual_gpu.cards import PER_CAPABILITY, describe, find_card
from bigvivit.units import GiB, KiB, MiB
from tests.forecast.virtual_gpu import programs


def test_every_nvidia_card_is_described() -> None:
    for row in ACCELERATORS:
        assert (row.device is not None) == (row.capability is not None), row.name
        if row.device is not None:
            assert row.capability in PER_CAPABILITY
            assert 40 <= row.device.multiprocessors <= 200
            assert 4 * MiB <= row.device.l2_bytes <= 128 * MiB
            assert len(row.device.source) > 10


@pytest.mark.parametrize(
    ("gpu", "gpus", "memory", "message"),
    [
        ("MI300X", 1, None, "gpu='MI300X' cannot be a virtual GPU, which is NVIDIA's: choose one of RTX 2080 Ti"),
        ("A1000", 1, None, "not in the table"),
        ("T4", 0, None, "gpus=0 must be 1 to 64"),
        ("T4", 65, None, "gpus=65 must be 1 to 64"),
        ("T4", 1, 100 * MiB, "memory_bytes=104857600 must be above the 400 MiB that a CUDA context takes"),
    ],
)
def test_what_cannot_be_is_said(gpu: str, gpus: int, memory: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        describe(gpu, gpus, memory)


@pytest.mark.usefixtures("library")
def test_a_card_without_code_in_this_pytorch_is_refused() -> None:
    from bigvivit.forecast.virtual_gpu.build import build_library

    if any(code // 10 == 7 and code <= 70 for code in build_library().architectures):
        pytest.skip("this PyTorch has code for a V100")
    with pytest.raises(ConfigError, match=r"has compute capability 7\.0, for which torch .* has no code"):
        environment("V100 16GB")


@pytest.mark.parametrize("name", ["T4", "A100 80GB", "H100"])
def test_pytorch_sees_the_card_of_the_table(card: Callable[[str], Any], name: str) -> None:
    row, seen = find_accelerator(name), card(name).call(programs.describe_card)
    assert row.device is not None
    assert row.capability is not None
    assert seen["active"]
    assert (seen["count"], seen["name"], seen["capability"]) == (2, row.device.name, divmod(row.capability, 10))
    assert (seen["total"], seen["multiprocessors"]) == (row.memory_bytes, row.device.multiprocessors)
    shared, threads, _ = PER_CAPABILITY[row.capability]
    assert seen["l2"] == row.device.l2_bytes
    assert (seen["shared"], seen["threads"]) == ((shared - (row.capability >= 80)) * KiB, threads)
    assert seen["bf16"] == ("bf16" in row.rates)
    assert seen["free"] == (row.memory_bytes - context(row).expected_bytes, row.memory_bytes)


def test_nvml_shows_the_same_cards(card: Callable[[str], Any]) -> None:
    seen = card("A100 80GB").call(programs.describe_nvml)
    assert (seen["count"], seen["name"]) == (2, find_card("A100 80GB").device.name)  # type: ignore[union-attr]
    assert tuple(seen["capability"]) == (8, 0)
    assert seen["free"] == seen["driver"]
    assert seen["uuid"]


@pytest.mark.slow
@pytest.mark.parametrize(("visible", "count"), [("1", 1), ("1,0", 2), ("", 0), ("0,7", 1)])
def test_visible_devices(card: Callable[[str], Any], visible: str, count: int) -> None:
    assert card("A100 80GB").call(programs.visible_devices, visible) == count


def test_another_memory() -> None:
    assert f"memory={3 * GiB};" in describe("A100 80GB", 1, 3 * GiB)
