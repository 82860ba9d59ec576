"""The tower's part of a step by the CPU allocator's count, against what the plan says of it."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest

from bigvivit.trial import Trial
from bigvivit.trial_run import measure_parts

PLANS: dict[str, dict[str, Any]] = {
    "chunk-major": {"group": 2, "chunk": 2},
    "memory": {"placement": "cpu"},
    "disk": {"placement": "disk"},
    "nf4": {"storage": "nf4"},
}


@cache
def measure(plan: str, frames: int) -> dict[str, Any]:
    values = {"storage": "bf16", "compute": "fp32", "group": "all", "chunk": 2, **PLANS[plan]}
    trial = {"stage": 2, "tower": "vit-demo", "size": 48, "frames": frames, "temporal_depth": 1, "plan": values}
    return measure_parts(Trial.from_json(json.dumps(trial)))


@pytest.mark.parametrize("plan", PLANS)
def test_what_was_there_before_the_tower_ran_is_what_the_columns_say(plan: str) -> None:
    found = measure(plan, 16)
    before = found["tower_peak_bytes"] - found["pass_bytes"]
    weights_and_state = found["trainable_bytes"] * 2 // 3  # no gradients yet
    expected = weights_and_state + found["clip_bytes"] + found["tower_at_home_bytes"]
    assert expected <= before <= expected + 1024  # labels and the like


@pytest.mark.parametrize("plan", ["memory", "disk", "nf4"])
def test_layer_by_layer_memory_grows_by_the_hidden_states(plan: str) -> None:
    few, many = measure(plan, 16), measure(plan, 64)
    grown = (many["pass_bytes"] - few["pass_bytes"]) / 24
    hidden = many["hidden_bytes"] / many["tubelets_per_group"]
    assert hidden <= grown <= 1.05 * hidden


def test_chunk_by_chunk_memory_grows_by_the_vectors_alone() -> None:
    few, many = measure("chunk-major", 16), measure("chunk-major", 64)
    grown = many["pass_bytes"] - few["pass_bytes"]
    assert abs(grown - (many["vectors_bytes"] - few["vectors_bytes"])) <= 64 * 24


@pytest.mark.parametrize("plan", PLANS)
def test_the_pass_takes_what_the_plan_says(plan: str) -> None:
    """Hidden states, layers on their way and one chunk's work; nothing else in it is of their size."""
    found = measure(plan, 64)
    parts = found["hidden_bytes"] + found["fetched_bytes"] + found["work_bytes"]
    assert 0.9 * parts <= found["pass_bytes"] <= 1.25 * parts
