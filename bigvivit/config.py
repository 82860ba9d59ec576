"""Everything a run can be told, as frozen dataclasses, and every rule that ties two fields together.

Imports no torch: a wrong setting is refused before anything slow starts.
"""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from bigvivit.memory.plan import MemoryPlan

TIME_LIMIT = 60.0
"""Seconds that decoding one clip may take."""


class ConfigError(Exception):
    """A setting that cannot be: the message names it, its value, the rule and a fix.

    Not a ValueError, which tyro would frame and cut to the width of the terminal.
    """


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The factorised encoder. In stage 2 what is left out is taken from stage 1."""

    tower: str | None = None
    """Image tower: a Hugging Face hub id, a local folder in that format, or a name of `bigvivit towers`
    (`vit-b`, `vit-l`, `vit-h`, `vit-g`: the paper's sizes, with `--model.tower-init random`)."""
    tower_init: Literal["pretrained", "random"] | None = None
    """Where the tower's weights come from [default: pretrained]."""
    allow_pickle: bool = False
    """Read a pytorch_model.bin where there is no safetensors file; PyTorch then unpickles tensors, and only those."""
    tubelet: int | None = None
    """Frames per tubelet, the temporal extent of the patch kernel [default: 2, as in ViViT]."""
    temporal_depth: int | None = None
    """Layers of the temporal transformer [default: 4; stage 2 infers it from stage 1's weights]."""
    temporal_input: Literal["centred", "original"] | None = None
    """What the temporal transformer sees: how the frame vectors of a clip change, at unit size, with their mean apart,
    or, as in the original, the vectors as they are [default: centred]."""
    patch_grid: int = 0
    """Patches of each tubelet that stage 2 sees besides the tower's vector, averaged to a grid of so many by so many
    cells: attention learns what to take from them, as V-JEPA 2's probes do. 0: the vector alone."""
    droplayer: float = 0.0
    """Stochastic depth: rate of the deepest block of each transformer, growing linearly from 0 (paper, Table 7)."""

    def __post_init__(self) -> None:
        for name in ("tubelet", "temporal_depth"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"model.{name}={value} must be at least 1")
        if self.patch_grid < 0:
            raise ConfigError(f"model.patch_grid={self.patch_grid} must not be negative")
        if not 0 <= self.droplayer < 1:
            raise ConfigError(f"model.droplayer={self.droplayer} is a probability: give a number from 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """How a clip is cut from a video, in time and space."""

    frames: int
    """Frames per clip."""
    stride: int | None = None
    """Distance between two frames of a clip, in frames of the video, from a random start (the paper's sampling).
    Without it and without `fps`, a clip spans the whole video: one frame of each of `frames` equal parts."""
    fps: float | None = None
    """Frames of a clip per second of the video, from a random start: the same motion at any frame rate."""
    short: Literal["spread", "loop"] = "spread"
    """What becomes of a video that is shorter than a clip by `stride` or `fps`: its frames are spread evenly over the
    clip, or it begins again, as in the original."""
    size: int = 224
    """Side of the square crop the tower sees, in pixels."""
    resize: int = 256
    """Short side the video is resized to before it is cropped, in pixels."""
    min_scale: float = 0.9
    """Scale jitter in training: least factor on the resized height and width, each drawn by itself (paper, Table 7)."""
    max_scale: float = 1.33
    """Scale jitter in training: greatest factor."""
    flip: bool = True
    """Mirror half of the training clips. Turn off where labels have a direction (`--clip.no-flip`)."""

    def __post_init__(self) -> None:
        for name in ("frames", "stride", "size", "resize"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"clip.{name}={getattr(self, name)} must be at least 1")
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise ConfigError(f"clip.fps={self.fps} is not a number of frames per second above 0")
        if self.fps is not None and self.stride is not None:
            raise ConfigError(f"clip.stride={self.stride} and clip.fps={self.fps} both set a distance: leave one out")
        if self.short == "loop" and self.fps is None and self.stride is None:
            raise ConfigError(
                "clip.short=loop is for clips by clip.stride or clip.fps: without them a clip spans the whole video, "
                "however short; give one, or leave it out"
            )
        if self.resize < self.size:
            raise ConfigError(
                f"clip.resize={self.resize} is below clip.size={self.size}: the crop would not fit; "
                f"give --clip.resize {self.size} or more"
            )
        if not 0 < self.min_scale <= self.max_scale < math.inf:
            raise ConfigError(
                f"clip.min_scale={self.min_scale}, clip.max_scale={self.max_scale}: need 0 < min_scale <= max_scale"
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the videos are and who reads them."""

    train: Path
    """Manifest of the training clips, CSV or JSONL: path, label, and optionally start and end in seconds."""
    val: Path | None = None
    """Manifest to validate on at every checkpoint and at the end: one centre view of each clip. The best checkpoint is
    then kept beside the last ones."""
    workers: int = 2
    """Processes per rank that decode videos; 0 decodes in the training process, which a decoder's crash then ends."""
    time_limit: float = TIME_LIMIT
    """Seconds that decoding one clip may take; its worker is then killed and the clip counts as unreadable."""
    max_failed: float = 0.05
    """Share of the manifest's clips that may turn out unreadable before training stops; others take their places."""
    cache: Path | None = None
    """Folder in which stage 2 keeps the frozen tower's vectors: an epoch whose vectors are there needs neither videos
    nor tower. Runs over the same tower with the same clip settings share it, whatever their seeds and manifests."""
    cache_views: int = 1
    """Augmented views that are kept of each training clip; epochs take them in turn."""
    cache_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Element type in which vectors are kept. `auto` is the one the tower computes in, which loses nothing."""
    cache_by_content: bool = False
    """Know videos in the cache by the SHA-256 of their content, which reads each file once a run, and not by their
    path, size and time of change: for videos that move."""

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ConfigError(f"data.workers={self.workers} must not be negative")
        if not 0 < self.time_limit < math.inf:
            raise ConfigError(f"data.time_limit={self.time_limit} is not a number of seconds above 0")
        if not 0 <= self.max_failed <= 1:
            raise ConfigError(f"data.max_failed={self.max_failed} is a share: give a number from 0 to 1")
        if self.cache_views < 1:
            raise ConfigError(f"data.cache_views={self.cache_views} must be at least 1")
        for name, default in (("cache_views", 1), ("cache_dtype", "auto"), ("cache_by_content", False)):
            if self.cache is None and getattr(self, name) != default:
                raise ConfigError(
                    f"data.{name}={getattr(self, name)} is for a cache: give its folder, --data.cache, or leave it out"
                )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimisation. The defaults are the paper's for Kinetics (Table 7)."""

    name: Literal["sgd", "adamw", "sgd8bit", "adamw8bit"] = "sgd"
    """sgd has momentum 0.9; the 8-bit ones are those of bitsandbytes, which keep a quarter of the state."""
    lr: float = 0.1
    """Peak learning rate."""
    tower_lr: float | None = None
    """Peak learning rate of the tower, in stage 1 [default: lr]."""
    adapter_lr: float | None = None
    """Peak learning rate of the adapter, in stage 2 [default: lr]."""
    temporal_lr: float | None = None
    """Peak learning rate of the temporal transformer [default: lr]."""
    head_lr: float | None = None
    """Peak learning rate of the head [default: lr]."""
    layer_decay: float = 1.0
    """Factor on the tower's learning rate from each of its layers to the one below, in stage 1; 1 trains all alike."""
    weight_decay: float = 0.0
    """Decay of the matrices of linear layers and convolutions; never of norms, biases, positions, tokens and probes."""
    epochs: float = 30.0
    """Passes over the training manifest; fractions are allowed."""
    warmup_epochs: float = 2.5
    """Epochs of linear warm-up before the cosine."""
    steps: int | None = None
    """Optimizer steps of the whole run, in place of `epochs`."""
    warmup_steps: int | None = None
    """Optimizer steps of linear warm-up, in place of `warmup_epochs` [default with `steps`: a twelfth of them]."""
    batch_size: int = 128
    """Clips per optimizer step, over all ranks and accumulated micro-batches."""
    accumulate: int = 1
    """Micro-batches per optimizer step."""
    clip_norm: float = 1.0
    """Greatest norm of the whole gradient; 0 does not clip."""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes."""
    fused: bool = False
    """Update all weights in one kernel each for the whole step (PyTorch's `fused=True`), of sgd and adamw."""
    ema: float = 0.0
    """Decay of the exponential moving average of the trained weights that is validated and kept in their place; its
    window grows with the first steps. 0 keeps the weights themselves."""
    patience: int = 0
    """Validations in a row without a better top-1 after which training ends, its best checkpoint kept; 0 never ends
    early."""

    def __post_init__(self) -> None:
        for name in ("lr", "tower_lr", "adapter_lr", "temporal_lr", "head_lr", "epochs"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"optim.{name}={getattr(self, name)} must be a number above 0")
        for name in ("batch_size", "accumulate", "steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"optim.{name}={getattr(self, name)} must be at least 1")
        for name in ("warmup_steps", "patience"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise ConfigError(f"optim.{name}={getattr(self, name)} must not be negative")
        if self.fused and self.eight_bit:
            raise ConfigError(f"optim.fused with optim.name={self.name}: bitsandbytes' are fused already; leave it out")
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(f"optim.layer_decay={self.layer_decay} must be above 0 and at most 1")
        if not 0 <= self.ema < 1:
            raise ConfigError(f"optim.ema={self.ema} is a decay: give a number from 0 to below 1, 0.999 for instance")
        for name in ("weight_decay", "warmup_epochs", "clip_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"optim.{name}={getattr(self, name)} must be a number from 0")
        if self.steps is None and self.warmup_steps is None and self.warmup_epochs >= self.epochs:
            raise ConfigError(
                f"optim.warmup_epochs={self.warmup_epochs} leaves nothing of optim.epochs={self.epochs}: "
                f"give fewer warm-up epochs, {self.epochs / 12:.3g} for instance"
            )
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"optim.label_smoothing={self.label_smoothing} must be from 0 to below 1")

    def count_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run, at least one."""
        return self.steps if self.steps is not None else max(1, round(self.epochs * steps_per_epoch))

    def count_warmup(self, steps_per_epoch: int) -> int:
        """Optimizer steps of warm-up. Raises ConfigError where `warmup_steps` leaves nothing of the run."""
        steps = self.count_steps(steps_per_epoch)
        if self.warmup_steps is not None and self.warmup_steps >= steps:
            raise ConfigError(
                f"optim.warmup_steps={self.warmup_steps} leaves nothing of the run's {steps} steps: give fewer, "
                f"{steps // 12} for instance"
            )
        if self.warmup_steps is not None:
            return self.warmup_steps
        return steps // 12 if self.steps is not None else round(self.warmup_epochs * steps_per_epoch)

    @property
    def eight_bit(self) -> bool:
        """Whether the optimizer's state is quantised, in blocks that know nothing of parameters' shapes."""
        return self.name.endswith("8bit")


@dataclass(frozen=True)
class ProbeHead:
    """What is one head's own in a probe bank."""

    lr: float
    weight_decay: float
    depth: int


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """A probe bank: all combinations of what is listed, each a set of adapter, temporal transformer and head with an
    optimizer of its own, train on one pass of the frozen tower. What is not listed is as for a run of one."""

    lr: tuple[float, ...] = ()
    """Peak learning rates to try, in place of `--optim.lr`."""
    weight_decay: tuple[float, ...] = ()
    """Weight decays to try, in place of `--optim.weight-decay`."""
    depth: tuple[int, ...] = ()
    """Layers of the temporal transformer to try, in place of stage 1's."""

    def __post_init__(self) -> None:
        for name, least in (("lr", "above 0"), ("weight_decay", "from 0"), ("depth", "from 1")):
            values = getattr(self, name)
            smallest = {"lr": math.ulp(0.0), "weight_decay": 0.0, "depth": 1}[name]
            if not all(smallest <= value < math.inf for value in values):
                raise ConfigError(f"probe.{name}={values} must be numbers {least}")
            if len(set(values)) < len(values):
                raise ConfigError(f"probe.{name}={values} lists a value twice: leave one out")

    def heads(self, optim: OptimConfig, model: ModelConfig) -> tuple[ProbeHead, ...]:
        """Every head, or none where nothing is listed. `model` is resolved."""
        if not (self.lr or self.weight_decay or self.depth):
            return ()
        assert model.temporal_depth is not None, "resolve_model comes first"
        options = self.lr or (optim.lr,), self.weight_decay or (optim.weight_decay,), self.depth
        return tuple(
            ProbeHead(*values) for values in itertools.product(*options[:2], options[2] or (model.temporal_depth,))
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train one stage: stage 1 trains everything on few frames, stage 2 trains on many above a frozen tower."""

    stage: Literal[1, 2]
    """1: the whole model. 2: adapter, temporal transformer and head above a frozen tower, starting from stage 1."""
    out: Path
    """Folder of the run: configuration, metrics and checkpoint are written there."""
    clip: ClipConfig
    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    memory: MemoryPlan = field(default_factory=MemoryPlan)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    init_from: Path | None = None
    """Run folder of stage 1, from which stage 2 starts; without it, stage 2 trains on `model.tower` as published."""
    ds: Path | None = None
    """DeepSpeed configuration: a JSON file, or `zero2`, `zero3` or `zero3_offload`, which come with this package.
    Without it and without fsdp, every rank holds the whole model."""
    fsdp: bool = False
    """Shard with PyTorch's FSDP2, without DeepSpeed."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` is CUDA where there is one."""
    tf32: bool = False
    """Let fp32 matrix products and convolutions on CUDA round their factors to 10 bits: several times faster from
    Ampere on. Without it they are exact, convolutions too, which PyTorch would round by default."""
    preset: Literal["small"] | None = None
    """Settings that go together, for all that the command line does not say itself. `small`: some hundred clips."""
    seed: int = 0
    """Seeds initial weights, the order of clips, their cuts and stochastic depth."""
    log_every: int = 10
    """Optimizer steps between two lines of the log."""
    save_every: int = 500
    """Optimizer steps between two checkpoints that training can go on from; 0 keeps only the finished stage."""
    keep: int = 2
    """How many of them are kept, the last ones."""
    resume: bool = False
    """Go on from the last checkpoint in `out`; from the beginning where there is none yet."""

    def __post_init__(self) -> None:
        for name, least in (("log_every", 1), ("keep", 1), ("save_every", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least {least}")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed={self.seed} must be from 0 to {2**32 - 1}")
        check_memory(self.memory, self.stage)
        if self.data.cache is not None:
            check_cache(self)
        if self.probe != ProbeConfig():
            check_probe(self)
        if self.fsdp and self.ds is not None:
            raise ConfigError(f"fsdp and ds={self.ds} are two ways to shard: leave one out")
        if self.fsdp and self.optim.eight_bit:
            raise ConfigError(
                f"optim.name={self.optim.name} under fsdp: bitsandbytes cannot update FSDP2's sharded parameters; "
                f"take --optim.name {self.optim.name.removesuffix('8bit')}, or --ds zero3"
            )
        if self.stage == 2 and self.init_from is None and self.model.tower is None:
            raise ConfigError(
                "stage=2 needs init_from: give --init-from the run folder of a finished stage 1, or --model.tower to "
                "train on an image tower as it was published"
            )
        if self.stage == 1 and self.init_from is not None:
            raise ConfigError(f"init_from={self.init_from} is for stage 2: leave it out, or give --stage 2")
        if self.stage == 1 and self.model.tower is None:
            raise ConfigError("model.tower is not set: stage 1 needs an image tower, --model.tower <hub id or folder>")
        if self.stage == 1 and self.model.patch_grid:
            raise ConfigError(f"model.patch_grid={self.model.patch_grid} is for stage 2: leave it out")
        check_optim(self)
        if self.init_from is None:
            object.__setattr__(self, "model", resolve_model(self.model, inherited=None))
            check_frames(self.clip.frames, self.model.tubelet)


def check_optim(config: TrainConfig) -> None:
    """Raise for settings of the optimizer that this stage, or what shards it, has no use for."""
    optim = config.optim
    if config.stage == 2 and (optim.tower_lr is not None or optim.layer_decay != 1):
        raise ConfigError(
            f"optim.tower_lr={optim.tower_lr}, optim.layer_decay={optim.layer_decay}: both are for stage 1, "
            f"as stage 2 does not train the tower; leave them out"
        )
    if config.stage == 1 and optim.adapter_lr is not None:
        raise ConfigError(f"optim.adapter_lr={optim.adapter_lr} is for stage 2: stage 1 has no adapter; leave it out")
    if optim.ema and config.ds is not None:
        raise ConfigError(
            f"optim.ema={optim.ema} under ds={config.ds}: DeepSpeed keeps trained weights in a form of its own; "
            f"leave it out, or shard with --fsdp"
        )
    if optim.patience and (config.data.val is None or config.save_every == 0):
        raise ConfigError(
            f"optim.patience={optim.patience} counts validations: give --data.val, and --save-every above 0"
        )


def check_cache(config: TrainConfig) -> None:
    """Raise where the tower's vectors cannot be kept."""
    folder = config.data.cache
    if config.stage == 1:
        raise ConfigError(f"data.cache={folder} keeps a frozen tower's vectors, and stage 1 trains it: leave it out")
    assert folder is not None
    check_folder("data.cache", folder)


def check_folder(name: str, folder: Path) -> None:
    """Raise where this folder, the value of a setting, can be neither written nor made."""
    existing = next(there for there in (folder, *folder.absolute().parents) if os.path.lexists(there))
    if not os.path.isdir(existing):
        raise ConfigError(f"{name}={folder}: {existing} is not a folder; give another")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"{name}={folder}: no permission to write in {existing}; give another folder")


def check_probe(config: TrainConfig) -> None:
    """Raise where a probe bank cannot be trained."""
    what = f"probe={config.probe}".replace("ProbeConfig", "")
    if config.stage == 1:
        raise ConfigError(f"{what} trains many heads on a frozen tower, and stage 1 trains it: give --stage 2")
    if config.data.val is None:
        raise ConfigError(f"{what} needs data.val: the best head by validation becomes the run's checkpoint")
    optim = config.optim
    if config.probe.lr and None not in (optim.adapter_lr, optim.temporal_lr, optim.head_lr):
        raise ConfigError(
            f"{what} with optim.adapter_lr, optim.temporal_lr and optim.head_lr: every part has a rate of its own, so "
            f"those to try would change nothing; leave one of the parts' out"
        )
    if config.ds is not None:
        raise ConfigError(
            f"{what} with ds={config.ds}: DeepSpeed clips the gradients of all heads as one; leave --ds out (each rank "
            f"then holds the tower, which --memory.placement cpu, or --data.cache, makes small), or give --fsdp"
        )
    if config.model.droplayer > 0 and len(config.probe.depth) > 1:
        raise ConfigError(
            f"{what} with model.droplayer={config.model.droplayer}: heads of several depths would draw other random "
            f"numbers than runs of their own; give one depth, or --model.droplayer 0"
        )


def check_memory(plan: MemoryPlan, stage: int) -> None:
    """Raise for a plan that contradicts itself or the stage."""
    for name in ("group", "chunk"):
        value = getattr(plan, name)
        if isinstance(value, int) and value < 1:
            raise ConfigError(f"memory.{name}={value} must be at least 1, or all, or auto")
    if plan.recompute < 0:
        raise ConfigError(f"memory.recompute={plan.recompute} must be 0, or n to recompute every n-th block")
    if isinstance(plan.group, int) and (
        plan.chunk == "all" or (isinstance(plan.chunk, int) and plan.chunk > plan.group)
    ):
        raise ConfigError(
            f"memory.chunk={plan.chunk} is more than memory.group={plan.group}: a chunk is a part of a group; "
            f"give --memory.chunk {plan.group} or less"
        )
    if stage == 1:
        for name in ("placement", "group", "chunk"):
            value, default = getattr(plan, name), getattr(MemoryPlan(), name)
            if value != default:
                raise ConfigError(f"memory.{name}={value} is for a frozen tower, and stage 1 trains it: leave it out")
        if plan.storage in ("int8", "nf4"):
            raise ConfigError(
                f"memory.storage={plan.storage} is for a frozen tower: stage 1 trains it in fp32; leave it out"
            )


MODEL_DEFAULTS = ModelConfig(tower_init="pretrained", tubelet=2, temporal_depth=4, temporal_input="centred")


def resolve_model(given: ModelConfig, inherited: ModelConfig | None) -> ModelConfig:
    """Fill what `given` leaves out: from stage 1 where there was one (no contradicting it), else the defaults."""
    known = inherited or MODEL_DEFAULTS
    changes, contradictions = {}, []
    for item in fields(ModelConfig):
        value, old = getattr(given, item.name), getattr(known, item.name)
        if item.name in ("droplayer", "allow_pickle", "patch_grid"):  # of this run, not properties of the weights
            continue
        if value is None:
            changes[item.name] = old
        elif inherited is not None and value != old:
            contradictions.append(f"model.{item.name}={value}, but stage 1 was trained with {old}")
    if contradictions:
        raise ConfigError("; ".join(contradictions) + ": leave these out in stage 2")
    return replace(given, **changes)


def check_frames(frames: int, tubelet: int | None) -> None:
    """Raise where frames do not divide into tubelets."""
    assert tubelet is not None, "resolve_model comes first"
    if frames % tubelet:
        below, above = frames // tubelet * tubelet, -(-frames // tubelet) * tubelet
        choice = f"{above}" if below == 0 else f"{below} or {above}"
        raise ConfigError(f"clip.frames={frames} is not a multiple of model.tubelet={tubelet}; try {choice}")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluate trained runs: uniform views in time, crops in space, mean of their logits."""

    runs: Positional[tuple[Path, ...]]
    """Folders that training wrote: runs, or checkpoints in them."""
    manifest: Path
    """Manifest of the clips to evaluate on."""
    views: int = 4
    """Clips per video, their starts spread evenly (the original evaluates 4 views of 3 crops)."""
    crops: Literal[1, 3] = 3
    """1: centre. 3: start, centre and end of the longer side."""
    batch_size: int = 8
    """Videos per forward pass; their views go through one after the other."""
    workers: int = 2
    """Processes that decode videos; 0 decodes in this process."""
    shuffle_frames: bool = False
    """Also evaluate each view with its frames permuted: what accuracy is left there does not come from their order."""
    cache: Path | None = None
    """Folder in which towers' vectors are kept, as training's `--data.cache`: what is there is not computed again."""
    cache_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Element type in which vectors are kept. `auto` is the one the tower computes in, which loses nothing."""
    cache_by_content: bool = False
    """Know videos in the cache by the SHA-256 of their content, as training's `--data.cache-by-content`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` is CUDA where there is one."""

    def __post_init__(self) -> None:
        for name in ("views", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.workers < 0:
            raise ConfigError(f"workers={self.workers} must not be negative")
        if not self.runs:
            raise ConfigError("no run is given: name the folder of at least one")
        if self.cache is not None:
            check_folder("cache", self.cache)
