"""What a real library would take as scratch and is not known: counted, so that it can be said."""

from __future__ import annotations

from typing import Any

import pytest

from bigvivit.forecast.virtual_gpu import virtual_gpu
from tests.forecast.virtual_gpu import library_programs as programs


@pytest.mark.parametrize("older_interface", [False, True])
@pytest.mark.usefixtures("library")
def test_convolutions_other_than_of_patches_are_counted(monkeypatch: pytest.MonkeyPatch, older_interface: bool) -> None:
    monkeypatch.setenv("TORCH_CUDNN_V8_API_DISABLED", str(int(older_interface)))
    with virtual_gpu("A100 80GB") as gpu:
        counted = gpu.call(programs.count_convolutions)
    known = {name: counted.pop(name) for name in ("patch", "tubelet", "pointwise")}
    assert set(known.values()) == {0}
    assert set(counted.values()) == {6}, counted  # forward, and both gradients, twice


@pytest.mark.usefixtures("library")
def test_each_library_is_counted_by_its_name() -> None:
    calls: list[tuple[str, Any, tuple[Any, ...]]] = [
        ("recurrent networks", programs.recurrent_spaces, ("GRU", 4, 0.0)),
        ("Fourier transforms", programs.transform, ()),
        ("dense solvers", programs.solve, ("float32",)),
        ("sparse products", programs.multiply_sparse, ("csr",)),
    ]
    with virtual_gpu("A100 80GB") as gpu:
        before = gpu.call(programs.count_estimates)
        assert set(before.values()) == {0}
        for name, function, arguments in calls:
            gpu.call(function, *arguments)
            after = gpu.call(programs.count_estimates)
            assert {key for key in after if after[key] != before[key]} == {name}
            before = after
