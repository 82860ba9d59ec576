"""A tower's weights: from safetensors files, drawn at random, and back into a folder that Hugging Face can read.

A `Fill` copies the weights of one named piece into a module that has room for them on the CPU, tensor by tensor:
neither a whole file nor a copy in the file's type is ever in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from bigvivit.model.blocks import init_weights
from bigvivit.model.catalog import SIZES
from bigvivit.model.hub import find_folder
from bigvivit.model.tensor_file import DTYPES, Entry, read_entries, read_tensor
from bigvivit.model.towers import TowerSpec, build_hf_model, hf_name
from bigvivit.model.tubelet import inflate_kernel
from bigvivit.versions import insides_of

with insides_of("transformers"):
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming, rename_source_key

Fill = Callable[[str, nn.Module], None]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
DOWNLOADED = [WEIGHTS, INDEX, "model-*-of-*.safetensors"]
DOWNLOADED_PICKLED = [PICKLED, PICKLED_INDEX, "pytorch_model-*-of-*.bin"]
"""A hub repository often holds the same weights in other formats too; these files are what is read."""


def random_weights(spec: TowerSpec, seed: int) -> Fill:
    """Initial weights, the same for (seed, piece) whatever the order and the engine."""
    scale = float(getattr(spec.config, "layerscale_value", 1.0))

    def fill(name: str, piece: nn.Module) -> None:
        refill_buffers(piece)
        init_weights(piece, seed, f"tower.{name}", layer_scale=scale)

    return fill


@dataclass(frozen=True)
class StoredTensor:
    """Where one of Hugging Face's parameters is stored."""

    file: Path
    entry: Entry | Tensor
    """Its place in a safetensors file; of a pickled one the tensor, whose bytes are still in the mapped file."""
    rows: tuple[int, int] | None = None
    """(first, last), where the file keeps several parameters in one tensor."""

    def read(self) -> Tensor:
        """The parameter. Raises ValueError for a file that was cut, or for values that are no numbers."""
        if isinstance(self.entry, Entry):
            tensor = read_tensor(self.file, self.entry, self.rows)
        else:
            tensor = self.entry if self.rows is None else self.entry[slice(*self.rows)]
        # Least and greatest, since isfinite would make copies; a NaN comes through.
        if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise ValueError(f"{self.file} holds weights that are infinite or no numbers: fetch it again")
        return tensor


def fetch_weights(spec: TowerSpec, *, allow_pickle: bool = False) -> Path:
    """The local folder with the tower's weights, downloaded from the hub where it must be.

    Raises ValueError where there are none in safetensors or, with `allow_pickle`, in PyTorch's own format.
    """
    if spec.name in SIZES:
        raise ValueError(
            f"model.tower={spec.name} is a size without published weights: add --model.tower-init random, "
            f"or give a model in Hugging Face format"
        )
    folder = find_folder(spec.name, DOWNLOADED)
    if (folder / WEIGHTS).is_file() or (folder / INDEX).is_file():
        return folder
    if allow_pickle:
        folder = find_folder(spec.name, DOWNLOADED_PICKLED)
        if (folder / PICKLED).is_file() or (folder / PICKLED_INDEX).is_file():
            return folder
    wanted = f"{WEIGHTS} nor {INDEX}" + (f" nor {PICKLED}" if allow_pickle else "")
    fix = "convert it with transformers' save_pretrained"
    if not allow_pickle:
        fix += f"; or, if you trust whoever made it, read a {PICKLED} with --model.allow-pickle"
    raise ValueError(f"tower {spec.name} has neither {wanted}, and pickled files can carry code: {fix}")


def weight_files(folder: Path) -> list[Path]:
    """The files of a tower's weights, in the order of their names. Raises ValueError where one is missing."""
    pickled = not (folder / WEIGHTS).is_file() and not (folder / INDEX).is_file()
    single, index = (PICKLED, PICKLED_INDEX) if pickled else (WEIGHTS, INDEX)
    if not (folder / index).is_file():
        return [folder / single]
    try:
        names = sorted(set(json.loads((folder / index).read_text())["weight_map"].values()))
        # `names` of other types than text cannot be sorted or have no path
        outside = [name for name in names if Path(name).name != name]
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder / index} is damaged ({error!r}): fetch the model again") from None
    if outside:
        raise ValueError(f"{folder / index} names files outside its folder: {', '.join(outside)}; do not trust it")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        listed = ", ".join(missing) or "none at all"
        raise ValueError(f"{folder / index} names files that are not there: {listed}; fetch the model again")
    return [folder / name for name in names]


def read_index(file: Path) -> dict[str, Entry] | dict[str, Tensor]:
    """What one file of weights holds, by name, without reading it. Raises ValueError for a damaged one."""
    if file.suffix == ".safetensors":
        return read_entries(file)
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # the unpickler's, the archive's, the system's
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{file} cannot be unpickled safely ({reason}): fetch it again, or convert it") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{file} is not a dictionary of tensors: convert it with transformers' save_pretrained")
    return tensors


def tower_checksum(folder: Path) -> str:
    """SHA-256 over the weight files, in the order of their names."""
    total = hashlib.sha256()
    for path in weight_files(folder):
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                total.update(block)
    return total.hexdigest()


