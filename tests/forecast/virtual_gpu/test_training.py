"""Training on virtual GPUs: PyTorch's choice of kernels by card, workspaces, a step's bytes, graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.torch_version import TorchVersion

from bigvivit.forecast.overhead import CUBLAS_WORKSPACE, CUBLAS_WORKSPACE_LARGE
from bigvivit.forecast.virtual_gpu import virtual_gpu
from bigvivit.units import MiB
from tests.forecast.virtual_gpu import programs
from tests.forecast.virtual_gpu.versions import takes_workspaces


@pytest.mark.parametrize(
    ("name", "dtype", "kernel"),
    [
        ("T4", "float16", "efficient"),
        ("A100 80GB", "float16", "flash"),
        ("A100 80GB", "float32", "efficient"),
        ("H100", "float16", "cudnn"),
    ],
)
def test_attention_is_chosen_by_the_card(card: Callable[[str], Any], name: str, dtype: str, kernel: str) -> None:
    seen = card(name).call(programs.attention_kernels, dtype)
    chosen = f"aten::_scaled_dot_product_{kernel}_attention"
    assert {chosen, f"{chosen}_backward"} <= set(seen), seen


@takes_workspaces
@pytest.mark.parametrize(("name", "size"), [("T4", CUBLAS_WORKSPACE), ("H100", CUBLAS_WORKSPACE_LARGE)])
@pytest.mark.usefixtures("library")
def test_the_first_product_takes_a_workspace(name: str, size: int) -> None:
    with virtual_gpu(name) as gpu:
        assert gpu.call(programs.workspace_bytes) == [size]


@takes_workspaces
@pytest.mark.usefixtures("library")
def test_a_step_leaves_parameters_states_and_workspaces() -> None:
    with virtual_gpu("A100 80GB") as gpu:
        seen = gpu.call(programs.vit_step)
    assert seen["building"] == seen["parameters"] + seen["images"]
    # AdamW's two states are as large as the parameters; a workspace each for the caller's and autograd's thread, and
    # before torch 2.12 one that cuBLASLt has beside them
    workspaces = 2 * CUBLAS_WORKSPACE + (MiB if torch.__version__ < TorchVersion("2.12") else 0)
    assert seen["after"] == 3 * seen["parameters"] + seen["images"] + workspaces
    assert seen["peak"] > seen["after"] + seen["parameters"]  # gradients, and what autograd kept


def test_a_patch_convolution_takes_copies_on_tensor_cores(card: Callable[[str], Any]) -> None:
    """To the byte what an H100 was asked for in bf16: images, weights and output with eight channels each, last."""
    stays, scratch = card("A100 80GB").call(programs.convolve)
    images, weights, output = 8 * 8 * 224 * 224 * 2, 768 * 8 * 16 * 16 * 2, 8 * 768 * 14 * 14 * 2
    assert (stays, scratch) == (output, images + weights + output + 16)


def test_kernels_are_compiled_by_nvrtc(card: Callable[[str], Any]) -> None:
    assert card("A100 80GB").call(programs.compile_kernels) == [(4,), (4, 5), (4, 5)]


def test_graphs_are_captured_and_guarded(card: Callable[[str], Any]) -> None:
    launched, error = card("A100 80GB").call(programs.capture_graph)
    assert launched == 0
    assert "operation not permitted when stream is capturing" in error
