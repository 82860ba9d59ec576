"""Every lever of the plan under every engine, in both stages: the losses of plain fp32 training."""

from __future__ import annotations

import pytest

from tests.memory.walk import Cell, losses

EXACT = [  # levers that change where and when, not what
    {},
    {"recompute": 1},
    {"recompute": 2},
    {"offload_activations": True},
    {"recompute": 2, "offload_activations": True},
]
EXACT_FROZEN = [
    {"placement": "cpu"},
    {"placement": "disk", "chunk": 1},
    {"placement": "disk", "chunk": 2, "recompute": 1, "offload_activations": True},
    {"group": 2, "chunk": 2},
]
ROUGH = [{"masters": "bf16"}, {"masters": "bf16", "recompute": 1, "offload_activations": True}]
ROUGH_FROZEN = [
    *({"storage": storage, "placement": where} for storage in ("int8", "nf4") for where in ("device", "disk")),
    {"storage": "bf16"},
    {"storage": "nf4", "placement": "disk", "masters": "bf16", "recompute": 1, "chunk": 1},
]
EIGHT_BIT = [{}, {"recompute": 1}]


def cells(engine: str) -> list[Cell]:
    """The first of each stage is what the others are held to."""
    found: list[Cell] = []
    for stage in (1, 2):
        for plan in [*EXACT, *(EXACT_FROZEN if stage == 2 else []), *ROUGH, *(ROUGH_FROZEN if stage == 2 else [])]:
            found.append({"stage": stage, "plan": plan})
        if engine != "fsdp":  # refused there: tests/test_errors.py
            found += [{"stage": stage, "plan": plan, "optimizer": "sgd8bit"} for plan in EIGHT_BIT]
    return found


@pytest.mark.parametrize(
    "engine",
    ["plain", "ddp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero1", "zero2")), "zero3", "fsdp"],
)
def test_levers(engine: str) -> None:
    asked = cells(engine)
    expected: dict[int, list[float]] = {}
    wrong = []
    for cell, own in zip(asked, losses(engine, asked), strict=True):
        first = expected.setdefault(cell["stage"], own)
        exact = cell["plan"] in (*EXACT, *EXACT_FROZEN) and "optimizer" not in cell
        if own != pytest.approx(first, abs=2e-5 if exact else 0.15):
            wrong.append(f"{cell}: {own}, not {first}")
        if not exact and own == first:
            wrong.append(f"{cell} changed nothing")
    assert max(abs(first[-1] - first[0]) for first in expected.values()) > 0.01  # they do learn something
    assert not wrong, "\n".join(wrong)