def open_weights(spec: TowerSpec, folder: Path, tubelet: int) -> Fill:
    """What reads the tower's weights from `folder`, checked to be all there and of the right shape.

    An image's patch kernel is inflated to `tubelet` frames; one that already spans them is taken as it is.
    Raises ValueError that names every tensor that is missing or misshapen.
    """
    stored = find_tensors(spec, folder, tubelet)
    kernel = kernel_name(spec, tubelet)

    def fill(name: str, piece: nn.Module) -> None:
        refill_buffers(piece)
        with torch.no_grad():
            for key, parameter in piece.named_parameters():
                full = hf_name(spec, name, key)
                where = stored[full]
                tensor = where.read()
                if full == kernel and tensor.shape != parameter.shape:
                    tensor = inflate_kernel(tensor, tubelet)
                parameter.copy_(tensor)

    return fill


def find_tensors(spec: TowerSpec, folder: Path, tubelet: int) -> dict[str, StoredTensor]:
    """Where every parameter of Hugging Face's model is stored, by its name in the version installed."""
    try:
        model = build_hf_model(spec, tubelet)
    except Exception as error:  # whatever impossible dimensions lead to in there
        raise ValueError(f"no tower can be built from the config.json of {spec.name} ({error})") from None
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    kernel = kernel_name(spec, tubelet)
    stored, shapes = {}, {}
    # transformers' own table of what checkpoints called these tensors over the years.
    conversions = get_model_conversion_mapping(model) if isinstance(model, PreTrainedModel) else []
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    for file in weight_files(folder):
        for key, entry in read_index(file).items():
            full, pattern = key, None
            if not isinstance(model, PreTrainedModel):
                full = key.removeprefix("timm_model.")  # as transformers keeps a model of timm's
            elif key not in wanted:
                full, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, wanted)
            names = [full] if pattern is None else split_names(full, pattern, converters)
            if len(names) > 1 and (not entry.shape or entry.shape[0] % len(names)):
                raise ValueError(
                    f"{file}: {key} of shape {list(entry.shape)} is to be cut into {len(names)}: fetch it again"
                )
            for part, name in enumerate(names):
                share = entry.shape[0] // len(names) if len(names) > 1 else None
                rows = None if share is None else (part * share, (part + 1) * share)
                stored[name] = StoredTensor(file, entry, rows)
                shapes[name] = tuple(entry.shape) if share is None else (share, *entry.shape[1:])

    def fits(name: str) -> bool:
        image_kernel = (wanted[name][0], 3, *wanted[name][2:]) if name == kernel else None
        return shapes[name] in (wanted[name], image_kernel)

    faults = [f"{name} is missing" for name in wanted if name not in stored]
    faults += [
        f"{name} is in {stored[name].entry.dtype}, not in one of {', '.join(DTYPES)}"
        for name in wanted
        if name in stored and stored[name].entry.dtype not in (*DTYPES, *DTYPES.values())
    ]
    faults += [
        f"{name} is {list(shapes[name])}, not {list(wanted[name])}"
        for name in wanted
        if name in shapes and not fits(name)
    ]
    if faults:
        more = f"; and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise ValueError(
            f"the weights in {folder} are not those of a {spec.config.model_type} tower with these dimensions and "
            f"model.tubelet={tubelet}: {'; '.join(faults[:10])}{more}"
        )
    return stored


def split_names(full: str, pattern: str, converters: list[WeightConverter]) -> list[str]:
    """The parameters that a stored tensor is to be cut into, `full` being the first of them."""
    (converter,) = (entry for entry in converters if pattern in entry.source_patterns)
    operations = [type(operation) for operation in converter.operations]
    assert operations == [Chunk], f"{pattern} asks for {operations}"
    first, *_ = converter.target_patterns
    return [full.replace(first, target) for target in converter.target_patterns]


def kernel_name(spec: TowerSpec, tubelet: int) -> str:
    """Hugging Face's name of the patch kernel: the one convolution. Empty for a hybrid, which has none to inflate."""
    model = build_hf_model(spec, tubelet)
    names = [name for name, part in model.named_modules() if isinstance(part, nn.Conv2d)]
    assert len(names) == 1 or tubelet == 1
    return f"{names[0]}.weight" if len(names) == 1 else ""


def refill_buffers(piece: nn.Module) -> None:
    """CLIP's position_ids, and buffers of timm's, lose their values with their storage on the meta device."""
    for part in piece.modules():
        restore = getattr(part, "init_non_persistent_buffers", None)  # timm's
        if callable(restore):
            restore()
            continue
        for name, buffer in part.named_buffers(recurse=False):
            assert name == "position_ids", f"buffer {name} has no known value"
            buffer.copy_(torch.arange(buffer.numel()).view_as(buffer))


def write_piece(folder: Path, spec: TowerSpec, name: str, state: dict[str, Tensor]) -> None:
    """One trained piece as a safetensors file, under Hugging Face's names."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {hf_name(spec, name, key): tensor.contiguous() for key, tensor in state.items()}
    save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})


def finish_tower(folder: Path, spec: TowerSpec, tubelet: int) -> None:
    """The configuration and the index that make the written pieces a model that `from_pretrained` loads.

    Its patch kernel spans the tubelet, so to Hugging Face it is a model of images with 3 * tubelet channels.
    """
    model = build_hf_model(spec, tubelet)
    model.config.save_pretrained(folder)
    normalisation = {"image_mean": spec.mean, "image_std": spec.std, "do_normalize": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(normalisation, indent=2) + "\n")
    weight_map = {key: file.name for file in sorted(folder.glob("*.safetensors")) for key in stored_names(file)}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2) + "\n")


def stored_names(file: Path) -> Iterator[str]:
    """Names of the tensors in a safetensors file."""
    yield from read_entries(file)
