"""Settings and the rules between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bigvivit.config import (
    ClipConfig,
    ConfigError,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    check_frames,
    resolve_model,
)

CLIP, DATA = ClipConfig(frames=8), DataConfig(train=Path("train.csv"))
TOWER = ModelConfig(tower="vit-b")


def train_config(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"stage": 1, "out": Path("run"), "clip": CLIP, "data": DATA, "model": TOWER, **changes})


WRONG: list[tuple[Any, dict[str, Any], str]] = [
    (ClipConfig, {"frames": 0}, r"clip\.frames=0 must be at least 1"),
    (ClipConfig, {"frames": 8, "stride": 0}, r"clip\.stride=0 must be at least 1"),
    (
        ClipConfig,
        {"frames": 8, "size": 256, "resize": 224},
        r"clip\.resize=224 is below clip\.size=256.*--clip\.resize 256",
    ),
    (ClipConfig, {"frames": 8, "min_scale": 2.0}, r"0 < min_scale <= max_scale"),
    (ModelConfig, {"tubelet": 0}, r"model\.tubelet=0 must be at least 1"),
    (ModelConfig, {"temporal_depth": 0}, r"model\.temporal_depth=0"),
    (ModelConfig, {"droplayer": 1.0}, r"model\.droplayer=1\.0 is a probability"),
    (DataConfig, {"train": Path("x"), "workers": -1}, r"data\.workers=-1 must not be negative"),
    (OptimConfig, {"lr": 0.0}, r"optim\.lr=0\.0 must be a number above 0"),
    (OptimConfig, {"batch_size": 0}, r"optim\.batch_size=0 must be at least 1"),
    (OptimConfig, {"weight_decay": -1.0}, r"optim\.weight_decay=-1\.0 must be a number from 0"),
    (OptimConfig, {"epochs": 2.0}, r"optim\.warmup_epochs=2\.5 leaves nothing of optim\.epochs=2\.0"),
    (OptimConfig, {"label_smoothing": 1.0}, r"optim\.label_smoothing=1\.0"),
    (EvalConfig, {"runs": (Path("r"),), "manifest": Path("m"), "views": 0}, r"views=0 must be at least 1"),
    (EvalConfig, {"runs": (Path("r"),), "manifest": Path("m"), "workers": -2}, r"workers=-2 must not be negative"),
    (EvalConfig, {"runs": (Path("r"),), "manifest": Path("m"), "cache": Path(__file__)}, r"cache=.*is not a folder"),
    (
        train_config,
        {"stage": 2, "data": DataConfig(train=Path("x"), cache=Path(__file__, "sub"))},
        r"data\.cache=.*sub: .*test_config\.py is not a folder",
    ),
    (train_config, {"log_every": 0}, r"log_every=0"),
    (ClipConfig, {"frames": 8, "stride": 2, "fps": 4.0}, r"clip\.stride=2 and clip\.fps=4\.0 both set a distance"),
    (ClipConfig, {"frames": 8, "short": "loop"}, r"clip\.short=loop is for clips by clip\.stride or clip\.fps"),
    (ClipConfig, {"frames": 8, "fps": -1.0}, r"clip\.fps=-1\.0 is not a number of frames per second above 0"),
    (OptimConfig, {"head_lr": 0.0}, r"optim\.head_lr=0\.0 must be a number above 0"),
    (OptimConfig, {"steps": 0}, r"optim\.steps=0 must be at least 1"),
    (OptimConfig, {"patience": -1}, r"optim\.patience=-1 must not be negative"),
    (OptimConfig, {"layer_decay": 1.5}, r"optim\.layer_decay=1\.5 must be above 0 and at most 1"),
    (OptimConfig, {"ema": 1.0}, r"optim\.ema=1\.0 is a decay.*0\.999"),
    (train_config, {"stage": 2, "optim": OptimConfig(tower_lr=0.1)}, r"optim\.tower_lr=0\.1.*are for stage 1"),
    (train_config, {"optim": OptimConfig(adapter_lr=0.1)}, r"optim\.adapter_lr=0\.1 is for stage 2"),
    (train_config, {"optim": OptimConfig(ema=0.9), "ds": Path("z.json")}, r"optim\.ema=0\.9 under ds=z\.json.*--fsdp"),
    (train_config, {"optim": OptimConfig(patience=2)}, r"optim\.patience=2 counts validations: give --data\.val"),
    (train_config, {"stage": 2, "model": ModelConfig()}, r"stage=2 needs init_from: give --init-from"),
    (train_config, {"init_from": Path("x")}, r"init_from=x is for stage 2"),
    (train_config, {"model": ModelConfig()}, r"model\.tower is not set: stage 1 needs an image tower"),
    (train_config, {"clip": ClipConfig(frames=7)}, r"clip\.frames=7 is not a multiple of model\.tubelet=2; try 6 or 8"),
]


@pytest.mark.parametrize(("build", "values", "message"), WRONG, ids=[message[:40] for _, _, message in WRONG])
def test_what_cannot_be_is_refused(build: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**values)


def test_defaults_of_a_first_stage() -> None:
    model = train_config().model
    assert (model.tower, model.tower_init, model.tubelet, model.temporal_depth) == ("vit-b", "pretrained", 2, 4)


def test_a_second_stage_takes_the_model_from_the_first() -> None:
    first = ModelConfig(tower="x", tower_init="random", tubelet=4, temporal_depth=6, droplayer=0.3)
    second = resolve_model(ModelConfig(droplayer=0.1), inherited=first)
    assert second == ModelConfig(tower="x", tower_init="random", tubelet=4, temporal_depth=6, droplayer=0.1)
    with pytest.raises(
        ConfigError, match=r"model\.tower=y, but stage 1 was trained with x; model\.tubelet=2, but .* 4"
    ):
        resolve_model(ModelConfig(tower="y", tubelet=2), inherited=first)


@pytest.mark.parametrize(("frames", "tubelet", "fix"), [(1, 2, "try 2"), (9, 4, "try 8 or 12")])
def test_frames_fill_tubelets(frames: int, tubelet: int, fix: str) -> None:
    with pytest.raises(ConfigError, match=fix):
        check_frames(frames, tubelet)
