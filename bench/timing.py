"""Rivals timed side by side in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from rich.progress import track

Name = TypeVar("Name")


def time_in_turn(rivals: Mapping[Name, Callable[[], object]], repeats: int) -> dict[Name, list[float]]:
    """Seconds of each call of each, in as many rounds, every other round in the opposite order.

    Whatever else the machine does meanwhile, it does to all of them alike. Call each once before.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in rivals}
    for number in track(range(repeats), "rounds"):
        for name in list(rivals)[:: -1 if number % 2 else 1]:
            start = time.perf_counter()
            rivals[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(seconds: Sequence[float]) -> float:
    """Slowest less fastest."""
    return max(seconds) - min(seconds)


def compare(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """`faster` or `slower` where ours was so in every round, else `not resolved`."""
    if all(own < other for own, other in zip(ours, theirs, strict=True)):
        return "faster"
    if all(own > other for own, other in zip(ours, theirs, strict=True)):
        return "slower"
    return "not resolved"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over the rounds of ours by theirs."""
    return statistics.median(own / other for own, other in zip(ours, theirs, strict=True))
