"""What `auto` comes to, and why."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from bigvivit.memory.plan import MemoryPlan, Stream, choose_stream
from bigvivit.trial import Trial, trace_trial
from bigvivit.units import MiB


def choose(free: int, *, costly: bool, tubelets: int = 64, **plan: Any) -> Stream:
    """A tubelet has 1 MiB of hidden states, and takes 4 MiB of work."""
    return choose_stream(
        MemoryPlan(**plan),
        tubelets=tubelets,
        hidden_bytes=MiB,
        work_bytes=4 * MiB,
        free_bytes=free * MiB,
        costly=costly,
    )


def test_layers_that_are_there_are_used_chunk_by_chunk() -> None:
    stream = choose(1000, costly=False)
    assert (stream.group, stream.chunk) == (16, 16)
    assert "chunk by chunk, since the layers are there" in stream.why


def test_layers_that_have_to_be_fetched_are_fetched_once_where_hidden_states_fit() -> None:
    stream = choose(1000, costly=True)
    assert (stream.group, stream.chunk) == (64, 16)
    assert "each is fetched once for 64 MiB of hidden states" in stream.why
    assert "64 MiB of work in 1000 MiB that are free" in stream.why


def test_short_memory_makes_small_groups_and_chunks() -> None:
    stream = choose(50, costly=True)  # a quarter for work: three tubelets; half for hidden states: 25
    assert (stream.group, stream.chunk) == (24, 3)
    assert "groups of 24, whose hidden states take 24 MiB: no more fit" in stream.why
    assert (choose(1, costly=True).group, choose(1, costly=True).chunk) == (1, 1)
    assert (choose(0, costly=False).group, choose(0, costly=False).chunk) == (1, 1)


def test_what_is_set_is_kept_and_said() -> None:
    stream = choose(1000, costly=True, group=16, chunk=4)
    assert (stream.group, stream.chunk) == (16, 4)
    assert "groups of 16 as set, chunks of 4 as set" in stream.why
    paper = choose(1, costly=True, group="all", chunk="all")
    assert (paper.group, paper.chunk) == (64, 64)
    assert choose(1000, costly=True, tubelets=3).chunk == 3


@pytest.mark.parametrize("storage", ["bf16", "nf4"])
def test_groups_shrink_until_the_step_fits(storage: Any, caplog: pytest.LogCaptureFixture) -> None:
    """What loading took, and what the optimizer will, is not there for hidden states: by the step, traced."""
    trial = Trial(
        stage=2, tower="vit-demo", frames=512, size=216, temporal_depth=1, classes=3,
        plan=MemoryPlan(storage=storage, compute="fp32"),
    )  # fmt: skip
    groups = []
    caplog.set_level(logging.INFO, logger="bigvivit.memory.stream")
    for room in (120 * MiB, 60 * MiB, 30 * MiB):
        caplog.clear()
        trace = trace_trial(trial, free_bytes=room, host=True, steps=2)
        assert trace.peak_bytes() <= room
        (line,) = (record.getMessage() for record in caplog.records if "256 tubelets in" in record.getMessage())
        groups.append(256 if "fetched once" in line else int(line.partition("groups of ")[2].split(",")[0]))
    assert groups[0] == 256
    assert groups[0] > groups[1] > groups[2]
