"""The break-even of sharding against arithmetic by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bigvivit.forecast.hardware import accelerator_by_hand, find_accelerator
from bigvivit.forecast.sharding import COMPUTE_SHARE, LINK_SHARE, BreakEven, TowerSize, break_even, explain_sharding
from bigvivit.trial import Trial, size_trial
from bigvivit.units import GiB

SIZE = TowerSize(stored_bytes=1000, largest_layer_bytes=50, operations=20)


def test_the_arithmetic() -> None:
    """Three of four parts are moved; a gather takes 7.5 s, a tubelet 2 s."""
    found = break_even(SIZE, ranks=4, tubelets=3, groups=1, link=100.0, rate=10.0)
    assert found == BreakEven(750 - 2 * 50, 750, 7.5, 6.0, tubelets=4)
    assert found.waits_seconds == 1.5
    assert break_even(SIZE, ranks=4, tubelets=4, groups=1, link=100.0, rate=10.0).waits_seconds == 0
    assert break_even(SIZE, ranks=4, tubelets=3, groups=2, link=100.0, rate=10.0).moved_bytes == 1500


def test_a_tower_is_sized_as_its_dimensions_say() -> None:
    """vit-demo: four layers of width 128 and MLP 512 over 16 patches of 12 x 12 and a CLS token."""
    found = size_trial(Trial(stage=2, tower="vit-demo", frames=2, size=48))
    tokens, width, mlp, patch = 17, 128, 512, 6 * 12 * 12
    layer = 2 * tokens * (4 * width * width + 2 * width * mlp) + 2 * 2 * tokens * tokens * width
    assert found.operations == pytest.approx(4 * layer + 2 * 16 * patch * width, rel=1e-3)
    weights = 4 * width * width + 2 * width * mlp + 4 * width + mlp + width + 4 * width  # with biases and norms
    assert found.largest_layer_bytes == pytest.approx(2 * weights, rel=0.01)
    assert 4 * found.largest_layer_bytes < found.stored_bytes < 5 * found.largest_layer_bytes


def test_faster_links_break_even_earlier_and_faster_cards_later() -> None:
    def tubelets(card: str) -> int:
        row = find_accelerator(card)
        assert row.link_bandwidth is not None
        link, rate = row.link_bandwidth * LINK_SHARE, row.rates["fp16"] * COMPUTE_SHARE
        size = TowerSize(2 * GiB, GiB // 20, 10**12)
        return break_even(size, ranks=8, tubelets=1, groups=1, link=link, rate=rate).tubelets

    assert tubelets("A100 80GB") < tubelets("RTX 3090")  # NVLink
    assert tubelets("RTX 4090") > tubelets("RTX 3090")  # the same PCIe, and more to do meanwhile


def test_what_people_read() -> None:
    card = find_accelerator("RTX 3090")
    size = TowerSize(2 * GiB, GiB // 20, 10**12)

    def lines(**changes: object) -> str:
        given: dict[str, object] = {"ranks": 8, "tubelets": 64, "groups": 1, "frames": 2, "compute": "bf16"}
        return "\n".join(explain_sharding(size, changes.pop("card", card), **{**given, **changes}))  # type: ignore[arg-type]

    assert "nothing of it is measured" in lines()
    assert "break-even" in lines()
    assert "costs next to no time" in lines(tubelets=64)
    assert "only where memory is short" in lines(tubelets=1)
    assert "its link's rate is not in the table" in lines(card=accelerator_by_hand(24 * GiB))
    assert "its rate in bf16 is not in the table" in lines(card=replace(card, rates={}))
    assert "saves nothing" in "\n".join(
        explain_sharding(
            replace(size, largest_layer_bytes=GiB), card, ranks=2, tubelets=1, groups=1, frames=2, compute="bf16"
        )
    )
