"""What training may go on with: settings of the memory plan that change no number, and none that does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bigvivit.config import ClipConfig, ConfigError, DataConfig, ModelConfig, TrainConfig
from bigvivit.training.progress import begin_checkpoint, commit_checkpoint, read_progress, write_progress


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """Of a run that has stopped at its first step."""
    (tmp_path / "train.csv").write_text("path,label\nclip.mp4,0\n")
    found = TrainConfig(
        stage=2, out=tmp_path / "run", clip=ClipConfig(frames=8), data=DataConfig(train=tmp_path / "train.csv"),
        model=ModelConfig(tower="vit-b"), init_from=tmp_path,
    )  # fmt: skip
    states: dict[str, Any] = {"scheduler": {}, "optimizer": {}, "random": {}}
    folder = begin_checkpoint(found.out, 1)
    write_progress(folder, step=1, config=found, world=1, zero_stage=0, val_top1=None, **states)
    commit_checkpoint(folder, 1)
    return found


def go_on(config: TrainConfig, **memory: Any) -> int:
    """The step that training would go on from with these settings of the memory plan."""
    changed = replace(config, memory=replace(config.memory, **memory))
    return read_progress(config.out / "checkpoints" / "step-00000001", changed, world=1, zero_stage=0).step


@pytest.mark.parametrize(
    "memory",
    [{"placement": "disk"}, {"group": 4, "chunk": 2}, {"recompute": 1}, {"offload_activations": True}],
)
def test_what_changes_no_number_may_differ(config: TrainConfig, memory: dict[str, Any]) -> None:
    assert go_on(config, **memory) == 1


@pytest.mark.parametrize("memory", [{"storage": "nf4"}, {"compute": "fp32"}, {"masters": "bf16"}])
def test_what_rounds_otherwise_may_not(config: TrainConfig, memory: dict[str, Any]) -> None:
    (name,) = memory
    with pytest.raises(ConfigError, match=rf"memory\.{name}={memory[name]}, but the run has"):
        go_on(config, **memory)
