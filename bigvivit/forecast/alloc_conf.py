"""Settings of PyTorch's CUDA caching allocator, as `PYTORCH_ALLOC_CONF` (or `PYTORCH_CUDA_ALLOC_CONF`) gives them.

Source: c10/core/AllocatorConfig.h and .cpp, c10/cuda/CUDAAllocatorConfig.h of PyTorch. A test lets the installed torch
parse the same texts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from bigvivit.config import ConfigError
from bigvivit.units import MiB

INTERVALS = 16
"""`roundup_power2_divisions` has one entry for each power of two from 1 MiB to 32 GiB."""
NOT_MODELLED = {
    *("pinned_use_cuda_host_register", "pinned_use_hip_host_register", "pinned_num_register_threads"),
    *("pinned_use_background_threads", "pinned_reserve_segment_size_mb", "pinned_max_round_threshold_mb"),
    *("pinned_max_cached_size_mb", "pinned_free_catch_all", "release_lock_on_cudamalloc", "release_lock_on_hipmalloc"),
    *("graph_capture_record_stream_reuse", "throw_on_cudamalloc_oom"),
}
"""Keys that PyTorch knows and that change no size on the device outside CUDA graphs: accepted and ignored."""
MODELLED = (
    *("expandable_segments", "max_split_size_mb", "max_non_split_rounding_mb", "roundup_power2_divisions"),
    *("garbage_collection_threshold", "per_process_memory_fraction", "large_segment_size_mb"),
)


@dataclass(frozen=True, kw_only=True)
class AllocatorSettings:
    """What `PYTORCH_ALLOC_CONF` can say that changes what is asked of the device. The defaults are PyTorch's."""

    expandable_segments: bool = False
    """One growing segment per stream and pool, mapped page by page, in place of one `cudaMalloc` each."""
    max_split_bytes: int | None = None
    """Blocks of this size and more are never split; None splits all."""
    max_non_split_rounding_bytes: int = 20 * MiB
    """How much larger than the request an unsplittable cached block may be."""
    roundup_power2_divisions: tuple[int, ...] = (0,) * INTERVALS
    """Steps between two powers of two that sizes are rounded up to, for each power of two from 1 MiB; 0 and 1: none."""
    garbage_collection_threshold: float = 0.0
    """Share of the allowed memory above which old cached blocks are given back; it acts only where
    `per_process_memory_fraction` is below 1, as in PyTorch. 0: off."""
    per_process_memory_fraction: float = 1.0
    """Share of the device's memory that the allocator may reserve."""
    large_segment_bytes: int = 20 * MiB
    """Segment for requests between 1 and 10 MiB, and page of large expandable segments."""

    def describe(self) -> str:
        """The text that gives these settings, as `parse_conf` reads it; `default` where it would be empty."""
        words = []
        if self.expandable_segments:
            words.append("expandable_segments:True")
        if self.large_segment_bytes != 20 * MiB:
            words.append(f"large_segment_size_mb:{self.large_segment_bytes // MiB}")
        if self.max_split_bytes is not None:
            words.append(f"max_split_size_mb:{self.max_split_bytes // MiB}")
        if self.max_non_split_rounding_bytes != 20 * MiB:
            words.append(f"max_non_split_rounding_mb:{self.max_non_split_rounding_bytes // MiB}")
        if any(self.roundup_power2_divisions):
            pairs = [f"{1 << index}:{value}" for index, value in enumerate(self.roundup_power2_divisions)]
            same = len(set(self.roundup_power2_divisions)) == 1
            value = str(self.roundup_power2_divisions[0]) if same else f"[{','.join(pairs)}]"
            words.append(f"roundup_power2_divisions:{value}")
        if self.garbage_collection_threshold:
            words.append(f"garbage_collection_threshold:{self.garbage_collection_threshold:g}")
        if self.per_process_memory_fraction < 1:
            words.append(f"per_process_memory_fraction:{self.per_process_memory_fraction:g}")
        return ",".join(words) or "default"


