"""`bigvivit plan`: what a training step would take on hardware that need not be here, and of what it is made."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from bigvivit.calibrate.calibration import AUTO, choose, find_cpu
from bigvivit.config import (
    ClipConfig,
    ConfigError,
    ModelConfig,
    OptimConfig,
    ProbeConfig,
    check_frames,
    check_memory,
)
from bigvivit.forecast.accelerators import Accelerator
from bigvivit.forecast.hardware import accelerator_by_hand, find_accelerator
from bigvivit.memory.ds_json import read_ds_json
from bigvivit.memory.plan import MemoryPlan
from bigvivit.units import DType, MiB, format_bytes, parse_bytes
from bigvivit.versions import require_for_run

if TYPE_CHECKING:
    from bigvivit.forecast.card import Verdict
    from bigvivit.trial import Trial
    from bigvivit.trial_virtual import VirtualVerdict

CPU = "cpu"
RANKS = 8
"""Over which sharding is compared where the plan has one rank only."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Forecast the memory of a training step, without a GPU.

    On Linux with a CUDA build of PyTorch the step runs on a virtual GPU: PyTorch's own CUDA allocator, dispatcher and
    choice of kernels, without a device (docs/virtual_gpu.md); of several ranks the fullest runs. Elsewhere, and for
    what --explain, --timeline and --snapshot show, it is traced on fake tensors. Nothing of this has been compared with
    a GPU of ours.
    """

    tower: str
    """Image tower: a name of `bigvivit towers`, a hub id or a local folder."""
    frames: int
    """Frames per clip."""
    hardware: str
    """An accelerator of the table, such as `2080 Ti` or `A100 80GB`, memory alone, such as 24GiB, or `cpu`: this
    machine's, once `bigvivit calibrate` has measured it."""
    stage: Literal[1, 2] = 2
    """1: the whole model trains. 2: adapter, temporal transformer and head train above a frozen tower."""
    ranks: int = 1
    """Devices, one rank each."""
    clips: int = 1
    """Clips of a rank's micro-batch."""
    size: int = 224
    """Pixels of a clip's side."""
    tubelet: int = 2
    """Frames per tubelet."""
    temporal_depth: int = 4
    """Layers of the temporal transformer."""
    patch_grid: int = 0
    """Cells along an edge of the grid of patches that stage 2 sees, as training's `--model.patch-grid`."""
    classes: int = 400
    """Of the head."""
    optimizer: Literal["sgd", "adamw", "sgd8bit", "adamw8bit"] = "sgd"
    """The last two are bitsandbytes'."""
    fused: bool = False
    """One kernel for all weights, as training's `--optim.fused`."""
    ema: float = 0.0
    """Decay of the moving average of the trained weights, as training's `--optim.ema`: any above 0 is one more copy."""
    memory: MemoryPlan = field(default_factory=MemoryPlan)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    cached: bool = False
    """Forecast a step whose vectors training's `--data.cache` holds: the tower is there, and does not run."""
    ds: Path | None = None
    """DeepSpeed configuration, a JSON file, or `zero2`, `zero3` or `zero3_offload`: ZeRO 1 to 3."""
    fsdp: bool = False
    """Shard with FSDP2."""
    without: tuple[Literal["attention", "foreach", "in-place", "workspaces"], ...] = ()
    """Corrections for CUDA to leave out; --explain lists them with what each makes."""
    calibration: str = AUTO
    """What `bigvivit calibrate` measured on the card, in place of the tables' constants: `auto` for the newest in your
    cache folder, a file of its own, or `none`."""
    explain: bool = False
    """Say what the peak is made of."""
    timeline: Path | None = None
    """Write a picture of memory over the steps: one HTML file."""
    snapshot: Path | None = None
    """Write the trace as a memory snapshot that pytorch.org/memory_viz shows: a pickle of plain data, without code."""
    json: bool = False
    """Print JSON instead of text."""

    def __post_init__(self) -> None:
        for name in ("ranks", "clips", "temporal_depth", "classes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.hardware.lower() == CPU and (self.ranks > 1 or self.without):
            raise ConfigError("hardware=cpu is for one rank, and has no corrections for CUDA: leave out what is")
        if self.fsdp and self.ds is not None:
            raise ConfigError(f"fsdp and ds={self.ds} are two ways to shard: leave one out")
        if self.ema and self.ds is not None:
            raise ConfigError(f"ema={self.ema} under ds={self.ds}: DeepSpeed keeps no averages; leave it out")
        if self.fsdp and self.optimizer.endswith("8bit"):
            raise ConfigError(
                f"optimizer={self.optimizer} under fsdp: bitsandbytes cannot update FSDP2's sharded "
                f"parameters; take {self.optimizer.removesuffix('8bit')}, or zero3"
            )
        for name in ("timeline", "snapshot"):
            path = getattr(self, name)
            if path is not None and not path.absolute().parent.is_dir():
                raise ConfigError(f"{name}={path}: {path.parent} is not a folder; give another")
        if self.probe != ProbeConfig() and (self.stage == 1 or self.ds is not None):
            raise ConfigError(f"probe={self.probe} is for stage 2, and not for DeepSpeed: leave --probe out")
        if self.cached and self.stage == 1:
            raise ConfigError("cached is for stage 2, whose tower is frozen: leave it out")
        if self.patch_grid and self.stage == 1:
            raise ConfigError(f"patch_grid={self.patch_grid} is for stage 2: leave it out")
        ModelConfig(patch_grid=self.patch_grid)
        ClipConfig(frames=self.frames, size=self.size, resize=self.size)
        check_frames(self.frames, self.tubelet)
        check_memory(self.memory, self.stage)


def find_hardware(name: str) -> Accelerator:
    """A row of the table, or memory by hand. Raises ConfigError."""
    try:
        return accelerator_by_hand(parse_bytes(name))
    except ValueError:
        return find_accelerator(name)


def plan(config: PlanConfig) -> None:
    """Trace, judge and print. Raises ConfigError for what cannot be."""
    on_host = config.hardware.lower() == CPU
    card = find_cpu(config.calibration) if on_host else choose(find_hardware(config.hardware), config.calibration)
    batch_size = config.clips * config.ranks
    optim = OptimConfig(
        name=config.optimizer, batch_size=batch_size, epochs=1, warmup_epochs=0, ema=config.ema, fused=config.fused
    )
    ds = read_ds_json(config.ds, optim, config.ranks) if config.ds else None
    require_for_run(ds=config.ds, optimizer=config.optimizer, storage=config.memory.storage)

    from bigvivit.forecast.card import judge, judge_on_host, resolve_types
    from bigvivit.forecast.overhead import capacity, forecast_overhead
    from bigvivit.trial import Trial, trace_trial
    from bigvivit.trial_virtual import try_virtual_gpu

    heads = config.probe.heads(optim, ModelConfig(temporal_depth=config.temporal_depth))
    trial = Trial(
        stage=config.stage,
        tower=config.tower,
        frames=config.frames,
        size=config.size,
        tubelet=config.tubelet,
        temporal_depth=config.temporal_depth,
        patch_grid=config.patch_grid,
        clips=config.clips,
        classes=config.classes,
        optimizer=config.optimizer,
        fused=config.fused,
        ema=config.ema,
        plan=config.memory if on_host else resolve_types(config.memory, card),
        fsdp=config.fsdp,
        ds=ds,
        world=config.ranks,
        depths=tuple(head.depth for head in heads),
        cached=config.cached,
    )
    _, there, _ = capacity(card, forecast_overhead(card, ranks=config.ranks))
    virtual = try_virtual_gpu(trial, card) if not config.without else "corrections were left out"
    verdict = None
    if isinstance(virtual, str) or config.explain or config.timeline or config.snapshot:
        with redirect_stdout(sys.stderr):  # where DeepSpeed's warnings belong
            on_card = None if on_host else card
            trace = trace_trial(trial, free_bytes=there, host=not on_host, card=on_card, without=config.without)
        if on_host:
            verdict = judge_on_host(trace, card)
        else:
            verdict = judge(trace, card, ranks=config.ranks, without=config.without)
    if config.timeline is not None:
        from bigvivit.forecast.timeline import write_timeline

        write_timeline(trace, config.timeline, describe(trial, card), limit_bytes=there)
    if config.snapshot is not None:
        from bigvivit.forecast.memory_viz import write_snapshot

        write_snapshot(trace, config.snapshot)
    if config.json:
        print(json.dumps(to_json(config, card, verdict, virtual), indent=2))
        return
    if isinstance(virtual, str):
        assert verdict is not None
        fits = verdict.fits
        print_verdict(trial, card, verdict)
        print(f"  traced on fake tensors, not run on a virtual GPU: {virtual}")
    else:
        fits = virtual.fits
        print_virtual(trial, card, virtual)
    if config.explain:
        assert verdict is not None
        if not isinstance(virtual, str) and virtual.expected.out_of_memory is None:
            traced, own = verdict.trace.peak_bytes(), virtual.expected.allocated_bytes
            print(f"what follows is of a trace, whose peak is {format_bytes(traced)}, {traced / own - 1:+.1%}")
        print_composition(verdict)
        if trial.stage == 2 and not on_host:
            print("\n".join(compare_sharding(trial, card)))
        if not on_host:
            print_corrections(verdict, config)
    if not fits[1]:
        print_advice(trial, config, there)
    for path in (config.timeline, config.snapshot):
        if path is not None:
            print(f"wrote {path}")


def print_advice(trial: Trial, config: PlanConfig, there: int) -> None:
    """Settings that would fit the bytes that there are, or the card as it is known."""
    from bigvivit.advice import Room, ask_for_advice

    if config.hardware.lower() == CPU:
        room = Room(there, cuda=False)
    else:
        room = Room(there, cuda=True, hardware=config.hardware, calibration=config.calibration)
    print("\n".join(ask_for_advice(trial, room)))


def describe(trial: Trial, card: Accelerator) -> str:
    """One line."""
    ranks = f"{trial.world} x " if trial.world > 1 else ""
    heads = f"{len(trial.depths)} heads, " if trial.depths else ""
    return f"stage {trial.stage}, {trial.tower}, {trial.frames} frames, {heads}{ranks}{card.name}"


def print_calibration(card: Accelerator) -> None:
    """Where constants are not the tables'."""
    if card.measured is not None and card.measured.context_bytes is not None:
        name = "beside tensors" if card.on_host else "context"
        print(f"  {name:21} {format_bytes(card.measured.context_bytes[1])}, {card.measured.where}")


def to_json(
    config: PlanConfig, card: Accelerator, verdict: Verdict | None, virtual: VirtualVerdict | str
) -> dict[str, Any]:
    """For programs; bytes throughout. Of a trace, where there is one, also what the peak is made of."""
    found: dict[str, Any] = {"hardware": card.name, "calibration": card.measured and asdict(card.measured)}
    if isinstance(virtual, str):
        assert verdict is not None
        found |= {
            "evidence": "forecast",
            "not_virtual": virtual,
            "fits": name_cases(verdict.fits),
            "peak_bytes": verdict.trace.peak_bytes(),
            "reserved_bytes": verdict.runs[1].peak_reserved_bytes,
            "out_of_memory": None if verdict.fits[1] else str(verdict.runs[1].out_of_memory),
            "capacity_bytes": name_cases(verdict.capacities),
        }
    else:
        found |= {
            "evidence": "virtual",
            "fits": name_cases(virtual.fits),
            "peak_bytes": virtual.expected.allocated_bytes,
            "reserved_bytes": virtual.expected.reserved_bytes,
            "host_locked_bytes": virtual.expected.locked_bytes,
            "out_of_memory": virtual.expected.out_of_memory,
            "capacity_bytes": name_cases(virtual.capacities),
        }
    if verdict is not None:
        found["trace"] = {
            "evidence": "forecast",
            "peak_bytes": verdict.trace.peak_bytes(),
            "host_peak_bytes": verdict.trace.peak_bytes("host"),
            "composition_bytes": verdict.trace.composition(),
        }
    return {**found, "settings": json.loads(json.dumps(asdict(config), default=str))}


def name_cases(values: tuple[Any, Any, Any]) -> dict[str, Any]:
    """By how much the driver and libraries take."""
    return dict(zip(("worst", "expected", "best"), values, strict=True))


def print_virtual(trial: Trial, card: Accelerator, found: VirtualVerdict) -> None:
    """Whether it fits, and by how much, in PyTorch's own numbers."""
    from bigvivit.forecast.card import describe_fit

    step = found.expected
    low, there, high = found.capacities
    print(f"{describe(trial, card)}: {describe_fit(found.fits)} (virtual)")
    until = "" if step.out_of_memory is None else " until then"
    if step.out_of_memory is not None:
        print(f"  out of memory         {step.out_of_memory}")
    print(f"  tensors at the peak   {format_bytes(step.allocated_bytes)}{until}, of the device")
    print(f"  reserved by PyTorch   {format_bytes(step.reserved_bytes)}{until}")
    print(f"  there is              {format_bytes(there)} ({format_bytes(low)} to {format_bytes(high)})")
    if step.locked_bytes >= MiB:  # a few bytes always are: numbers that the host reads
        print(f"  host                  {format_bytes(step.locked_bytes)} page-locked")
    print_calibration(card)


def print_verdict(trial: Trial, card: Accelerator, verdict: Verdict) -> None:
    """Whether it fits, and by how much."""
    trace, expected = verdict.trace, verdict.runs[1]
    low, there, high = verdict.capacities
    print(f"{describe(trial, card)}: {verdict.word} (forecast)")
    print(f"  tensors at the peak   {format_bytes(trace.peak_bytes())}, of the device")
    if expected.out_of_memory is not None:
        print(f"  out of memory         {expected.out_of_memory}")
    elif not card.on_host:
        print(f"  reserved by PyTorch   {format_bytes(expected.peak_reserved_bytes)}")
    print(f"  there is              {format_bytes(there)} ({format_bytes(low)} to {format_bytes(high)})")
    print_calibration(card)
    if not card.on_host:
        print(f"  host                  {format_bytes(trace.peak_bytes('host'))} of tensors")


def print_composition(verdict: Verdict) -> None:
    """What the peak is made of, and what the range of capacity is made of."""
    from bigvivit.forecast.composition import describe_peak

    for line in describe_peak(verdict.trace):
        print(line)
    print("outside of the trace:")
    for line in verdict.overhead.explain():
        print(f"  {line}")


def compare_sharding(trial: Trial, card: Accelerator) -> list[str]:
    """Whether ZeRO-3 or FSDP2 would be worth it for the frozen tower; over eight ranks where there is one."""
    from bigvivit.forecast.sharding import explain_sharding
    from bigvivit.memory.apply import is_packed
    from bigvivit.trial import size_trial

    if is_packed(trial.plan):
        return ["the frozen tower is not sharded where its storage or placement is ours: each rank keeps its own"]
    tubelets, group = trial.clips * trial.frames // trial.tubelet, trial.plan.group
    return list(
        explain_sharding(
            size_trial(trial),
            card,
            ranks=trial.world if trial.world > 1 else RANKS,
            tubelets=tubelets,
            groups=-(-tubelets // group) if isinstance(group, int) else 1,
            frames=trial.tubelet,
            compute=cast(DType, trial.plan.compute),
        )
    )


def print_corrections(verdict: Verdict, config: PlanConfig) -> None:
    """What stands for CUDA where fake tensors on the CPU would have done otherwise."""
    from bigvivit.forecast.card import corrected_bytes
    from bigvivit.forecast.corrections import CORRECTIONS

    made = corrected_bytes(verdict.trace, verdict.overhead)
    print("corrections for CUDA, which were compared with a GPU only together, and what each makes at most at once:")
    for correction in CORRECTIONS:
        size = made[correction.name]
        amount = f"{'-' * (size < 0)}{format_bytes(abs(size))}"
        amount = "left out" if correction.name in config.without else amount
        print(f"  {correction.name}: {amount}; {correction.what} ({correction.source})")
