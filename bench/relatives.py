"""Streaming a frozen tower, ours against its nearest relatives: `python -m bench.relatives`.

The relatives are accelerate's `disk_offload` and `cpu_offload` of Hugging Face's own, unmodified model. Both sides get
the same weights and the same frames, store and compute in fp32, and are timed in turn in one process. Memory and moved
weights come from a fresh process for each, which runs one forward.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import accelerate
import accelerate.hooks
import torch
from rich.progress import track
from torch import Tensor, nn
from transformers import ViTModel

from bench.timing import compare, ratio, spread, time_in_turn
from bigvivit.memory.apply import apply_plan
from bigvivit.memory.measure import count_cpu_allocations, measure_peak
from bigvivit.memory.placement import Fetch
from bigvivit.memory.plan import MemoryPlan
from bigvivit.memory.stream import FrozenTower
from bigvivit.model.catalog import SIZES
from bigvivit.model.towers import build_tower, resolve_tower
from bigvivit.model.weights import open_weights
from bigvivit.processes import run_ranks
from bigvivit.training.report import run_bench, write_report
from bigvivit.units import KiB, format_bytes

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(64 * KiB),
    "MALLOC_TRIM_THRESHOLD_": str(64 * KiB),
    "OMP_NUM_THREADS": str(os.cpu_count()),
}
"""Of a process whose memory counts: glibc gives back what is freed."""
MOVED = 1.02
"""Target: bytes of weights that ours moves in a forward, by the tower's own."""
Side = Literal["ours", "accelerate"]
Where = Literal["cpu", "disk"]
SIDES: tuple[Side, ...] = ("ours", "accelerate")
WHERE: tuple[Where, ...] = ("cpu", "disk")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Compare, and write a report."""

    tower: Literal["vit-b", "vit-l", "vit-h", "vit-g", "vit-demo"] = "vit-b"
    """Size of the tower. Its weights are drawn."""
    frames: int = 8
    """Frames that go through it, each an image."""
    chunks: tuple[int, ...] = (8, 4, 2)
    """Frames that go through at once: first all of them, then fewer."""
    repeats: int = 5
    """Rounds of timing."""
    results: Path = ROOT / "bench" / "results"
    """Folder of reports."""


@dataclass(frozen=True)
class Rival:
    """One way to run the tower."""

    side: Side
    where: Where
    chunk: int
    folder: str
    """Of the model, as Hugging Face saves it."""


@dataclass(frozen=True)
class Built:
    """A rival, ready to run."""

    forward: Callable[[Tensor], Tensor]
    """uint8 frames [n, 3, h, w] to vectors [n, width]."""
    model: nn.Module
    weights: dict[str, Tensor]
    """What accelerate keeps in memory."""


def build(rival: Rival, scratch: Path) -> Built:
    """`scratch` is an empty folder for a tower on disk."""
    return build_ours(rival) if rival.side == "ours" else build_theirs(rival, scratch)


def build_ours(rival: Rival) -> Built:
    """A frozen tower that goes layer by layer: each is fetched once, whatever the number of chunks."""
    spec, model = resolve_tower(rival.folder), nn.Module()
    model.tower = build_tower(spec, tubelet=1, image_size=spec.config.image_size, droplayer=0.0)
    plan = MemoryPlan(storage="fp32", compute="fp32", placement=rival.where, group="all", chunk=rival.chunk)
    fill = open_weights(spec, Path(rival.folder), tubelet=1)
    apply_plan(model, plan, frozen=True, fill=fill, device=torch.device("cpu"))
    assert isinstance(model.tower, FrozenTower)
    return Built(model.tower, model.tower, {})


def build_theirs(rival: Rival, scratch: Path) -> Built:
    """Hugging Face's model with accelerate's hooks, which fetch parameter by parameter in every call."""
    spec, device = resolve_tower(rival.folder), torch.device("cpu")
    model = ViTModel.from_pretrained(rival.folder, add_pooling_layer=False, attn_implementation="sdpa").eval()
    weights = dict(model.state_dict()) if rival.where == "cpu" else {}
    if rival.where == "cpu":
        accelerate.cpu_offload(model, execution_device=device, state_dict=weights)
    else:
        accelerate.disk_offload(model, scratch, execution_device=device)
    mean, std = (torch.tensor(rgb).view(3, 1, 1) for rgb in (spec.mean, spec.std))

    def forward(pixels: Tensor) -> Tensor:
        with torch.no_grad():
            parts = pixels.split(rival.chunk)
            return torch.cat([model((part / 255 - mean) / std).last_hidden_state[:, 0] for part in parts])

    return Built(forward, model, weights)


@contextmanager
def count_moved(built: Built) -> Iterator[Counter[str]]:
    """Bytes of weights that are handed to layers while this lasts, and how many of them were copied for it.

    On a CPU `cpu_offload` hands over the very tensors that it keeps.
    """
    moved: Counter[str] = Counter()
    if isinstance(built.model, FrozenTower):
        placement = built.model.placement
        assert placement is not None
        sizes, fetch = [unit.bytes_to_fetch()[0] for unit in built.model.units()], placement.fetch

        def fetch_counted(number: int) -> Fetch:
            moved.update(moved_bytes=sizes[number], copied_bytes=sizes[number])
            return fetch(number)

        with patch.object(placement, "fetch", fetch_counted):
            yield moved
    else:
        original = accelerate.hooks.set_module_tensor_to_device
        kept = {weight.data_ptr() for weight in built.weights.values()}

        def set_counted(module: nn.Module, name: str, device: Any, value: Tensor | None = None, **options: Any) -> None:
            original(module, name, device, value=value, **options)
            if value is not None:
                copied = getattr(module, name).data_ptr() not in kept
                moved.update(moved_bytes=value.nbytes, copied_bytes=value.nbytes * copied)

        with patch.object(accelerate.hooks, "set_module_tensor_to_device", set_counted):
            yield moved


def measure(rival: Rival, frames: int) -> dict[str, int]:
    """Of one forward in this process: peaks, what was there before it, and weights moved."""
    with tempfile.TemporaryDirectory() as folder:
        with count_cpu_allocations() as building:
            built, pixels = build(rival, Path(folder)), draw_frames(rival, frames)
        with count_cpu_allocations() as running, count_moved(built) as moved:
            # Loading is over: theirs needs the whole model in memory once, which is not what is compared.
            Path("/proc/self/clear_refs").write_text("5")
            built.forward(pixels)
            rss = measure_peak(torch.device("cpu")).process_bytes
    found = {
        "peak_bytes": building.left_bytes + running.peak_bytes,
        "pass_bytes": running.peak_bytes,
        "rss_peak_bytes": rss,
        **moved,
    }
    if not isinstance(built.model, FrozenTower):
        return {**found, "largest_parameter_bytes": max(weight.nbytes for weight in built.model.parameters())}
    stream, (hidden, work) = built.model.stream(pixels), built.model.bytes_per_tubelet(pixels)
    sizes = {"hidden_bytes": stream.group * hidden, "work_bytes": stream.chunk * work}
    return {**found, **sizes, "fetched_bytes": built.model.fetched_bytes()}


def draw_frames(rival: Rival, frames: int) -> Tensor:
    """Random pixels, the same for all."""
    size = resolve_tower(rival.folder).config.image_size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (frames, 3, size, size), dtype=torch.uint8, generator=generator)


def main(arguments: Arguments) -> None:
    """Time all in turn, measure each by itself, compare, write."""
    with tempfile.TemporaryDirectory(dir=arguments.results) as place:
        folder = Path(place) / arguments.tower
        torch.manual_seed(0)
        config = type(SIZES[arguments.tower]).from_dict(SIZES[arguments.tower].to_dict())
        model = ViTModel(config, add_pooling_layer=False)
        model.save_pretrained(folder)
        tower_bytes = sum(weight.nbytes for weight in model.parameters())
        del model
        rivals = [
            Rival(side, where, chunk, str(folder))
            for where in WHERE for chunk in arguments.chunks for side in SIDES
        ]  # fmt: skip
        rows = compare_all(arguments, rivals, tower_bytes, Path(place))
    settings = {"tower": arguments.tower, "tower_bytes": tower_bytes, "frames": arguments.frames,
                "storage": "fp32", "compute": "fp32", "repeats": arguments.repeats, "environment": ENVIRONMENT,
                "threads": torch.get_num_threads()}  # fmt: skip
    stem = write_report(arguments.results, "relatives", device=torch.device("cpu"), settings=settings, rows=rows)
    for row in rows:
        if row["side"] == "ours":
            print(f"{row['where']}, chunks of {row['chunk']}: {row['compared_with_accelerate']} "
                  f"({row['seconds_by_theirs']:.3f} of its time), moves {row['moved_by_tower']:.3f} of the tower: "
                  f"{row['target_moved']}; {row['memory']}")  # fmt: skip
    print(f"wrote {stem}.json and .md")


def compare_all(arguments: Arguments, rivals: list[Rival], tower_bytes: int, place: Path) -> list[dict[str, Any]]:
    """A row for each."""
    words = [["-m", "bench.relatives", "measure", json.dumps(asdict(rival)), str(arguments.frames)] for rival in rivals]
    found = [run_ranks(line, environment=ENVIRONMENT)[0] for line in track(words, "memory")]
    built = {rival: build(rival, place / f"scratch{number}") for number, rival in enumerate(rivals)}
    pixels = draw_frames(rivals[0], arguments.frames)
    forwards = {rival: partial(one.forward, pixels) for rival, one in built.items()}
    outputs = {rival: forward() for rival, forward in track(forwards.items(), "first calls")}
    seconds = time_in_turn(forwards, arguments.repeats)
    by_rival, rows = dict(zip(rivals, found, strict=True)), []
    for rival, memory in by_rival.items():
        peer = replace(rival, side="accelerate")
        own, theirs = seconds[rival], seconds[peer]
        row: dict[str, Any] = {
            "where": rival.where, "chunk": rival.chunk, "side": rival.side, "evidence": "measured",
            "seconds": statistics.median(own), "spread_seconds": spread(own), **memory,
            "moved_by_tower": memory["moved_bytes"] / tower_bytes,
            "greatest_difference": float((outputs[rival] - outputs[peer]).abs().max()),
        }  # fmt: skip
        if rival.side == "ours":
            row["compared_with_accelerate"] = compare(own, theirs)
            row["seconds_by_theirs"] = ratio(own, theirs)
            row["target_moved"] = "met" if row["moved_by_tower"] <= MOVED else "not met"
            row["target_never_slower"] = "not met" if compare(own, theirs) == "slower" else "met"
            row["memory"] = explain(rival, memory, by_rival[peer])
        rows.append(row)
    return rows


def explain(rival: Rival, ours: dict[str, int], theirs: dict[str, int]) -> str:
    """What a forward of ours takes above one of theirs, beside the weights where they wait."""
    more = ours["pass_bytes"] - theirs["pass_bytes"]
    if more <= 0:
        return f"{format_bytes(-more)} less"
    return (
        f"{format_bytes(more)} more: {format_bytes(ours['fetched_bytes'])} are the layer that computes and the next, "
        f"where theirs has one parameter, of at most {format_bytes(theirs['largest_parameter_bytes'])}; "
        f"{format_bytes(ours['hidden_bytes'])} are the hidden states of all frames, where theirs has those of "
        f"{rival.chunk}"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        print(json.dumps(measure(Rival(**json.loads(sys.argv[2])), int(sys.argv[3]))), flush=True)
    else:
        run_bench(main, Arguments, __doc__)
