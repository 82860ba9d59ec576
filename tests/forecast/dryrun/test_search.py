"""Doubling and bisection, over programs that are functions here."""

from __future__ import annotations

import pytest

from bigvivit.config import ConfigError
from bigvivit.forecast.dryrun.launch import Outcome, Request
from bigvivit.forecast.dryrun.search import LARGEST, Search, fill, find_value, parse_template, search

COMMAND = ("python", "train.py", "--batch-size", "16")


def outcome(word: str, allocated: int) -> Outcome:
    """How a run looks that ended so."""
    record = {
        **{"ended": "steps", "steps": 3, "world": 1, "shortages": [], "error": {"text": "no memory"}},
        "error_is_out_of_memory": word == "out of memory",
        "devices": [{"peak_allocated_bytes": allocated}],
    }
    request = Request(command=COMMAND, gpu="L4", gpus=1, steps=3)
    records = () if word == "failed" else (record,)
    made = Outcome(
        request=request, exit_code=0 if word == "fits" else 1, records=records, output="", seconds=1.0, timed_out=False
    )
    assert made.word == word
    return made


def find(
    most: int, command: tuple[str, ...] = COMMAND, *, fails_at: int = LARGEST * 4, data: int = LARGEST * 4
) -> Search:
    tried: list[int] = []

    def run(words: tuple[str, ...], value: int) -> Outcome:
        assert find_value(words, ["--batch-size", "{}"]) == (2, value)
        assert value not in tried, "a value was tried twice"
        tried.append(value)
        if value >= fails_at:
            return outcome("failed", 0)
        return outcome("fits" if value <= most else "out of memory", min(value, data))

    return search(command, ["--batch-size", "{}"], run)


@pytest.mark.parametrize("most", [1, 2, 3, 11, 16, 17, 31, 100, 1000])
def test_the_largest_that_fits_is_found(most: int) -> None:
    found = find(most)
    assert (found.largest, found.smallest_above, found.stopped) == (most, most + 1, "")
    assert len(found.outcomes) <= 2 * max(most, 16).bit_length() + 2


def test_without_a_value_in_the_command_it_begins_with_1() -> None:
    assert next(iter(find(5, COMMAND[:2]).outcomes)) == 1
    assert next(iter(find(5).outcomes)) == 16


def test_even_1_does_not_fit() -> None:
    found = find(0)
    assert (found.largest, found.smallest_above) == (None, 1)


def test_a_search_that_cannot_go_on_says_why() -> None:
    assert "did not fail of memory" in find(1000, fails_at=64).stopped
    assert find(1000, fails_at=64).largest == 32
    found = find(LARGEST * 2, data=100)  # fewer samples than the batch
    assert (found.largest, found.smallest_above) == (256, None)
    assert found.stopped.startswith("256 take no more memory than 128")
    assert find(LARGEST * 2).stopped.startswith(str(LARGEST))


def test_the_value_is_put_where_the_command_has_it() -> None:
    assert fill(COMMAND, ["--batch-size", "{}"], 8) == ("python", "train.py", "--batch-size", "8")
    words = ("python", "train.py", "data.batch=4", "--lr", "3")
    assert fill(words, ["data.batch={}"], 8) == ("python", "train.py", "data.batch=8", "--lr", "3")
    assert fill(("python", "train.py"), ["-b", "{}"], 8) == ("python", "train.py", "-b", "8")


@pytest.mark.parametrize("text", ["--batch-size", "{} {}", "'--batch {}"])
def test_a_template_has_one_place(text: str) -> None:
    with pytest.raises(ConfigError, match="search="):
        parse_template(text)
