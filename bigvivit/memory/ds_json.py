"""A DeepSpeed configuration file made to agree with ours. Needs neither torch nor deepspeed."""

from __future__ import annotations

import difflib
import json
import math
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

FLAG, COUNT, NUMBER, TEXT, BLOCK = "true or false", "a whole number from 0", "a number", "text", "an object"
KEYS = {
    "train_batch_size": COUNT,
    "train_micro_batch_size_per_gpu": COUNT,
    "gradient_accumulation_steps": COUNT,
    "gradient_clipping": NUMBER,
    "steps_per_print": COUNT,
    "wall_clock_breakdown": FLAG,
    "memory_breakdown": FLAG,
    "dump_state": FLAG,
    "prescale_gradients": FLAG,
    "gradient_predivide_factor": NUMBER,
    "communication_data_type": TEXT,
    "comms_logger": BLOCK,
    "flops_profiler": BLOCK,
    "zero_allow_untested_optimizer": FLAG,
    "zero_force_ds_cpu_optimizer": FLAG,
    "zero_optimization": BLOCK,
}
"""Top-level keys that mean something here. DeepSpeed itself ignores a key it does not know."""
ZERO_KEYS = {
    "stage": COUNT,
    "allgather_partitions": FLAG,
    "allgather_bucket_size": COUNT,
    "overlap_comm": FLAG,
    "reduce_scatter": FLAG,
    "reduce_bucket_size": COUNT,
    "contiguous_gradients": FLAG,
    "round_robin_gradients": FLAG,
    "ignore_unused_parameters": FLAG,
    "use_multi_rank_bucket_allreduce": FLAG,
    "sub_group_size": COUNT,
    "stage3_max_live_parameters": COUNT,
    "stage3_max_reuse_distance": COUNT,
    "stage3_prefetch_bucket_size": COUNT,
    "stage3_param_persistence_threshold": COUNT,
    "stage3_model_persistence_threshold": COUNT,
    "stage3_allgather_sequential": FLAG,
    "log_trace_cache_warnings": FLAG,
    "offload_optimizer": BLOCK,
    "offload_param": BLOCK,
}
"""Keys of `zero_optimization` that mean something here."""
OFFLOADS = {"offload_optimizer": 1, "offload_param": 3}
"""What may wait in the host's memory, and from which stage on DeepSpeed knows it."""
OFFLOAD_KEYS = {"device": TEXT, "pin_memory": FLAG}
"""Keys of `offload_optimizer` and `offload_param`; the others of DeepSpeed are for NVMe and for its own Adam."""


SHIPPED = Path(__file__).resolve().parents[1] / "ds_configs"
"""DeepSpeed files that come with this package and are known by their bare names: `zero3`."""


def find_ds_json(path: Path) -> Path:
    """The file itself or, where there is none and it is a bare name, the one that comes with this package."""
    bare = SHIPPED / f"{path.name.removesuffix('.json')}.json"
    return bare if not path.is_file() and path.name == str(path) and bare.is_file() else path


