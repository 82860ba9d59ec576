"""The most frames that fit, whoever says whether a number of them does: a forecast, or a run that really ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Capacity:
    """What a search found. `frames` fit and `frames + unit` do not, both by a probe of their own."""

    frames: int
    """0 where not even one unit fits."""
    beyond: bool
    """The search ended at its upper bound: more may fit."""
    probes: dict[int, bool]
    """Every number of frames that was tried, and whether it fitted."""


def find_capacity(fits: Callable[[int], bool], *, unit: int, most: int, guess: int | None = None) -> Capacity:
    """Search multiples of `unit` (a tubelet's frames) up to `most`, around `guess` where there is one.

    `fits` is asked about each number once, and is taken to stay false once it was.
    """
    probes: dict[int, bool] = {}

    def ask(units: int) -> bool:
        if units not in probes:
            probes[units] = fits(units * unit)
        return probes[units]

    top = most // unit
    low, high = 0, top + 1  # low fits (nothing always does), high does not (or was not asked)
    step = 1
    place = min(max((guess or unit) // unit, 1), top) if top else 0
    while 0 < place < high and place > low:
        if ask(place):
            low, place = place, min(place + step, top)
        else:
            high, place = place, max(place - step, low)
        step *= 2
        if (low and high <= top) or (not low and high <= 1):
            break
    while high - low > 1:
        middle = (low + high) // 2
        if ask(middle):
            low = middle
        else:
            high = middle
    return Capacity(low * unit, low == top, {units * unit: answer for units, answer in sorted(probes.items())})
