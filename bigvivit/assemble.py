"""A model from a configuration or from a checkpoint: the one place where towers, plans and checkpoints meet."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from bigvivit.config import ClipConfig, ConfigError, ModelConfig
from bigvivit.memory.apply import apply_plan
from bigvivit.memory.load import Fill
from bigvivit.memory.plan import MemoryPlan
from bigvivit.model.bank import ProbeBank, build_bank
from bigvivit.model.towers import Tower, TowerSpec, build_tower, resolve_tower
from bigvivit.model.transfer import Skipped, transfer
from bigvivit.model.vivit import ViViT, build_vivit
from bigvivit.model.weights import fetch_weights, open_weights, random_weights, tower_checksum
from bigvivit.training.checkpoint import BANK, Header, read_trainables
from bigvivit.versions import require_for_run


@dataclass(frozen=True)
class TowerSource:
    """A tower and where its weights come from, checked to be there."""

    spec: TowerSpec
    fill: Fill
    folder: Path | None
    """A trained tower's folder; None for a tower as it was published or drawn."""
    checksum: str | None
    """SHA-256 over the weight files; None for random weights."""


def choose_device(name: str, *, tf32: bool = False) -> torch.device:
    """The device of this rank, with fp32 products on CUDA exact or, if `tf32`, of rounded factors. Raises ConfigError
    for CUDA where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but PyTorch finds no CUDA device: leave it out, or give --device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", choose_gpu(int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()))
    torch.cuda.set_device(device)
    for products in (torch.backends.cuda.matmul, torch.backends.cudnn.conv):  # type: ignore[attr-defined]
        products.fp32_precision = "tf32" if tf32 else "ieee"
    return device


def choose_gpu(local_rank: int, visible: int) -> int:
    """The number, among the GPUs that this process sees, of the one for this rank of the node.

    Some launchers show each rank its own GPU alone. Raises ConfigError where there are more ranks than GPUs.
    """
    if local_rank < visible:
        return local_rank
    if visible == 1 and "CUDA_VISIBLE_DEVICES" in os.environ:
        return 0
    raise ConfigError(
        f"LOCAL_RANK={local_rank}, but this node has {visible} visible GPUs: start at most {visible} ranks on it"
    )


def open_tower(
    model: ModelConfig, *, seed: int, folder: Path | None = None, checksum: str | None = None
) -> TowerSource:
    """The tower that `model` names, or the trained one in `folder`.

    Raises ConfigError where it is not there or, given its `checksum`, not the one that was trained with.
    """
    assert model.tubelet is not None
    if folder is not None and not folder.is_dir():
        raise ConfigError(
            f"tower {folder} is not there: the run holds the way to the tower it was trained with, not its weights; "
            f"put that folder back where it was"
        )
    try:
        spec = resolve_tower(str(folder or model.tower), random=folder is None and model.tower_init == "random")
        if folder is None and model.tower_init == "random":
            return TowerSource(spec, random_weights(spec, seed), None, None)
        weights = fetch_weights(spec, allow_pickle=model.allow_pickle)
        fill = refuse_damaged(open_weights(spec, weights, model.tubelet))
        source = TowerSource(spec, fill, folder, tower_checksum(weights))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if checksum is not None and source.checksum != checksum:
        raise ConfigError(
            f"tower {folder or model.tower} is not the one this run was trained with (SHA-256 of its weights "
            f"{source.checksum}, then {checksum}): put the old weights back, or train the stage again"
        )
    return source


def refuse_damaged(fill: Fill) -> Fill:
    """`fill` with what it finds wrong in the files as a ConfigError: it reads them long after they were opened."""

    def fill_or_refuse(name: str, piece: torch.nn.Module) -> None:
        try:
            fill(name, piece)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    return fill_or_refuse


def check_types(source: TowerSource, plan: MemoryPlan) -> None:
    """Raise ConfigError for a compute type in which the tower is known to overflow."""
    if plan.compute == "fp16" and source.spec.family.fp16_safe is False:
        raise ConfigError(
            f"memory.compute=fp16: tower {source.spec.name} overflows in fp16; give --memory.compute bf16 or fp32"
        )


def build_model(
    source: TowerSource, model: ModelConfig, clip: ClipConfig, *, classes: int, adapter: bool, seed: int
) -> ViViT:
    """The model with its small parts ready and its tower still without storage, on the meta device."""
    assert model.temporal_depth is not None
    tower, options = prepare_model(source, model, clip)
    return build_vivit(
        tower, classes=classes, temporal_depth=model.temporal_depth, adapter=adapter, seed=seed, **options
    )


def build_probes(
    source: TowerSource, model: ModelConfig, clip: ClipConfig, *, classes: int, seed: int, depths: Sequence[int]
) -> ProbeBank:
    """`build_model` of stage 2, with a head for each of `depths`, those of their temporal transformers."""
    tower, options = prepare_model(source, model, clip)
    return build_bank(tower, depths, classes=classes, adapter=True, seed=seed, **options)


def prepare_model(source: TowerSource, model: ModelConfig, clip: ClipConfig) -> tuple[Tower, dict[str, Any]]:
    """The tower, and what all that follows it is built by. Raises ConfigError for frames that the tower cannot take."""
    assert model.tubelet is not None
    assert model.temporal_input is not None
    try:
        tower = build_tower(
            source.spec,
            tubelet=model.tubelet,
            image_size=clip.size,
            droplayer=model.droplayer,
            patch_grid=model.patch_grid,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    options = {"frames": clip.frames, "tubelet": model.tubelet, "droplayer": model.droplayer}
    return tower, {**options, "temporal_input": model.temporal_input, "patch_grid": model.patch_grid}


def tower_folder(run: Path, header: Header) -> Path | None:
    """The trained tower a checkpoint belongs to; None where it is a tower as it was published."""
    return None if header.tower_folder is None else run / header.tower_folder


def load_trained(model: nn.Module, run: Path, header: Header) -> list[Skipped]:
    """A run's trained parts into a model, or into every head of a probe bank. Returns every tensor that found no place,
    with the reason."""
    trainables, skipped = read_trainables(run, header), dict[str, Skipped]()
    for part in model.heads.values() if isinstance(model, ProbeBank) else [model]:
        own: dict[str, torch.Tensor] = {name: p for name, p in part.named_parameters() if not name.startswith("tower.")}
        skipped |= {entry.name: entry for entry in transfer(own, trainables)}
    return list(skipped.values())


def load_bank(bank: ProbeBank, checkpoint: Path) -> list[Skipped]:
    """Every head of a checkpoint into the bank it was made by."""
    return transfer(dict(bank.heads.named_parameters()), load_file(checkpoint / BANK))


def load_run(run: Path, header: Header, device: torch.device, *, plan: MemoryPlan | None = None) -> ViViT:
    """A finished run's model, whole on this device, frozen and ready to evaluate; by another plan than its own, if one
    is given."""
    plan = plan or evaluation_plan(header)
    require_for_run(storage=plan.storage)
    source = open_run_tower(run, header)
    model = build_model(
        source, header.model, header.clip, classes=len(header.classes), adapter=header.stage == 2, seed=header.seed
    )
    if skipped := load_trained(model, run, header):
        names = ", ".join(entry.name for entry in skipped)
        raise ConfigError(f"{run} does not hold the model its header describes ({names}): train the stage again")
    apply_plan(model, plan, frozen=True, fill=source.fill, device=device)
    return model.eval()


def open_run_tower(run: Path, header: Header) -> TowerSource:
    """The tower that a run was trained with. Raises ConfigError where it is not there any more."""
    return open_tower(header.model, seed=header.seed, folder=tower_folder(run, header), checksum=header.tower_checksum)


def evaluation_plan(header: Header) -> MemoryPlan:
    """A tower is evaluated as it was trained with: stage 1 holds it in fp32."""
    return header.memory if header.stage == 2 else replace(header.memory, storage="fp32", compute="fp32")
