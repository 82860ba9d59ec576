"""Bytes and counts for people."""

from __future__ import annotations

import pytest

from bigvivit.units import GiB, MiB, format_bytes, format_count, parse_bytes, torch_dtype


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (int(1.88 * GiB), "1.88 GiB"),
        (-2048, "-2 KiB"),
        (1020 * 1024, "1020 KiB"),
    ],
)
def test_bytes(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("count", "text"), [(999, "999"), (1_012_030_336, "1.01 B"), (85_800_000, "85.8 M"), (1200, "1.2 k")]
)
def test_counts(count: int, text: str) -> None:
    assert format_count(count) == text


def test_dtypes() -> None:
    assert [str(torch_dtype(name)) for name in ("fp32", "bf16", "fp16")] == [
        "torch.float32",
        "torch.bfloat16",
        "torch.float16",
    ]


@pytest.mark.parametrize(
    ("text", "count"),
    [("22.5GiB", 22.5 * GiB), ("512 MiB", 512 * MiB), ("80e9", 80e9), ("24GB", 24e9), ("1TB", 1e12), ("7 B", 7)],
)
def test_amounts_that_people_write(text: str, count: float) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "much", "-1GiB", "GiB", "1.2.3GiB", "0", "12Gib", "1e999"])
def test_amounts_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="no amount of memory"):
        parse_bytes(text)
