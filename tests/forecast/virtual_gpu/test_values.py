"""What is read back from a virtual GPU: a healthy run's values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.forecast.virtual_gpu import programs


@pytest.fixture(scope="module")
def values(card: Callable[[str], Any]) -> dict[str, Any]:
    read: dict[str, Any] = card("A100 80GB").call(programs.read_values)
    return read


def test_what_came_from_the_host_is_read_back(values: dict[str, Any]) -> None:
    assert values["uploaded"] == [[5, 1, 0], [7, 1, 1]]
    assert values["copied"] == [7, 1, 1]
    assert values["filled"] == [2.5, 2.5]


def test_what_kernels_made_reads_as_zero(values: dict[str, Any]) -> None:
    assert (values["random"], values["loss"]) == ([0.0, 0.0], 0.0)


def test_checks_of_a_healthy_run_hold(values: dict[str, Any]) -> None:
    names = ("isfinite", "isfinite alone", "isnan", "isnan any", "below a threshold")
    assert [values[name] for name in names] == [True, True, False, False, False]
    assert values["scale"] == 65536.0  # no step was skipped


def test_conditions_on_known_values_are_computed(values: dict[str, Any]) -> None:
    assert (values["mask of padding"], values["mask without"]) == (False, True)
    assert (values["nonzero of a known mask"], values["sum of integers"]) == (3, 15)


def test_what_programs_of_others_decide_by_is_known(values: dict[str, Any]) -> None:
    """Batches joined (accelerate), the size of a graph's batch (chemprop)."""
    assert values["concatenated"] == list(range(8))
    assert values["size by an index"] == 8
    assert values["cast and cast back"] == [[5, 1, 0], [7, 1, 1]]


def test_arguments_of_a_distribution_are_valid(values: dict[str, Any]) -> None:
    """One sample at a time, as agents act: `all` of one element launches no kernel of its own (stable-baselines3)."""
    assert (values["NaN taken"], values["distribution"]) == (0, 1)


@pytest.mark.parametrize("finished", [False, True])
def test_generation_ends_at_its_length(card: Callable[[str], Any], finished: bool) -> None:
    """A condition that decides alone does so beside one that no kernel computed."""
    assert card("A100 80GB").call(programs.generation_ends, finished) == finished


def test_an_unknown_mask_takes_all(values: dict[str, Any]) -> None:
    assert values["nonzero of an unknown one"] == 10
    assert values["mask on the host"] == [[True] * 3] * 2  # which generated tokens count (GRPO)


def test_elements_that_are_not_known_are_distinct(values: dict[str, Any]) -> None:
    assert (values["distinct"], values["counted most"]) == ([10, 10], 1)


def test_memory_that_is_handed_out_anew_is_not_known(card: Callable[[str], Any]) -> None:
    assert card("A100 80GB").call(programs.reuse_memory) == 0.0
