"""The table of accelerators, names, and local GPUs by a stand-in for NVML."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from bigvivit.config import ConfigError
from bigvivit.forecast.accelerators import ACCELERATORS, Accelerator, kernels_of
from bigvivit.forecast.hardware import accelerator_by_hand, find_accelerator, find_local_gpus, normalise
from bigvivit.units import GiB, MiB

ISSUE = (
    *(
        "2080 Ti",
        "3090",
        "4090",
        "5090",
        "T4",
        "V100 16GB",
        "V100 32GB",
        "A10",
        "L4",
        "A100 40GB",
        "A100 80GB",
        "A6000",
    ),
    *("L40S", "H100", "H200", "B200", "MI250X", "MI300X", "TPU v3"),
)
NOMINAL_GIB = {
    **{"RTX 2080 Ti": 11, "RTX 3090": 24, "RTX 4090": 24, "RTX 5090": 32, "T4": 16, "V100 16GB": 16, "V100 32GB": 32},
    **{"A10": 24, "L4": 24, "A100 40GB": 40, "A100 80GB": 80, "RTX A6000": 48, "L40S": 48, "H100": 80, "B200": 192},
    **{"H200": 141, "MI250X": 64, "MI300X": 192, "TPU v3": 16},
}


@pytest.mark.parametrize("name", ISSUE)
def test_every_accelerator_is_there(name: str) -> None:
    assert normalise(find_accelerator(name).name) == normalise(name)


def test_nothing_else_is_there() -> None:
    assert len(ACCELERATORS) == len(ISSUE) == len({row.name for row in ACCELERATORS})


@pytest.mark.parametrize("row", ACCELERATORS, ids=lambda row: row.name)
def test_rows_are_plausible(row: Accelerator) -> None:
    """The slips that tables of this kind have had: units, sparse rates, two dies for one, memory above the nominal."""
    assert 0.89 * NOMINAL_GIB[row.name] * GiB <= row.memory_bytes <= NOMINAL_GIB[row.name] * GiB
    assert len(row.memory_source) > 10
    assert len(row.source) > 5
    assert row.bandwidth is not None
    assert 0.2e12 < row.bandwidth < 10e12
    assert all(1e12 < rate < 5e15 for rate in row.rates.values())
    assert "math" in row.kernels
    if "fp16" in row.rates and "bf16" in row.rates:
        assert row.rates["fp16"] == row.rates["bf16"]
    if "tf32" in row.rates and "fp16" in row.rates:
        assert row.rates["tf32"] == pytest.approx(row.rates["fp16"] / 2, rel=0.02)
    if "int8" in row.rates and "fp16" in row.rates:
        assert row.rates["int8"] / row.rates["fp16"] == pytest.approx(
            round(row.rates["int8"] / row.rates["fp16"]), rel=0.03
        )
    for link in (row.link_bandwidth, row.host_bandwidth):
        assert link is None or 10e9 < link < 1e12


def test_no_row_has_the_rates_of_another_chip() -> None:
    """As the MI250X had the MI300X's. Those that share a chip say so."""
    same = {"V100 32GB": "V100 16GB", "A100 80GB": "A100 40GB", "H200": "H100"}
    for row in ACCELERATORS:
        alike = [other.name for other in ACCELERATORS if other.rates == row.rates and other is not row]
        assert set(alike) <= {same.get(row.name), *(name for name, of in same.items() if of == row.name)}


def test_cards_without_bf16_units_have_no_flash_attention_either() -> None:
    for name in ("2080 Ti", "V100 16GB", "V100 32GB", "T4"):
        row = find_accelerator(name)
        assert "bf16" not in row.rates
        assert row.kernels == ("memory_efficient", "math")
    assert kernels_of(80) == ("flash", "memory_efficient", "math")