def parse_conf(text: str) -> AllocatorSettings:
    """Read the text of `PYTORCH_ALLOC_CONF`: `key:value,key:value`, white space ignored.

    Raises ConfigError with key, value, rule and fix, where PyTorch would refuse it too and where it means an allocator
    that is not modelled (`backend:cudaMallocAsync`).
    """
    found: dict[str, str] = {}
    for item in split_items(re.sub(r"\s+", "", text)):
        key, colon, value = item.partition(":")
        if not colon or not value:
            raise fault(item, "has no value", "write key:value, for instance max_split_size_mb:128")
        if key in found:
            raise fault(item, f"{key} is given twice", "leave one out")
        if key == "backend":
            if value != "native":
                raise fault(item, "is another allocator, not modelled here", "leave it out, or write backend:native")
        elif key not in MODELLED and key not in NOT_MODELLED:
            raise fault(item, f"{key} is none of PyTorch's keys", f"one of {', '.join(MODELLED)}")
        found[key] = value
    large = read_mebibytes(found, "large_segment_size_mb", least=11) or 20 * MiB
    # Like torch, which checks both against the segment size; the default of 20 MiB stays where neither is given.
    split = read_mebibytes(found, "max_split_size_mb", least=large // MiB)
    rounding = read_mebibytes(found, "max_non_split_rounding_mb", least=large // MiB)
    return AllocatorSettings(
        expandable_segments=read_bool(found, "expandable_segments"),
        max_split_bytes=split,
        max_non_split_rounding_bytes=rounding or 20 * MiB,
        roundup_power2_divisions=read_divisions(found.get("roundup_power2_divisions", "[>:0]")),
        garbage_collection_threshold=read_share(found, "garbage_collection_threshold", default=0.0, ends=False),
        per_process_memory_fraction=read_share(found, "per_process_memory_fraction", default=1.0, ends=True),
        large_segment_bytes=large,
    )


def fault(item: str, what: str, fix: str) -> ConfigError:
    """The error of one item."""
    return ConfigError(f"allocator setting {item!r}: {what}; {fix}")


def split_items(text: str) -> list[str]:
    """At commas outside brackets; one comma may end the text, as in PyTorch."""
    items = re.findall(r"(?:\[[^\]]*\]?|[^,\[])+|,(?=,)|^,", text)
    if any(item == "," for item in items):
        raise fault(text, "has an empty item between two commas", "write key:value,key:value")
    return items


def read_mebibytes(found: dict[str, str], key: str, least: int) -> int | None:
    """A whole number of MiB, in bytes; None where the key is not given."""
    if key not in found:
        return None
    value = found[key]
    if not value.isdecimal() or int(value) < least:
        raise fault(f"{key}:{value}", f"must be a whole number of MiB, {least} or more", f"try {key}:{max(least, 128)}")
    return int(value) * MiB


def read_bool(found: dict[str, str], key: str) -> bool:
    """As Python writes it; False where the key is not given. Raises ConfigError for anything else."""
    value = found.get(key, "False")
    if value not in ("True", "False"):
        raise fault(f"{key}:{value}", "must be True or False, with a capital letter", f"write {key}:True")
    return value == "True"


def read_share(found: dict[str, str], key: str, default: float, ends: bool) -> float:
    """A number between 0 and 1; `ends` says whether the two themselves are allowed."""
    if key not in found:
        return default
    try:
        value = float(found[key])
    except ValueError:
        value = float("nan")
    if not (0 <= value <= 1 if ends else 0 < value < 1):
        rule = "from 0 to 1" if ends else "above 0 and below 1"
        raise fault(f"{key}:{found[key]}", f"must be a number {rule}", f"try {key}:0.8")
    return value


def read_divisions(value: str) -> tuple[int, ...]:
    """One number for all sizes, or a list such as `[256:1,512:2,>:4]`: sizes in MiB, powers of two, and their numbers.

    Sizes below the first in the list get its number; sizes between two keep 0; `>` is everything above the last.
    """
    item = f"roundup_power2_divisions:{value}"

    def power(word: str, zero: bool) -> int:
        number = int(word) if word.isdecimal() else -1
        if number < 0 or number & (number - 1) or (number == 0 and not zero):
            raise fault(item, f"{word!r} is no power of two", "try roundup_power2_divisions:4 or [256:1,512:2,>:4]")
        return number

    if not value.startswith("["):
        return (power(value, zero=False),) * INTERVALS
    if not value.endswith("]"):
        raise fault(item, "the list has no closing bracket", "write [256:1,512:2,>:4]")
    divisions, last = [0] * INTERVALS, None
    for pair in value[1:-1].split(","):
        size, colon, number = pair.partition(":")
        if not colon:
            raise fault(item, f"{pair!r} is no pair", "write [256:1,512:2,>:4]")
        steps = power(number, zero=True)
        if size == ">":
            first = 1 if last is None else last + 1
            divisions[first:] = [steps] * (INTERVALS - first)
            continue
        index = min(power(size, zero=False).bit_length() - 1, INTERVALS - 1)
        if last is None:
            divisions[:index] = [steps] * index
        divisions[index] = steps
        last = index
    return tuple(divisions)