def read_ds_json(path: Path, optim: OptimConfig, world: int) -> dict[str, Any]:
    """The file with every `"auto"` filled from `optim`, ready for `deepspeed.initialize`. Those that come with this
    package are also known by name: `zero2`, `zero3`, `zero3_offload`.

    Raises ConfigError for a file that cannot be read, and one that lists every contradiction: DeepSpeed itself would
    silently take its default for an `"auto"` inside a block, and the file's value for what is said twice.
    """
    try:
        ds = json.loads(find_ds_json(path).read_text())
    except OSError as error:
        names = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.json")))
        raise ConfigError(
            f"ds={path} cannot be read ({error.strerror}): give the path of a DeepSpeed JSON file, or a name: {names}"
        ) from None
    except ValueError as error:  # not JSON, or not even text
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
    faults = find_wrong_keys(ds)
    for key, (value, source) in ours.items():
        if ds.get(key, "auto") not in ("auto", value):
            faults.append(f'{key} is {ds[key]!r}, but {source} says {value}: write "auto", or change one')
        ds[key] = value
    for key, flags in SAID_ELSEWHERE.items():
        if key in ds:
            faults.append(f"{key} is a block here, but {flags} say it: remove the block")
            del ds[key]
    faults += find_wrong_offloads(ds.get("zero_optimization"))
    if ds.get("zero_force_ds_cpu_optimizer") is True:
        faults.append(
            "zero_force_ds_cpu_optimizer is true, which refuses all but DeepSpeed's own optimizers, and --optim.name "
            "takes PyTorch's and bitsandbytes': remove it"
        )
    faults += [f'{where} is "auto", which nothing here fills: give a number' for where in find_auto(ds)]
    if faults:
        raise ConfigError(f"ds={path} cannot be used:\n" + "\n".join(f"  - {fault}" for fault in faults))
    # Torch's own SGD is on no list of DeepSpeed's; its one state tensor per parameter is sharded, and offloaded, like
    # any other's. DeepSpeed's Adam for CPUs is faster there, but needs a compiler and has no counterpart elsewhere.
    return {**ds, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}


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


def find_wrong_keys(ds: dict[str, Any]) -> list[str]:
    """A fault for each key that nobody reads and each value of another type than its key's."""
    faults = []
    zero = ds.get("zero_optimization", {})
    blocks = [(ds, KEYS, "")]
    if isinstance(zero, dict):
        blocks.append((zero, ZERO_KEYS, "zero_optimization."))
        for name in OFFLOADS:
            if isinstance(block := zero.get(name), dict):
                blocks.append((block, OFFLOAD_KEYS, f"zero_optimization.{name}."))
    for block, keys, where in blocks:
        for key, value in block.items():
            if key in keys:
                if value != "auto" and not is_of_kind(value, keys[key]):
                    faults.append(f"{where}{key} is {value!r}: it must be {keys[key]}")
            elif where or key not in SAID_ELSEWHERE:
                near = difflib.get_close_matches(key, keys, n=1)
                faults.append(f"{where}{key} is no key that is read here: {f'{near[0]}?' if near else 'remove it'}")
    if isinstance(zero, dict) and is_of_kind(zero.get("stage", 0), COUNT) and zero.get("stage", 0) > 3:
        faults.append(f"zero_optimization.stage is {zero['stage']}: ZeRO has the stages 0 to 3")
    return faults


def find_wrong_offloads(zero: Any) -> list[str]:
    """A fault for each offload that DeepSpeed would ignore or that checkpoints here cannot follow."""
    faults = []
    for name, least in OFFLOADS.items():
        block = zero.get(name) if isinstance(zero, dict) else None
        if not isinstance(block, dict):
            continue
        where, stage = f"zero_optimization.{name}", zero.get("stage", 0)
        if block.get("device", "none") not in ("cpu", "none"):
            faults.append(
                f"{where}.device is {block['device']!r}: cpu, or none; checkpoints do not reach what lies on NVMe "
                f"(a frozen tower can live on disk: --memory.placement disk)"
            )
        elif block.get("device", "none") == "cpu" and is_of_kind(stage, COUNT) and stage < least:
            stages = "stage 3" if least == 3 else "the stages 1 to 3"
            faults.append(f"{where} is for {stages}, and stage is {stage}: remove the block, or raise the stage")
    return faults


def is_of_kind(value: Any, kind: str) -> bool:
    """Whether a JSON value is what its key needs. DeepSpeed's own files write counts as 5e8, too."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    kinds = {
        FLAG: isinstance(value, bool),
        COUNT: number and value >= 0 and value == int(value),
        NUMBER: number,
        TEXT: isinstance(value, str),
        BLOCK: isinstance(value, dict),
    }
    return bool(kinds[kind])


def find_auto(value: Any, where: str = "") -> Iterator[str]:
    """Dotted paths of every "auto" left in a JSON value."""
    if value == "auto":
        yield where
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from find_auto(inner, f"{where}.{key}" if where else key)
