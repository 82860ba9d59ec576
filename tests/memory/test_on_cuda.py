"""Errors of streams, modes, devices and types, which only CUDA has: on a virtual GPU, whose values mean nothing."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bigvivit.config import ConfigError
from bigvivit.forecast.virtual_gpu import environment, virtual_gpu
from bigvivit.forecast.virtual_gpu.session import Child
from bigvivit.memory.offload import COMING, LEAVING, SLAB_BYTES
from bigvivit.units import MiB
from tests.launching import ROOT, STAGE1
from tests.launching import environment as launch_environment
from tests.memory import on_cuda


@pytest.fixture(scope="module")
def gpu() -> Iterator[Child]:
    try:
        with virtual_gpu("A100 80GB", gpus=2) as child:
            yield child
    except ConfigError as error:
        pytest.skip(f"no virtual GPU: {error}")


@pytest.mark.parametrize("placement", ["device", "cpu", "disk"])
def test_a_tower_elsewhere_in_inference_mode(placement: str, gpu: Child) -> None:
    """What `eval`, `predict` and `drift` do: the thread that copies has modes of its own."""
    assert gpu.call(on_cuda.pass_in_inference_mode, placement) == [7, 128]


@pytest.mark.parametrize("compute", ["fp16", "bf16", "fp32"])
def test_types_of_the_tower_under_autocast(compute: str, gpu: Child) -> None:
    assert math.isfinite(gpu.call(on_cuda.step_in, compute))


@pytest.mark.parametrize("placement", ["device", "cpu"])
@pytest.mark.parametrize("storage", ["bf16", "int8", "nf4"])
def test_the_host_never_waits_within_a_tower(storage: str, placement: str, gpu: Child) -> None:
    gpu.call(on_cuda.pass_without_waiting, storage, placement)
    with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):  # so that silence means something
        gpu.call(on_cuda.make_on_device_without_waiting)


def test_layers_in_the_hosts_memory_are_locked_where_they_are(gpu: Child) -> None:
    locked, pinned = gpu.call(on_cuda.page_locks)
    assert locked == [True] * 6
    assert pinned == 0  # PyTorch rounds its own up to powers of two


def test_layers_from_disk_land_in_two_buffers_of_their_size() -> None:
    """PyTorch's own pinned memory would be a power of two for each."""
    with virtual_gpu("A100 80GB") as gpu:
        largest, locked, pinned = gpu.call(on_cuda.land_from_disk)
    assert locked == 2 * largest
    assert largest & (largest - 1)  # no power of two
    assert pinned == [True, False]


def test_a_landing_buffer_is_read_into_when_its_last_copy_is_done(gpu: Child) -> None:
    again = ["wait", "read into 0", "wait", "read into 1"]
    assert gpu.call(on_cuda.read_in_turn) == ["read into 0", "read into 1", *again, *again]


def test_a_rank_keeps_to_its_gpu() -> None:
    with virtual_gpu("A100 80GB", gpus=2) as gpu:
        first, second = gpu.call(on_cuda.use_the_second)
    assert first == 0
    assert second > 0


def test_the_share_that_a_process_may_have_counts(gpu: Child) -> None:
    before, after = gpu.call(on_cuda.free_of_half)
    assert before > 0.9
    assert after == pytest.approx(0.25, abs=0.01)


def test_ddp_leaves_clips_where_they_are(gpu: Child) -> None:
    assert gpu.call(on_cuda.where_clips_are_under_ddp) == "cpu"


def test_offloaded_activations_return_to_where_they_were(gpu: Child) -> None:
    assert gpu.call(on_cuda.where_saved_tensors_return) == ["cuda", "cpu"]


def test_copies_of_activations_are_beside_the_computation(gpu: Child) -> None:
    found = gpu.call(on_cuda.streams_of_copies)
    assert {operator for operator, _ in found} == {"to cpu", "to cuda", "aten.exp.default", "aten.mul.Tensor"}
    for operator, computes in found:
        assert computes == operator.startswith("aten"), operator
    backward = [operator for operator, _ in found if operator in ("to cuda", "aten.mul.Tensor")]
    assert backward[0] == "to cuda"  # ahead of the first that computes, which needs none: it has not left
    assert backward.count("to cuda") == 2


def test_few_activations_are_on_the_device_and_none_is_rounded_on_the_host() -> None:
    with virtual_gpu("A100 80GB") as gpu:
        forward, backward, locked = gpu.call(on_cuda.take_tensors_along, 20 * MiB, 24)
    assert forward == LEAVING + 2  # the input, and what is made while the first still leaves
    assert (
        backward == COMING + 6
    )  # in the middle: input, output, its gradient, and one operator's two and what it saved
    assert locked == -(-24 * 20 * MiB // SLAB_BYTES) * SLAB_BYTES


def test_after_an_error_memory_is_kept_until_its_copy_is_made(gpu: Child) -> None:
    assert gpu.call(on_cuda.fail_with_copies_under_way) == (LEAVING, 0)


def test_codes_are_made_where_that_is_fast(gpu: Child) -> None:
    assert gpu.call(on_cuda.where_codes_are_made) == ["nf4 on cuda", "int8 on cpu"]


def test_fp32_is_fp32_unless_asked_otherwise(gpu: Child) -> None:
    assert gpu.call(on_cuda.precisions) == ["ieee", "ieee", "tf32", "tf32"]


def on_virtual_gpus() -> dict[str, str]:
    env = {**launch_environment(), **environment("A100 80GB"), "CI": "1"}  # where a golden that is missing fails
    del env["CUDA_VISIBLE_DEVICES"]
    return env


@pytest.mark.skipif(torch.version.cuda is None, reason="PyTorch without CUDA")
def test_what_is_marked_gpu_runs(gpu: Child) -> None:
    """As far as that goes where kernels are not run."""
    words = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    words += ["tests/memory", "tests/test_memory_regression.py"]
    done = subprocess.run(words, cwd=ROOT, env=on_virtual_gpus(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" in done.stdout


def test_a_run_on_the_cpu_opens_no_gpu(demo: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from bigvivit.train import main; main(sys.argv[1:]); "
        "from bigvivit.forecast.virtual_gpu.inside import driver_bytes; print('taken', driver_bytes(0))"
    )
    words = [
        *STAGE1,
        "--out",
        tmp_path / "run",
        "--data.train",
        demo / "train.csv",
        "--save-every",
        "1",
        "--device",
        "cpu",
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        cwd=ROOT,
        env=on_virtual_gpus(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "taken 0\n" in done.stdout
