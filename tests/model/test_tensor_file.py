"""Reading safetensors files against the library's own reader, and damaged ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bigvivit.model.tensor_file import Entry, read_entries, read_tensor


def test_what_the_library_reads(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix": (7, 5), "vector": (3,), "scalar": (), "empty": (0, 4), "kernel": (2, 3, 4, 4)}
    tensors = {
        f"{name}.{dtype}": torch.randn(shape, generator=generator).to(dtype)
        for name, shape in shapes.items()
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    }
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    entries, expected = read_entries(path), load_file(path)
    assert entries.keys() == expected.keys()
    for name, tensor in expected.items():
        read = read_tensor(path, entries[name])
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)
    name = "matrix.torch.float32"
    assert torch.equal(read_tensor(path, entries[name], (2, 5)), expected[name][2:5])


@pytest.fixture(scope="module")
def blob(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "a.safetensors"
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, path)
    return path.read_bytes()


@pytest.mark.parametrize("size", [0, 4, 8, 20, -1])
def test_a_cut_file_is_named(size: int, blob: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(blob[:size])
    with pytest.raises(ValueError, match=r"cut\.safetensors is not a whole safetensors file .*: fetch it again"):
        read_entries(path)


def attempt(path: Path) -> tuple[dict[str, Entry] | None, str]:
    """What the file holds, or why it is refused."""
    try:
        return read_entries(path), ""
    except ValueError as error:
        return None, str(error)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 200), byte=st.integers(0, 255))
def test_one_wrong_byte_is_refused_or_read_like_the_library(place: int, byte: int, blob: bytes, tmp_path: Path) -> None:
    """In the header, whatever we take as whole is what the library takes it for."""
    header = 8 + int.from_bytes(blob[:8], "little")
    damaged = bytearray(blob)
    damaged[place % header] = byte
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(damaged)
    entries, message = attempt(path)
    if entries is None:
        assert "damaged.safetensors" in message
        return
    try:
        expected = load_file(path)
    except SafetensorError:
        return  # the library is stricter about gaps and order
    assert entries.keys() == expected.keys()
    for name, tensor in expected.items():
        if entries[name].dtype in ("F32", "BF16"):
            assert torch.equal(read_tensor(path, entries[name]), tensor)


def test_a_file_that_shrinks_is_an_error(blob: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(blob)
    entries = read_entries(path)
    path.write_bytes(blob[:-30])
    with pytest.raises(ValueError, match="has become shorter"):
        [read_tensor(path, entry) for entry in entries.values()]
