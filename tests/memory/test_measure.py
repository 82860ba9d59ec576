"""Peaks against what is known to have been taken."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import pytest
import torch

from bigvivit.memory.measure import (
    Peak,
    count_cpu_allocations,
    greatest,
    measure_device,
    measure_free,
    measure_peak,
    measure_peaks,
)
from bigvivit.units import MiB
from tests.launching import ROOT, environment, free_port

CPU = torch.device("cpu")
IN_A_PROCESS = """
import json, torch
from bigvivit.memory.measure import measure_data, measure_free, measure_peak
cpu = torch.device("cpu")
torch.ones(1, dtype=torch.uint8)  # kernels are loaded when they are first used
read = lambda: [measure_peak(cpu).process_bytes, measure_data(), measure_free(cpu)]
before = read()
held = torch.ones(64 * 2**20, dtype=torch.uint8)
during = read()
del held
print(json.dumps([before, during, read()]))
"""


def run(code: str, **variables: str) -> subprocess.Popen[str]:
    env = environment(PYTHONPATH=str(ROOT), **variables)
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)


def test_a_tensor_of_64_mib_is_seen_in_the_process_and_under_a_limit() -> None:
    def restrict() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (4096 * MiB, 4096 * MiB))

    done = subprocess.run(
        [sys.executable, "-c", IN_A_PROCESS], check=True, cwd=ROOT, env=environment(PYTHONPATH=str(ROOT)),
        stdout=subprocess.PIPE, text=True, preexec_fn=restrict,
    )  # fmt: skip
    before, during, after = json.loads(done.stdout)
    assert during[0] - before[0] == pytest.approx(64 * MiB, rel=0.05)
    assert after[0] == pytest.approx(during[0], abs=MiB)  # a peak stays; the kernel counts in batches
    assert during[1] - before[1] == pytest.approx(64 * MiB, rel=0.05)
    assert after[1] < during[1] - 60 * MiB
    for _, data, free in (before, during, after):
        assert free == pytest.approx(4096 * MiB - data, abs=2 * MiB)


def test_the_cpu_allocators_count_is_exact() -> None:
    kept = []
    with count_cpu_allocations() as counted:
        kept.append(torch.empty(3 * MiB, dtype=torch.uint8))
        torch.empty(5 * MiB, dtype=torch.uint8)
        torch.empty(2 * MiB, dtype=torch.uint8)
    assert (counted.peak_bytes, counted.left_bytes) == (8 * MiB, 3 * MiB)


def test_one_process_is_one_rank() -> None:
    (peak,) = measure_peaks(CPU)
    assert peak.allocated_bytes is peak.reserved_bytes is peak.retries is peak.device_bytes is None
    assert peak.peak_bytes == peak.process_bytes > 0
    assert peak.how == "process RSS, imports included"


def test_the_greatest_is_taken_counter_by_counter() -> None:
    ranks = [Peak(5, 30, 40, 0, 70), Peak(6, 20, 50, 2, 60)]
    assert greatest(ranks) == Peak(6, 30, 50, 2, 70)
    assert greatest(ranks).peak_bytes == 30
    assert greatest([Peak(5), Peak(7)]) == Peak(7)


RANKS = """
import json, os, torch, torch.distributed as dist
from dataclasses import astuple
from bigvivit.memory.measure import Peak, measure_peaks
import bigvivit.memory.measure as measure
rank = int(os.environ["RANK"])
dist.init_process_group("gloo")
own = [Peak(100, 10, 20, 0, None), Peak(90, 11, 19, 3, None)][rank]
measure.measure_peak = lambda device: own
print(json.dumps([astuple(peak) for peak in measure_peaks(torch.device("cpu"))]))
"""


def test_every_rank_hears_of_all() -> None:
    port = str(free_port())
    ranks = [run(RANKS, RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for rank in range(2)]
    heard = [json.loads(rank.communicate(timeout=100)[0].splitlines()[-1]) for rank in ranks]
    assert heard == [[[100, 10, 20, 0, None], [90, 11, 19, 3, None]]] * 2


def test_without_nvml_the_device_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: torch.device) -> int:
        raise RuntimeError("Driver/library version mismatch")

    monkeypatch.setattr(torch.cuda, "device_memory_used", refuse)
    assert measure_device(torch.device("cuda")) is None


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and PyTorch finds none")
    torch.cuda.init()  # counters of a device that nobody has used yet are an error
    return torch.device("cuda", 0)


@pytest.mark.gpu
def test_cuda_counters(cuda: torch.device) -> None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(cuda)
    before, free = measure_peak(cuda), measure_free(cuda)
    assert before.allocated_bytes is not None
    held = torch.ones(256 * MiB, dtype=torch.uint8, device=cuda)
    during = measure_peak(cuda)
    assert during.allocated_bytes == before.allocated_bytes + 256 * MiB
    assert during.peak_bytes == during.allocated_bytes
    assert during.reserved_bytes is not None
    assert during.reserved_bytes >= during.allocated_bytes
    assert measure_free(cuda) == pytest.approx(free - 256 * MiB, abs=32 * MiB)
    if during.device_bytes is not None:  # by NVML, which counts the context too
        assert during.device_bytes >= during.reserved_bytes
    del held
    assert measure_peak(cuda).allocated_bytes == during.allocated_bytes
    assert measure_free(cuda) == pytest.approx(free, abs=32 * MiB)  # what is cached can be had


@pytest.mark.gpu
def test_cuda_retries_are_counted(cuda: torch.device) -> None:
    before = measure_peak(cuda).retries
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(1 << 50, dtype=torch.uint8, device=cuda)
    assert measure_peak(cuda).retries == (before or 0) + 1
