"""Allocator settings: the same texts that the installed torch accepts and refuses."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from bigvivit.config import ConfigError
from bigvivit.forecast.alloc_conf import MODELLED, NOT_MODELLED, AllocatorSettings, parse_conf
from bigvivit.units import MiB

ACCEPTED = [
    *(
        "",
        "expandable_segments:True",
        "expandable_segments:False",
        " max_split_size_mb : 20 ",
        "max_split_size_mb:4096",
    ),
    *("max_split_size_mb:20,expandable_segments:True", "garbage_collection_threshold:0.8,", "backend:native"),
    *("garbage_collection_threshold:0.001", "max_non_split_rounding_mb:20", "large_segment_size_mb:11"),
    *(
        "large_segment_size_mb:40,max_split_size_mb:40",
        "per_process_memory_fraction:0",
        "per_process_memory_fraction:1",
    ),
    *("roundup_power2_divisions:1", "roundup_power2_divisions:16", "roundup_power2_divisions:[256:1,512:2,>:4]"),
    *(
        "roundup_power2_divisions:[>:8]",
        "roundup_power2_divisions:[1:0,131072:2]",
        "pinned_use_background_threads:True",
    ),
    *("release_lock_on_cudamalloc:True,max_split_size_mb:100", "roundup_power2_divisions:[64:8],max_split_size_mb:50"),
]
REFUSED = [
    *("max_split_size_mb:19", "max_split_size_mb", "max_split_size_mb:", "max_split_size_mb:x", "max_split_size_mb=64"),
    *("expandable_segments:true", "expandable_segments:1", "bogus:1", "expandable_segment:True"),
    *("garbage_collection_threshold:0", "garbage_collection_threshold:1", "garbage_collection_threshold:no"),
    *("per_process_memory_fraction:1.1", "per_process_memory_fraction:-0.1", "large_segment_size_mb:10"),
    *("roundup_power2_divisions:3", "roundup_power2_divisions:0", "roundup_power2_divisions:[300:4]"),
    *("roundup_power2_divisions:[256:3]", "roundup_power2_divisions:[256:4", "roundup_power2_divisions:[256]"),
    *("max_non_split_rounding_mb:10", "large_segment_size_mb:40,max_split_size_mb:30", "backend:other"),
]
STRICTER = {
    # torch reads these as something that nobody meant: a huge number, the number before the letters, the last one
    **{"max_split_size_mb:-5": "whole number", "max_split_size_mb:64MB": "whole number"},
    **{
        "max_split_size_mb:64,max_split_size_mb:32": "given twice",
    },
}
ASK_TORCH = """
import json, os, sys, torch
answers = {}
for text in json.load(sys.stdin):
    pid = os.fork()
    if not pid:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            torch._C._accelerator_setAllocatorSettings(text)
        except (ValueError, RuntimeError):
            os._exit(1)
        os._exit(0)
    answers[text] = os.waitpid(pid, 0)[1] == 0
print(json.dumps(answers))
"""


def test_torch_agrees() -> None:
    texts = [*ACCEPTED, *REFUSED, *STRICTER]
    done = subprocess.run(
        [sys.executable, "-c", ASK_TORCH],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    answers = json.loads(done.stdout)
    assert [text for text in ACCEPTED if not answers[text]] == []
    assert [text for text in REFUSED if answers[text]] == []
    assert all(answers[text] for text in STRICTER)


@pytest.mark.parametrize("text", ACCEPTED)
def test_accepted(text: str) -> None:
    settings = parse_conf(text)
    described = settings.describe()
    assert parse_conf("" if described == "default" else described) == settings


@pytest.mark.parametrize("text", REFUSED)
def test_refused_with_the_item_and_a_fix(text: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_conf(text)
    message = str(raised.value)
    assert message.startswith("allocator setting '")
    assert "; " in message


@pytest.mark.parametrize("text", STRICTER)
def test_refused_where_torch_misreads(text: str) -> None:
    with pytest.raises(ConfigError, match=STRICTER[text]):
        parse_conf(text)


def test_an_allocator_that_is_not_modelled() -> None:
    with pytest.raises(ConfigError, match="another allocator"):
        parse_conf("backend:cudaMallocAsync")


def test_values() -> None:
    settings = parse_conf(
        "max_split_size_mb:128,roundup_power2_divisions:[256:1,512:2,1024:4,>:8],expandable_segments:True,"
        "garbage_collection_threshold:0.6,per_process_memory_fraction:0.9,large_segment_size_mb:40,"
        "max_non_split_rounding_mb:64"
    )
    assert settings == AllocatorSettings(
        expandable_segments=True,
        max_split_bytes=128 * MiB,
        max_non_split_rounding_bytes=64 * MiB,
        roundup_power2_divisions=(1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 4, 8, 8, 8, 8, 8),
        garbage_collection_threshold=0.6,
        per_process_memory_fraction=0.9,
        large_segment_bytes=40 * MiB,
    )
    assert parse_conf("") == AllocatorSettings()


def test_every_key_that_is_ignored_is_one() -> None:
    """Keys are PyTorch's; those without effect on sizes are accepted."""
    assert not NOT_MODELLED & set(MODELLED)
    for key in NOT_MODELLED:
        assert parse_conf(f"{key}:True") == AllocatorSettings()