@pytest.mark.parametrize(
    ("name", "row"),
    [
        *((name, "RTX 2080 Ti") for name in ("rtx 2080 ti", "2080ti", "RTX2080Ti", "NVIDIA GeForce RTX 2080 Ti")),
        *(("Tesla T4", "T4"), ("nvidia a100-sxm4-40gb", "A100 40GB"), ("A100 80 GiB", "A100 80GB")),
        *(("Tesla V100-SXM2-32GB", "V100 32GB"), ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA RTX A6000", "RTX A6000")),
        *(("AMD Instinct MI300X", "MI300X"), ("tpu-v3", "TPU v3"), ("NVIDIA L40S", "L40S"), ("NVIDIA A10", "A10")),
    ],
)
def test_names_are_read_leniently(name: str, row: str) -> None:
    assert find_accelerator(name).name == row


@pytest.mark.parametrize("name", ["3090 Ti", "4090 Laptop GPU", "H100 PCIe", "A10G", "L40", "GTX 1080", "RTX", "", "v"])
def test_another_card_is_no_row(name: str) -> None:
    """What resembles a row is not taken for it; the message has the list and the way around."""
    with pytest.raises(
        ConfigError, match=r"not in the table \(RTX 2080 Ti, .*TPU v3\): give its memory.* ranks by hand"
    ):
        find_accelerator(name)


@pytest.mark.parametrize("name", ["a100", "Tesla V100"])
def test_several_sizes_are_asked_about(name: str) -> None:
    with pytest.raises(ConfigError, match=r"GB and .*GB: say which"):
        find_accelerator(name)


def test_memory_by_hand() -> None:
    row = accelerator_by_hand(12 * GiB)
    assert (row.memory_bytes, row.rates, row.bandwidth) == (12 * GiB, {}, None)
    with pytest.raises(ConfigError, match="above 0"):
        accelerator_by_hand(0)


def fake_nvml(monkeypatch: pytest.MonkeyPatch, gpus: list[tuple[object, int, int]], fail: str = "") -> list[str]:
    """A module like pynvml with these (name, total, free); `fail` names the call that raises. Returns the calls."""
    module, calls = ModuleType("pynvml"), []

    class NVMLError(Exception):
        pass

    def answer(name: str, value: object) -> None:
        def call(*arguments: int) -> object:
            calls.append(name)
            if name == fail:
                raise NVMLError("Driver Not Loaded")
            return value(*arguments) if callable(value) else value

        setattr(module, name, call)

    module.NVMLError = NVMLError  # type: ignore[attr-defined]
    answer("nvmlInit", None)
    answer("nvmlShutdown", None)
    answer("nvmlDeviceGetCount", len(gpus))
    answer("nvmlDeviceGetHandleByIndex", lambda index: index)
    answer("nvmlDeviceGetName", lambda handle: gpus[handle][0])
    answer("nvmlDeviceGetMemoryInfo", lambda handle: SimpleNamespace(total=gpus[handle][1], free=gpus[handle][2]))
    answer("nvmlDeviceGetCudaComputeCapability", lambda handle: (8, 6))
    answer("nvmlDeviceGetUUID", lambda handle: f"GPU-{handle}{handle}ab")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return calls


def test_local_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_nvml(
        monkeypatch,
        [("NVIDIA GeForce RTX 3090", 24576 * MiB, 23000 * MiB), (b"NVIDIA GeForce RTX 3080", 10240 * MiB, 10000 * MiB)],
    )
    known, other = find_local_gpus()
    assert (known.index, known.accelerator.name, known.free_bytes) == (0, "RTX 3090", 23000 * MiB)
    assert known.accelerator.memory_bytes == 23000 * MiB  # what is free, and its own rates
    assert known.accelerator.rates == find_accelerator("3090").rates
    assert (other.name, other.accelerator.name) == ("NVIDIA GeForce RTX 3080",) * 2
    assert (other.accelerator.memory_bytes, other.accelerator.rates) == (10000 * MiB, {})
    assert other.accelerator.kernels == ("flash", "memory_efficient", "math")
    assert calls[-1] == "nvmlShutdown"


def test_a_free_card_has_no_more_than_programs_can_have(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvml(monkeypatch, [("NVIDIA GeForce RTX 3090", 24576 * MiB, 24576 * MiB)])
    assert find_local_gpus()[0].accelerator.memory_bytes == find_accelerator("3090").memory_bytes


@pytest.mark.parametrize(
    ("visible", "places"), [("1", [1]), ("2,0", [2, 0]), ("GPU-11", [1]), ("0,7,1", [0]), (" 2 , 1", [2, 1])]
)
def test_only_gpus_that_programs_see(monkeypatch: pytest.MonkeyPatch, visible: str, places: list[int]) -> None:
    fake_nvml(monkeypatch, [(f"card {number}", 100 * MiB, 100 * MiB) for number in range(3)])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.index for gpu in find_local_gpus()] == places
    assert [gpu.name for gpu in find_local_gpus()] == [f"card {place}" for place in places]


@pytest.mark.parametrize(("visible", "words"), [("", "shows programs no GPU"), ("MIG-5", "a part of a GPU")])
def test_no_whole_gpu_to_see(monkeypatch: pytest.MonkeyPatch, visible: str, words: str) -> None:
    fake_nvml(monkeypatch, [("card", 100 * MiB, 100 * MiB)])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ConfigError, match=words):
        find_local_gpus()


@pytest.mark.parametrize("fail", ["nvmlInit", "nvmlDeviceGetMemoryInfo"])
def test_a_driver_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, fail: str) -> None:
    fake_nvml(monkeypatch, [("NVIDIA GeForce RTX 3090", 24576 * MiB, 0)], fail=fail)
    with pytest.raises(ConfigError, match=r"Driver Not Loaded\): name the hardware instead"):
        find_local_gpus()


def test_no_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(ConfigError, match="pip install nvidia-ml-py"):
        find_local_gpus()
