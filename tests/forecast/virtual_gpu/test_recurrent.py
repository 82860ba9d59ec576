"""Recurrent networks of cuDNN: weights in one buffer, gradients, sizes of what is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.forecast.virtual_gpu import library_programs as programs


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LSTM", {}),
        ("LSTM", {"num_layers": 3, "bidirectional": True, "dropout": 0.3}),
        ("LSTM", {"num_layers": 2, "proj_size": 8}),
        ("LSTM", {"bias": False, "bidirectional": True}),
        ("GRU", {"num_layers": 2, "dropout": 0.1}),
        ("RNN", {"nonlinearity": "relu", "num_layers": 2}),
    ],
)
def test_recurrent_networks_train(card: Callable[[str], Any], kind: str, options: dict[str, Any], packed: bool) -> None:
    seen = card("A100 80GB").call(programs.train_recurrent, kind, packed, options)
    directions, layers = 2 if options.get("bidirectional") else 1, options.get("num_layers", 1)
    width = options.get("proj_size", 32)
    biases = 0 if options.get("bias", True) else 2 * 4 * 32 * 4 * directions  # cuDNN has room for them all the same
    assert seen == {
        "storages": 1,
        "bytes": seen["parameters"] + biases,
        "apart": True,
        "parameters": seen["parameters"],
        "same shapes": True,
        "gradients": True,
        "input gradient": (4, 7, 24),
        "output": (15, width * directions) if packed else (4, 7, width * directions),
        "state": (layers * directions, 4, width),
    }


@pytest.mark.parametrize(("kind", "reserve"), [("LSTM", 736_000_000), ("GRU", 864_000_000)])
def test_what_is_kept_is_what_was_published(card: Callable[[str], Any], kind: str, reserve: int) -> None:
    """Of four layers, as cuDNN asked for it on a P100 (pytorch/pytorch#2895); an H100's asks for 256 bytes more, see
    test_measured.py."""
    kept, _ = card("A100 80GB").call(programs.recurrent_spaces, kind, 4, 0.0)
    assert kept == reserve + 256


def test_dropout_keeps_a_mask_of_bits(card: Callable[[str], Any]) -> None:
    without, _ = card("A100 80GB").call(programs.recurrent_spaces, "LSTM", 4, 0.0)
    kept, _ = card("A100 80GB").call(programs.recurrent_spaces, "LSTM", 4, 0.5)
    assert kept - without == 3 * 250 * 100 * 320 // 8
