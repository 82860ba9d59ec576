"""The largest value of a command's argument with which it still fits: doubling, then bisection, each a dry run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field

from bigvivit.config import ConfigError
from bigvivit.forecast.dryrun.launch import Outcome

LARGEST = 1 << 20
"""Values are not tried beyond this."""
PLACE = "{}"


@dataclass
class Search:
    """What was tried, and what came of it."""

    outcomes: dict[int, Outcome] = field(default_factory=dict)
    largest: int | None = None
    """The largest value known to fit."""
    smallest_above: int | None = None
    """The smallest value known not to fit."""
    stopped: str = ""
    """Why it ended early, in words."""


def parse_template(text: str) -> list[str]:
    """The words of `--batch-size {}`; raises ConfigError where there is not one `{}`."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"search={text!r}: {error}; write it as on a command line") from None
    if text.count(PLACE) != 1:
        raise ConfigError(f"search={text!r} must have one {PLACE} for the value: --batch-size {PLACE}, for instance")
    return words


def find_value(command: tuple[str, ...], template: list[str]) -> tuple[int, int] | None:
    """Where in the command the template's words stand, and with which value; None where they do not."""
    patterns = [re.compile(re.escape(word).replace(re.escape(PLACE), "([0-9]+)")) for word in template]
    for start in range(len(command) - len(template) + 1):
        matches = [
            pattern.fullmatch(word)
            for pattern, word in zip(patterns, command[start : start + len(template)], strict=True)
        ]
        if all(matches):
            return start, int(next(match[1] for match in matches if match and match.groups()))
    return None


def fill(command: tuple[str, ...], template: list[str], value: int) -> tuple[str, ...]:
    """The command with this value: in place of the one it has, else at its end."""
    words = tuple(word.replace(PLACE, str(value)) for word in template)
    found = find_value(command, template)
    if found is None:
        return (*command, *words)
    start, _ = found
    return (*command[:start], *words, *command[start + len(words) :])


def search(command: tuple[str, ...], template: list[str], run: Callable[[tuple[str, ...], int], Outcome]) -> Search:
    """Find the largest value that fits, beginning with the one the command has, else with 1.

    Ends early, and says why, where a run failed of something else than memory, or where twice the value takes no more.
    """
    found = find_value(command, template)
    state = Search()

    def fits(value: int) -> bool | None:
        """Whether it fits, remembered; None ends the search."""
        if value not in state.outcomes:
            state.outcomes[value] = run(fill(command, template, value), value)
        word = state.outcomes[value].word
        if word == "fits":
            state.largest = max(value, state.largest or 0)
            return True
        if word == "out of memory":
            state.smallest_above = min(value, state.smallest_above or value)
            return False
        state.stopped = f"with {value} the program did not fail of memory ({word})"
        return None

    value = max(found[1], 1) if found else 1
    while state.largest is None or state.smallest_above is None:
        held = fits(value)
        if held is None or (held is False and value == 1):
            return state
        if held and stands_still(state, value):
            state.stopped = f"{value} take no more memory than {value // 2}: is there less data than that in a batch?"
            return state
        if held and value >= LARGEST:
            state.stopped = f"{LARGEST} and more were not tried"
            return state
        value = value * 2 if held else value // 2
    while state.smallest_above - state.largest > 1:
        if fits((state.smallest_above + state.largest) // 2) is None:
            return state
    return state


def stands_still(state: Search, value: int) -> bool:
    """Whether doubling to this value changed nothing."""
    half = state.outcomes.get(value // 2)
    return half is not None and half.peak("peak_allocated_bytes") == state.outcomes[value].peak("peak_allocated_bytes")
