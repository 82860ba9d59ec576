"""The published recordings whose programs are written anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from tests.forecast.virtual_gpu import recorded, recorded_attention, recorded_medium


class Recording(NamedTuple):
    """A recording and its program."""

    name: str
    """Of the file."""
    torch: str
    """That it was made with, as its publisher's lock file says."""
    build: Callable[..., Callable[[], Any]]
    arguments: tuple[Any, ...]
    warm: int
    """Runs before the one recorded. The recordings do not say: the least that explains what was reserved."""
    autocast: bool = False


RECORDINGS = (
    Recording("silmont2000_mem_snapshot_b61be40", "2.6.0", recorded_attention.attention, (), 0),
    Recording("silmont2000_memory_forward_fp32_128_769df2d", "2.6.0", recorded.forward, (False,), 1),
    Recording("silmont2000_memory_forward_bf16_128_d9ecf8b", "2.6.0", recorded.forward, (True,), 1, True),
    Recording(
        "Wedsonlin_results_medium_256_inference_memory_snapshot_e0143d8", "2.11.0", recorded_medium.inference, (256,), 1
    ),
    Recording(
        "Wedsonlin_results_medium_1024_inference_memory_snapshot_1cfc21c",
        "2.11.0",
        recorded_medium.inference,
        (1024,),
        1,
    ),
    Recording(
        "Wedsonlin_results_medium_128_training_memory_snapshot_0db7d8c",
        "2.11.0",
        recorded_medium.training,
        (128, False),
        2,
    ),
    Recording(
        "Wedsonlin_results_medium_512_training_memory_snapshot_61dcd14",
        "2.11.0",
        recorded_medium.training,
        (512, True),
        3,
        True,
    ),
)
