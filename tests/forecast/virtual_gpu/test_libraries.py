"""cuFFT, cuSOLVER, cuSPARSE, part of cuDNN under PyTorch's functions: shapes, gradients, what is taken as scratch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.forecast.virtual_gpu import library_programs as programs


def test_fourier_transforms(card: Callable[[str], Any]) -> None:
    assert card("A100 80GB").call(programs.transform) == {
        "spectrum": ((64, 501), "torch.complex64"),
        "back": (64, 1000),
        "gradient": (64, 1000),
        "images": ((2, 3, 16, 16), "torch.complex128"),
        "short": (4, 129, 65),
        "scratch": 0,  # as measured of such a length, test_measured.py
    }


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
def test_linear_algebra(card: Callable[[str], Any], dtype: str) -> None:
    shapes = card("A100 80GB").call(programs.solve, dtype)
    matrices, vectors, columns = [(300, 300), (5, 8, 8)], [(300,), (5, 8)], [(300, 3), (5, 8, 3)]
    numbers: list[tuple[int, ...]] = [(), (5,)]
    assert shapes == {
        **dict.fromkeys(("cholesky", "cholesky_inverse", "qr", "svd", "eigh", "inv", "pinv", "lu", "ldl"), matrices),
        **dict.fromkeys(("svdvals", "eigvals"), vectors),
        **dict.fromkeys(("cholesky_solve", "solve", "lstsq", "solve_triangular"), columns),
        **dict.fromkeys(("slogdet", "matrix_norm"), numbers),
    }


@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_sparse_products(card: Callable[[str], Any], layout: str) -> None:
    found = card("A100 80GB").call(programs.multiply_sparse, layout)
    alone = {"gradient": (5, 4)} if layout == "coo" else {"solution": (6, 4), "sampled": (6, 5)}
    assert found == {"matrix": (6, 4), "vector": (6,), "square": (6, 6), "sum": (6, 5, 14), **alone}


def test_images_are_sampled_by_a_grid(card: Callable[[str], Any]) -> None:
    assert card("A100 80GB").call(programs.sample) == ((2, 3, 4, 5), (2, 2, 3))


def test_coalescing_takes_all_to_differ(card: Callable[[str], Any]) -> None:
    assert card("A100 80GB").call(programs.coalesce) == (3, 200)


@pytest.mark.parametrize("on_device", [False, True])
def test_connectionist_losses(card: Callable[[str], Any], on_device: bool) -> None:
    """By cuDNN, whose scratch for 50 steps of 4 sequences with up to 7 labels and the blanks between is an estimate."""
    found = card("A100 80GB").call(programs.lose_ctc, on_device)
    scratch = found.pop("scratch")
    assert found == {"loss": (), "gradient": (50, 4, 20)}
    assert scratch > 2 * 50 * 4 * 15 * 4


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_convolution_does_without_a_workspace_for_which_there_is_no_memory(
    card: Callable[[str], Any], dtype: str
) -> None:
    """PyTorch then takes the next engine, as it does on a GPU."""
    with_room, without = card("A100 80GB").call(programs.convolve_at_the_limit, dtype)
    assert with_room > 0
    assert without == 0


def test_a_convolution_without_output_channels(card: Callable[[str], Any]) -> None:
    assert card("A100 80GB").call(programs.convolve_to_nothing) == ((2, 0, 16, 16), (2, 8, 16, 16))
