"""`bigvivit drift`: what each form that a frozen tower can be stored in costs, against fp32."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from tyro.conf import Positional

from bigvivit.config import ClipConfig, ConfigError, ModelConfig
from bigvivit.data.manifest import Manifest, read_manifest
from bigvivit.memory.plan import MemoryPlan
from bigvivit.training.checkpoint import HEADER, read_header
from bigvivit.units import Storage
from bigvivit.versions import require

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from bigvivit.eval import Outputs
    from bigvivit.model.vivit import ViViT

EXACT: Literal["fp32"] = "fp32"
"""What the other forms are held to. All compute in fp32: they differ in what is stored, and in nothing else."""
CLIP = ClipConfig(frames=8)


@dataclass(frozen=True, kw_only=True)
class DriftConfig:
    """Store a tower in every form and compare: cosine of its frame vectors with those of fp32 and, of a run, top-1."""

    source: Positional[str]
    """Folder of a run, or a tower: hub id, or folder in Hugging Face format."""
    manifest: Path
    """Manifest of the clips to compare on; one centre view of each."""
    clip: ClipConfig = CLIP
    """How clips are cut for a tower, which sees each frame by itself. A run has its own way."""
    out: Path | None = None
    """File to write [default: drift.json, in the run's folder or here]."""
    batch_size: int = 8
    """Videos per forward pass."""
    workers: int = 2
    """Processes that decode videos; 0 decodes in this process."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` is CUDA where there is one."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size={self.batch_size} must be at least 1")
        if self.workers < 0:
            raise ConfigError(f"workers={self.workers} must not be negative")


@dataclass(frozen=True)
class Passage:
    """What a tower in one form made of the clips."""

    outputs: Outputs
    vectors: dict[int, Tensor]
    """By position in the manifest, fp32 [tubelets, width] on the CPU."""
    stored_bytes: int


def measure_drift(config: DriftConfig) -> dict[str, Any]:
    """What `bigvivit drift` writes: a row per form. The vectors of all clips are kept in memory. Raises ConfigError."""
    require("reading videos", "av", "torchvision")
    require("drift, which stores towers in int8 and nf4,", "bitsandbytes")
    run = Path(config.source) if (Path(config.source) / HEADER).exists() else None
    out = config.out or (run or Path()) / "drift.json"
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"out={out}: {out.parent} is not a folder; give another")
    if run is not None and config.clip != CLIP:
        raise ConfigError(f"clip is given, but {run} is a run and has its own way to cut clips: leave it out")

    from bigvivit.assemble import choose_device

    device = choose_device(config.device)
    if run is not None:
        load, clip, manifest = open_run(run, config, device)
    else:
        load, clip, manifest = open_bare_tower(config, device)
    rows: list[dict[str, Any]] = []
    exact: Passage | None = None
    for storage in (EXACT, *(form for form in get_args(Storage) if form != EXACT)):
        own = pass_through(load, storage, clip, manifest, config, device)
        exact = exact or own
        rows.append({"storage": storage, **compare(own, exact, manifest, of_a_run=run is not None)})
    assert exact is not None
    failed = [{"path": str(manifest.clips[index].path), "reason": reason} for index, reason in exact.outputs.failed]
    result = {
        "source": config.source,
        "manifest": str(config.manifest),
        "frames": clip.frames,
        "compute": EXACT,
        "clips": len(exact.vectors),
        "failed": failed,
        "rows": rows,
    }
    out.write_text(json.dumps(result, indent=2) + "\n")
    return result


Loader = Callable[[MemoryPlan], "ViViT"]


def open_run(run: Path, config: DriftConfig, device: torch.device) -> tuple[Loader, ClipConfig, Manifest]:
    """How to load a run's model with another plan, how it cuts clips, and those to compare on."""
    from bigvivit.assemble import load_run

    header = read_header(run)

    def load(plan: MemoryPlan) -> ViViT:
        return load_run(run, header, device, plan=plan)

    return load, header.clip, read_manifest(config.manifest, header.classes)


def open_bare_tower(config: DriftConfig, device: torch.device) -> tuple[Loader, ClipConfig, Manifest]:
    """The same for a tower as it was published, under a head that says nothing; each frame is a tubelet."""
    from bigvivit import assemble
    from bigvivit.memory.apply import apply_plan

    model_config = ModelConfig(
        tower=config.source, tower_init="pretrained", tubelet=1, temporal_depth=1, temporal_input="centred"
    )
    manifest = read_manifest(config.manifest)
    try:
        source = assemble.open_tower(model_config, seed=0)
    except ConfigError as error:
        raise ConfigError(f"{config.source} is no run (no {HEADER} in such a folder), and no tower: {error}") from None

    def load(plan: MemoryPlan) -> ViViT:
        model = assemble.build_model(
            source, model_config, config.clip, classes=len(manifest.classes), adapter=False, seed=0
        )
        apply_plan(model, plan, frozen=True, fill=source.fill, device=device)
        return model.eval()

    return load, config.clip, manifest


def pass_through(
    load: Loader, storage: Storage, clip: ClipConfig, manifest: Manifest, config: DriftConfig, device: torch.device
) -> Passage:
    """All clips through the tower in one form."""
    import torch

    from bigvivit.data.loader import build_eval_loader
    from bigvivit.eval import check_finite, collect
    from bigvivit.memory.freeze import stored_bytes

    loader = build_eval_loader(
        clip,
        manifest,
        views=1,
        crops=1,
        batch_size=config.batch_size,
        workers=config.workers,
        rank=0,
        world=1,
    )
    model = load(MemoryPlan(storage=storage, compute=EXACT))
    seen: list[Tensor] = []
    model.tower.register_forward_hook(lambda tower, inputs, vectors: seen.append(vectors.float().cpu()))
    outputs = collect(model, loader, classes=len(manifest.classes), description=storage)
    check_finite(Path(config.source), outputs, manifest)
    vectors = torch.cat(seen).unflatten(0, (len(outputs.indices), -1)) if seen else torch.empty(0)
    return Passage(outputs, dict(zip(outputs.indices, vectors, strict=True)), sum(stored_bytes(model.tower).values()))


def compare(own: Passage, exact: Passage, manifest: Manifest, *, of_a_run: bool) -> dict[str, Any]:
    """One form against fp32, over the clips that could be read both times."""
    import torch
    from torch.nn.functional import cosine_similarity

    from bigvivit.eval import score

    top1 = score(own.outputs, manifest)["top1"]  # refuses a manifest of which nothing can be read
    both = [index for index in own.vectors if index in exact.vectors]
    # In fp64: of vectors that are equal, fp32 makes 0.9999998 or 1.0000002.
    ours, theirs = (torch.stack([passage.vectors[index] for index in both]).double() for passage in (own, exact))
    cosines = cosine_similarity(ours, theirs, dim=-1)
    row = {
        "stored_bytes": own.stored_bytes,
        "cosine_mean": float(cosines.mean()),
        "cosine_min": float(cosines.min()),
    }
    if not of_a_run:
        return row
    guesses = [
        dict(zip(passage.outputs.indices, passage.outputs.logits.argmax(1).tolist(), strict=True))
        for passage in (own, exact)
    ]
    changed = sum(guesses[0][index] != guesses[1][index] for index in both)
    change = top1 - score(exact.outputs, manifest)["top1"]
    return row | {"top1": top1, "top1_change": change, "predictions_changed": changed}
