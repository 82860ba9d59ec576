"""Rows about seconds: whole steps of both stages, a tower streamed and batched, and copies that hide."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from bigvivit.assemble import choose_device
from bigvivit.calibrate.device import clear, quick_fill, seconds_of, synchronize
from bigvivit.forecast.virtual_gpu import is_active
from bigvivit.memory.placement import Fetch, Here, Placement
from bigvivit.memory.stream import FrozenTower
from bigvivit.model.tubelet import to_tubelets
from bigvivit.training.step import LabelledClips, train_step
from bigvivit.trial import Trial, build_trial

REPEATS = 3


class Resident:
    """A placement that fetches every layer once and keeps it on the device: how long copies take by themselves, and
    from the second pass on what a tower takes whose layers are there."""

    def __init__(self, placement: Placement, device: torch.device) -> None:
        self.placement, self.device, self.seconds, self.fetches = placement, device, 0.0, 0
        self.kept: dict[int, Tensor] = {}

    def store(self, buffer: Tensor) -> int:
        return self.placement.store(buffer)

    def fetch(self, number: int) -> Fetch:
        self.fetches += 1
        if number not in self.kept:
            synchronize(self.device)
            started = time.perf_counter()
            self.kept[number] = self.placement.fetch(number).wait()
            synchronize(self.device)
            self.seconds += time.perf_counter() - started
        return Here(self.kept[number])


def build(trial: Trial, device: torch.device) -> tuple[Any, LabelledClips]:
    """As training does, clips page-locked as its loader has them."""
    virtual = is_active()
    engine, batch = build_trial(trial, device, fake=virtual, fill=None if virtual else quick_fill())
    if device.type == "cuda":
        batch.clips = batch.clips.pin_memory()
    return engine, batch


def time_step(device: str, trial: str) -> dict[str, Any]:
    """Seconds of a whole step."""
    where = choose_device(device)
    if where.type == "cuda":
        clear()
    engine, batch = build(Trial.from_json(trial), where)
    return {"seconds_per_step": seconds_of(lambda: train_step(engine, [batch]), where, REPEATS)}


def time_tower(device: str, trial: str) -> dict[str, Any]:
    """Seconds of the frozen tower alone. Where its layers come from elsewhere also of the copies by themselves, and
    with all layers there: what of the copies is hidden."""
    where = choose_device(device)
    if where.type == "cuda":
        clear()
    own = Trial.from_json(trial)
    engine, batch = build(own, where)
    tower: FrozenTower = engine.module.tower
    pixels = to_tubelets(batch.clips, own.tubelet)
    ahead = seconds_of(lambda: tower(pixels), where, REPEATS)
    if own.plan.placement == "device" or tower.placement is None:
        return {"seconds": ahead}
    layers = Resident(tower.placement, where)
    tower.placement = layers
    try:
        there = seconds_of(lambda: tower(pixels), where, REPEATS)
    except torch.OutOfMemoryError:
        return {"seconds": ahead, "hidden_share": "not known: the whole tower does not fit the device"}
    hidden = 1 - (ahead - there) / layers.seconds
    return {
        "seconds": ahead,
        "layers_there_seconds": there,
        "copies_seconds": layers.seconds,
        "hidden_share": hidden if 0 <= hidden <= 1 else "not resolved",
    }
