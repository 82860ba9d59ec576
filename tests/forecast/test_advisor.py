"""Searching for settings that fit, over settings whose cost is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from bigvivit.forecast.advisor import Changes, Forecast, Lever, advise


@dataclass(frozen=True)
class Setting:
    """Bytes: 10 for each chunk and each frame, and 40 for states."""

    chunk: int = 4
    frames: int = 8
    offload: bool = False
    codes: bool = False

    def peak_bytes(self) -> int:
        return 10 * self.chunk + 10 * self.frames + (0 if self.offload else 40) - (30 if self.codes else 0)


def lever(changes: Changes, slowdown: float, *options: dict[str, int | bool]) -> Lever[Setting]:
    def change(setting: Setting) -> list[Setting]:
        changed = [replace(setting, **option) for option in options]  # type: ignore[arg-type]
        return [option for option in changed if option != setting]

    return Lever(changes, slowdown, change)


FRAMES = lever("clips", 0.0, {"frames": 4}, {"frames": 1})
CODES = lever("rounding", 0.1, {"codes": True})
OFFLOAD = lever("nothing", 0.5, {"offload": True})
CHUNK = lever("nothing", 0.1, {"chunk": 2}, {"chunk": 1})
LEVERS = [FRAMES, CODES, OFFLOAD, CHUNK]  # the order in which they are given does not matter


def within(room: int, asked: list[Setting] | None = None) -> Callable[[Setting], Forecast]:
    def forecast(setting: Setting) -> Forecast:
        if asked is not None:
            asked.append(setting)
        return Forecast(setting.peak_bytes(), setting.peak_bytes() <= room)

    return forecast


def test_exact_before_rounded_before_fewer_frames_and_cheap_before_slow() -> None:
    found = advise(Setting(), LEVERS, within(140), wanted=9)  # 160 are needed
    assert [s.setting for s in found] == [
        Setting(chunk=2), Setting(offload=True), Setting(codes=True), Setting(frames=4)
    ]  # fmt: skip
    assert [s.changes for s in found] == ["nothing", "nothing", "rounding", "clips"]
    assert [s.forecast.peak_bytes for s in found] == [140, 120, 130, 120]


def test_each_lever_in_its_weakest_way_that_suffices() -> None:
    assert advise(Setting(), [CHUNK], within(135))[0].setting == Setting(chunk=1)
    assert advise(Setting(), [FRAMES], within(100))[0].setting == Setting(frames=1)


def test_no_more_than_wanted_is_forecast() -> None:
    asked: list[Setting] = []
    assert len(advise(Setting(), LEVERS, within(140, asked), wanted=1)) == 1
    assert asked == [Setting(chunk=2)]


def test_several_together_where_none_suffices_alone_and_none_of_them_in_vain() -> None:
    first, *_ = advise(Setting(), LEVERS, within(100))
    assert first.setting == Setting(offload=True, chunk=2)  # exact, and the chunk no smaller than it must be
    assert first.slowdown == 0.6
    first, *_ = advise(Setting(), LEVERS, within(70))
    assert first.setting == Setting(offload=True, chunk=2, codes=True)
    assert first.changes == "rounding"
    (only,) = advise(Setting(), LEVERS, within(35))
    assert only.changes == "clips"
    assert only.forecast.peak_bytes <= 35


def test_nothing_is_made_up_where_nothing_fits() -> None:
    assert advise(Setting(), LEVERS, within(-100)) == []
    assert advise(Setting(), [], within(140)) == []


def test_nothing_is_forecast_twice() -> None:
    asked: list[Setting] = []
    advise(Setting(), LEVERS, within(35, asked))
    assert len(asked) == len(set(asked))
