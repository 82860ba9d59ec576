"""A DeepSpeed configuration file made to agree with ours. Needs neither torch nor deepspeed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bigvivit.config import ConfigError, OptimConfig

SAID_ELSEWHERE = {
    "optimizer": "--optim.name, --optim.lr and their like",
    "scheduler": "--optim.epochs and --optim.warmup-epochs",
    "fp16": "--memory.autocast and --memory.storage",
    "bf16": "--memory.autocast and --memory.storage",
    "torch_autocast": "--memory.autocast",
}
"""Blocks that would say again, or against it, what the command line says."""


def read_ds_json(path: Path, optim: OptimConfig, world: int) -> dict[str, Any]:
    """The file with every `"auto"` filled from `optim`, ready for `deepspeed.initialize`.

    Raises ConfigError for a file that cannot be read, and one that lists every contradiction: DeepSpeed itself would
    silently take its default for an `"auto"` inside a block, and the file's value for what is said twice.
    """
    try:
        ds = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(
            f"ds={path} cannot be read ({error.strerror}): give the path of a DeepSpeed JSON file"
        ) from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"ds={path} is not JSON: {error}") from None
    if not isinstance(ds, dict):
        raise ConfigError(f"ds={path} holds a {type(ds).__name__}: a DeepSpeed configuration is one JSON object")

    micro = micro_batch_size(optim, world)
    ours: dict[str, tuple[int | float, str]] = {
        "train_batch_size": (optim.batch_size, "--optim.batch-size"),
        "train_micro_batch_size_per_gpu": (micro, f"batch size / ({world} ranks * --optim.accumulate)"),
        "gradient_accumulation_steps": (optim.accumulate, "--optim.accumulate"),
        "gradient_clipping": (optim.clip_norm, "--optim.clip-norm"),
    }
    faults = []
    for key, (value, source) in ours.items():
        if ds.get(key, "auto") not in ("auto", value):
            faults.append(f'{key} is {ds[key]!r}, but {source} says {value}: write "auto", or change one')
        ds[key] = value
    for key, flags in SAID_ELSEWHERE.items():
        if key in ds:
            faults.append(f"{key} is a block here, but {flags} say it: remove the block")
            del ds[key]
    faults += [f'{where} is "auto", which nothing here fills: give a number' for where in find_auto(ds)]
    if faults:
        raise ConfigError(f"ds={path} contradicts the command line:\n" + "\n".join(f"  - {fault}" for fault in faults))
    # Torch's own SGD is on no list of DeepSpeed's; its one state tensor per parameter is sharded like any other's.
    return {**ds, "zero_allow_untested_optimizer": True}


def zero_stage(ds: dict[str, Any] | None) -> int:
    """The ZeRO stage that a DeepSpeed configuration asks for; 0 without one."""
    return int((ds or {}).get("zero_optimization", {}).get("stage", 0))


def micro_batch_size(optim: OptimConfig, world: int) -> int:
    """Clips per rank and forward pass. Raises ConfigError where the batch does not divide."""
    parts = world * optim.accumulate
    if optim.batch_size % parts:
        raise ConfigError(
            f"optim.batch_size={optim.batch_size} does not divide over {world} ranks * "
            f"optim.accumulate={optim.accumulate}; try {-(-optim.batch_size // parts) * parts}"
        )
    return optim.batch_size // parts


def find_auto(value: Any, where: str = "") -> Iterator[str]:
    """Dotted paths of every "auto" left in a JSON value."""
    if value == "auto":
        yield where
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from find_auto(inner, f"{where}.{key}" if where else key)
