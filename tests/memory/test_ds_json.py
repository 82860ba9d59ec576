"""A DeepSpeed file and the command line: said once, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bigvivit.config import ConfigError, OptimConfig
from bigvivit.memory.ds_json import OFFLOAD_KEYS, ZERO_KEYS, find_ds_json, micro_batch_size, read_ds_json

OPTIM = OptimConfig(batch_size=64, accumulate=4, clip_norm=0.5)
SHIPPED = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))


def write(folder: Path, value: Any) -> Path:
    path = folder / "ds.json"
    path.write_text(json.dumps(value))
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_are_filled(path: Path) -> None:
    ds = read_ds_json(path, OPTIM, world=2)
    assert ds["train_batch_size"] == 64
    assert ds["train_micro_batch_size_per_gpu"] == 8
    assert ds["gradient_accumulation_steps"] == 4
    assert ds["gradient_clipping"] == 0.5
    assert "auto" not in json.dumps(ds)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_deepspeed_takes_shipped_files_as_they_are_meant(path: Path) -> None:
    """No key that DeepSpeed does not know, and every value as written: it drops what it cannot read in silence."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    ds = read_ds_json(path, OPTIM, world=1)
    block = ds["zero_optimization"]
    understood = DeepSpeedZeroConfig(**block).model_dump(by_alias=True)
    fields = DeepSpeedZeroConfig.model_fields
    for key, value in block.items():
        name = next(name for name, entry in fields.items() if key in (name, entry.alias))
        theirs = understood[fields[name].alias or name]
        for inner, own in value.items() if isinstance(value, dict) else ():
            assert theirs[inner] == own, f"{key}.{inner}"
        assert isinstance(value, dict) or theirs == value, key
    config = DeepSpeedConfig(ds)
    assert config.zero_config.stage == block["stage"]
    assert (config.train_batch_size, config.gradient_accumulation_steps) == (64, 4)


def test_every_contradiction_is_listed(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {
            "train_batch_size": 32,
            "gradient_clipping": 1.0,
            "optimizer": {"type": "Adam"},
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"},
        },
    )
    with pytest.raises(ConfigError) as caught:
        read_ds_json(path, OPTIM, world=2)
    message = str(caught.value)
    assert "train_batch_size is 32, but --optim.batch-size says 64" in message
    assert "gradient_clipping is 1.0, but --optim.clip-norm says 0.5" in message
    assert "optimizer is a block here" in message
    assert "bf16 is a block here" in message
    assert 'zero_optimization.reduce_bucket_size is "auto"' in message
    assert len(message.splitlines()) == 6


def test_what_agrees_may_be_said_twice(tmp_path: Path) -> None:
    path = write(tmp_path, {"train_batch_size": 64, "zero_optimization": {"stage": 1}})
    assert read_ds_json(path, OPTIM, world=2)["train_batch_size"] == 64


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[1]", "holds a list"), (None, "cannot be read")])
def test_unreadable_files(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_ds_json(path, OPTIM, world=2)


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"optim\.batch_size=64 does not divide over 3 ranks \* optim\.accumulate=4; try 72"
    ):
        micro_batch_size(OPTIM, 3)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"stage": 0}, "zero_optimization.offload_optimizer is for the stages 1 to 3, and stage is 0"),
        (
            {"stage": 2, "offload_param": {"device": "cpu"}},
            "zero_optimization.offload_param is for stage 3, and stage is 2",
        ),
        (
            {"stage": 3, "offload_optimizer": {"device": "nvme", "pin_memory": True}},
            "zero_optimization.offload_optimizer.device is 'nvme': cpu, or none",
        ),
        (
            {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.3}},
            "zero_optimization.offload_optimizer.ratio is no key that is read here",
        ),
        (
            {"stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": 1}},
            "zero_optimization.offload_optimizer.pin_memory is 1: it must be true or false",
        ),
        ({"stage": 3, "offload_optimizer": "cpu"}, "offload_optimizer is 'cpu': it must be an object"),
        ({"stage": 3, "offload_optimizer": "auto"}, 'offload_optimizer is "auto", which nothing here fills'),
    ],
)
def test_offloads_that_would_do_nothing_or_too_much(changes: dict[str, Any], fault: str, tmp_path: Path) -> None:
    path = write(tmp_path, {"zero_optimization": {"offload_optimizer": {"device": "cpu"}, **changes}})
    with pytest.raises(ConfigError) as caught:
        read_ds_json(path, OPTIM, world=2)
    assert fault in str(caught.value)
    assert len(str(caught.value).splitlines()) == 2


def test_deepspeeds_own_optimizers_cannot_be_forced(tmp_path: Path) -> None:
    path = write(tmp_path, {"zero_force_ds_cpu_optimizer": True, "zero_optimization": {"stage": 2}})
    with pytest.raises(ConfigError, match="zero_force_ds_cpu_optimizer is true, which refuses all but DeepSpeed's own"):
        read_ds_json(path, OPTIM, world=2)
    path = write(tmp_path, {"zero_force_ds_cpu_optimizer": False, "zero_optimization": {"stage": 2}})
    assert read_ds_json(path, OPTIM, world=2)["zero_force_ds_cpu_optimizer"] is False


def test_every_offload_key_is_one_that_deepspeed_reads() -> None:
    from deepspeed.runtime.zero import offload_config

    for kind in ("Param", "Optimizer"):
        theirs = getattr(offload_config, f"DeepSpeedZeroOffload{kind}Config").model_fields
        assert set(OFFLOAD_KEYS) <= set(theirs)


def test_every_zero_key_is_one_that_deepspeed_reads() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    theirs = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    assert set(ZERO_KEYS) <= theirs


def test_a_file_comes_before_the_name_that_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_ds_json(Path("zero3")).read_text() == (SHIPPED[0].parent / "zero3.json").read_text()
    assert find_ds_json(Path("sub/zero3")) == Path("sub/zero3")
    (tmp_path / "zero3").mkdir()  # a run may be called so
    assert find_ds_json(Path("zero3")).is_file()
    (tmp_path / "zero3").rmdir()
    (tmp_path / "zero3").write_text("{}")
    assert find_ds_json(Path("zero3")) == Path("zero3")
    with pytest.raises(ConfigError, match=r"ds=zero5 cannot be read .*, or a name: zero2, zero3, zero3_offload"):
        read_ds_json(Path("zero5"), OPTIM, 1)
