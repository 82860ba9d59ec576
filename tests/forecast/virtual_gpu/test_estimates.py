"""What a real library would take as scratch and is not known: counted, so that it can be said."""

from __future__ import annotations

from typing import Any

import pytest

from bigvivit.forecast.virtual_gpu import virtual_gpu
from tests.forecast.virtual_gpu import library_programs as programs


@pytest.mark.parametrize("older_interface", [False, True])
@pytest.mark.usefixtures("library")
def test_convolutions_are_counted_but_for_products_without_tensor_cores(
    monkeypatch: pytest.MonkeyPatch, older_interface: bool
) -> None:
    monkeypatch.setenv("TORCH_CUDNN_V8_API_DISABLED", str(int(older_interface)))
    with virtual_gpu("A100 80GB") as gpu:
        counted = gpu.call(programs.count_convolutions, tf32=False)
    known = {name: counted.pop(name) for name in ("patch16", "patch", "tubelet", "pointwise")}
    assert set(known.values()) == {0}
    assert set(counted.values()) == {6}, counted  # forward, and both gradients, twice


@pytest.mark.usefixtures("library")
def test_the_scratch_of_tensor_cores_is_counted() -> None:
    """A patch convolution has copies there, and the pointwise one parts of its weights' gradient; fp32 has such cores
    from Ampere on."""
    for name, counts in {"A100 80GB": (6, 2), "T4": (0, 0)}.items():
        with virtual_gpu(name) as gpu:
            counted = gpu.call(programs.count_convolutions, tf32=True)
        assert (counted["patch16"], counted["pointwise"]) == counts, name
        assert counted["padded"] == 6


@pytest.mark.usefixtures("library")
def test_each_library_is_counted_by_its_name() -> None:
    calls: list[tuple[str, Any, tuple[Any, ...]]] = [
        ("recurrent networks", programs.recurrent_spaces, ("GRU", 4, 0.0)),
        ("Fourier transforms", programs.transform, ()),
        ("dense solvers", programs.solve, ("float32",)),
        ("sparse products", programs.multiply_sparse, ("csr",)),
        ("CTC losses", programs.lose_ctc, (False,)),
    ]
    with virtual_gpu("A100 80GB") as gpu:
        before = gpu.call(programs.count_estimates)
        assert set(before.values()) == {0}
        for name, function, arguments in calls:
            gpu.call(function, *arguments)
            after = gpu.call(programs.count_estimates)
            assert {key for key in after if after[key] != before[key]} == {name}
            before = after
