"""The search for the most frames that fit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigvivit.forecast.capacity import find_capacity


@given(
    limit=st.integers(0, 400), unit=st.integers(1, 4), most=st.integers(1, 400), guess=st.none() | st.integers(1, 500)
)
def test_it_is_the_last_that_fits_and_the_next_was_asked(limit: int, unit: int, most: int, guess: int | None) -> None:
    asked: list[int] = []

    def fits(frames: int) -> bool:
        asked.append(frames)
        return frames <= limit

    found = find_capacity(fits, unit=unit, most=most, guess=guess)
    assert found.frames == min(limit, most) // unit * unit
    assert found.beyond == (limit >= most // unit * unit)
    assert len(asked) == len(set(asked)) == len(found.probes)
    assert found.frames == 0 or found.probes[found.frames]
    if found.frames + unit <= most:
        assert found.probes[found.frames + unit] is False


@pytest.mark.parametrize("guess", [100, 96, 104])
def test_a_good_guess_saves_probes(guess: int) -> None:
    found = find_capacity(lambda frames: frames <= 100, unit=2, most=4096, guess=guess)
    assert len(found.probes) <= 5
    assert len(find_capacity(lambda frames: frames <= 100, unit=2, most=4096).probes) > 8
