"""Which settings would make a step fit, best first.

A search over levers, each of which changes one thing. It is handed the levers and a function that forecasts, and knows
neither models nor devices. What leaves every number as it was comes before what rounds, and that before what shows the
model less; among equals, what costs less time comes first, by a rough guess that only orders.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

T = TypeVar("T")
Changes = Literal["nothing", "rounding", "clips"]
LEVELS: tuple[Changes, ...] = ("nothing", "rounding", "clips")
"""What a lever does to what is learnt: the same numbers; numbers rounded elsewhere; less of each clip."""


@dataclass(frozen=True)
class Lever(Generic[T]):
    """One thing that can be changed."""

    changes: Changes
    slowdown: float
    """Share of a step's time that it adds: a guess, to order by."""
    options: Callable[[T], Sequence[T]]
    """The setting changed by it, the weakest way first; none where it is refused, pointless or already so."""


@dataclass(frozen=True)
class Forecast:
    """What a setting is expected to take."""

    peak_bytes: int
    fits: bool
    evidence: Literal["forecast", "virtual"] = "forecast"


@dataclass(frozen=True)
class Suggestion(Generic[T]):
    """A setting that fits."""

    setting: T
    changes: Changes
    slowdown: float
    forecast: Forecast


def advise(
    start: T, levers: Sequence[Lever[T]], forecast: Callable[[T], Forecast], *, wanted: int = 3
) -> list[Suggestion[T]]:
    """Up to `wanted` settings that fit, the best first; none where nothing does.

    Level by level: each lever alone, in its weakest way that fits; where none suffices, several together, of which
    none can be left out.
    """
    known: list[tuple[T, Forecast]] = []  # settings need not be hashable

    def ask(setting: T) -> Forecast:
        for other, answer in known:
            if other == setting:
                return answer
        known.append((setting, forecast(setting)))
        return known[-1][1]

    ordered = sorted(levers, key=lambda lever: (LEVELS.index(lever.changes), lever.slowdown))
    found: list[Suggestion[T]] = []
    for level in LEVELS:
        alone = [lever for lever in ordered if lever.changes == level]
        before = len(found)
        for lever in alone:
            fitting = next((option for option in lever.options(start) if ask(option).fits), None)
            if fitting is not None:
                found.append(Suggestion(fitting, level, lever.slowdown, ask(fitting)))
            if len(found) == wanted:
                return found
        if alone and len(found) == before:
            allowed = [lever for lever in ordered if LEVELS.index(lever.changes) <= LEVELS.index(level)]
            together = combine(start, allowed, ask)
            if together is not None and together.setting not in [suggestion.setting for suggestion in found]:
                found.append(together)
            if len(found) == wanted:
                return found
    return found


Chosen = list[tuple[Lever[T], int]]
"""Levers in the order in which they are applied, each with the place of its option."""


def combine(start: T, levers: Sequence[Lever[T]], ask: Callable[[T], Forecast]) -> Suggestion[T] | None:
    """Levers together, each as strong as it can be, until it fits; then without, or weaker, wherever that still fits.

    None where not even all of them suffice.
    """
    chosen: Chosen[T] = []
    for lever in levers:
        if lever.options(apply(start, chosen)):
            chosen.append((lever, -1))
            if ask(apply(start, chosen)).fits:
                break
    else:
        return None
    for lever, _ in sorted(chosen, key=lambda entry: (LEVELS.index(entry[0].changes), entry[0].slowdown), reverse=True):
        without = [entry for entry in chosen if entry[0] is not lever]
        if ask(apply(start, without)).fits:
            chosen = without
            continue
        place = next(place for place, entry in enumerate(chosen) if entry[0] is lever)
        for option in range(len(lever.options(apply(start, chosen[:place]))) - 1):
            weaker = [*chosen[:place], (lever, option), *chosen[place + 1 :]]
            if ask(apply(start, weaker)).fits:
                chosen = weaker
                break
    setting = apply(start, chosen)
    level = max((lever.changes for lever, _ in chosen), key=LEVELS.index)
    return Suggestion(setting, level, sum(lever.slowdown for lever, _ in chosen), ask(setting))


def apply(start: T, chosen: Chosen[T]) -> T:
    """The setting with these changes, one after the other; what another one has made pointless is passed over."""
    setting = start
    for lever, option in chosen:
        options = lever.options(setting)
        if options:
            setting = options[min(option, len(options) - 1)]
    return setting
