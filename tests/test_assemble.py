"""Broken, foreign and pickled weights through the door that training uses: one ConfigError, never a traceback."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bigvivit.assemble import choose_gpu, open_tower
from bigvivit.config import ConfigError, ModelConfig
from bigvivit.model.towers import build_tower
from tests.model.reference import MODELS, draw_images, frame_vectors, load, save

SHARDS = {"max_shard_size": "20KB"}
INDEX = "model.safetensors.index.json"


def config(folder: Path, *, allow_pickle: bool = False) -> ModelConfig:
    return ModelConfig(tower=str(folder), tower_init="pretrained", tubelet=1, allow_pickle=allow_pickle)


def change_json(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rename_first(folder: Path, name: object) -> None:
    def change(index: dict) -> None:
        index["weight_map"][next(iter(index["weight_map"]))] = name

    change_json(folder / INDEX, change)


def change_header(folder: Path, old: bytes, new: bytes) -> None:
    """Replace in a file's header, keeping its length."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = data[8:end]
    assert old in header
    changed = header.replace(old, new, 1).rstrip(b" ")
    assert len(changed) <= len(header)
    path.write_bytes(data[:8] + changed.ljust(len(header)) + data[end:])


def retype(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["layernorm.weight"] = torch.ones(32, dtype=torch.int64)
    save_file(tensors, folder / "model.safetensors")


BROKEN: list[tuple[str, dict[str, str], Callable[[Path], object], str]] = [
    ("index names a file outside", SHARDS, lambda f: rename_first(f, "../../x.safetensors"), "outside its folder"),
    ("index names an absolute file", SHARDS, lambda f: rename_first(f, "/etc/passwd"), "outside its folder"),
    ("index names no file", SHARDS, lambda f: rename_first(f, "gone.safetensors"), "not there: gone.safetensors"),
    ("index names a number", SHARDS, lambda f: rename_first(f, 3), "is damaged"),
    ("index is a list", SHARDS, lambda f: (f / INDEX).write_text("[]"), "is damaged"),
    ("index is deep", SHARDS, lambda f: (f / INDEX).write_text("[" * 100_000), "is damaged"),
    ("index is empty", SHARDS, lambda f: (f / INDEX).write_text('{"weight_map": {}}'), "none at all"),
    ("file is empty", {}, lambda f: (f / "model.safetensors").write_bytes(b""), "not a whole safetensors file"),
    ("file is cut", {}, lambda f: os.truncate(f / "model.safetensors", 20_000), "not a whole safetensors file"),
    ("shape is changed", {}, lambda f: change_header(f, b"[32,32]", b"[32,31]"), "not a whole safetensors file"),
    ("shape is no number", {}, lambda f: change_header(f, b"[32,32]", b"[3e9999]"), "not a whole safetensors file"),
    ("type is unknown", {}, lambda f: change_header(f, b'"F32"', b'"F99"'), "is in F99, not in one of"),
    ("type is whole numbers", {}, retype, "layernorm.weight is in I64, not in one of"),
    ("config is cut", {}, lambda f: os.truncate(f / "config.json", 40), "config.json of tower"),
    ("config is a list", {}, lambda f: (f / "config.json").write_text("[]"), "config.json of tower"),
    ("width is text", {}, lambda f: change_json(f / "config.json", lambda c: c.update(hidden_size="w")), "config.json"),
    ("5 heads", {}, lambda f: change_json(f / "config.json", lambda c: c.update(num_attention_heads=5)), "not those"),
    ("mean of two", {}, lambda f: (f / "preprocessor_config.json").write_text('{"image_mean": [0, 1]}'), "three col"),
    ("deviation 0", {}, lambda f: (f / "preprocessor_config.json").write_text('{"image_std": [1, 0, 1]}'), "three col"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "spoil", "message"), [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN])
def test_a_broken_tower_is_one_error(
    options: dict[str, str], spoil: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    save(MODELS["vit"](), tmp_path, **options)
    open_tower(config(tmp_path), seed=0)
    spoil(tmp_path)
    with pytest.raises(ConfigError) as caught:
        open_tower(config(tmp_path), seed=0)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_weights_of_another_model(tmp_path: Path) -> None:
    save(MODELS["vit"](), tmp_path)
    save(MODELS["clip"](), tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").replace(tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"are not those of a vit tower .* is missing; .*; and \d+ more"):
        open_tower(config(tmp_path), seed=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers(value: float, tmp_path: Path) -> None:
    model = MODELS["vit"]()
    save(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["layernorm.weight"][7] = value
    save_file(tensors, tmp_path / "model.safetensors")
    source = open_tower(config(tmp_path), seed=0)
    pool = build_tower(source.spec, tubelet=1, image_size=32, droplayer=0.0).pool.to_empty(device="cpu")
    with pytest.raises(ConfigError, match=r"model\.safetensors holds weights that are infinite or no numbers"):
        source.fill("pool", pool)


def test_a_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    save(MODELS["vit"](), tmp_path)
    source = open_tower(config(tmp_path), seed=0)
    os.truncate(tmp_path / "model.safetensors", 4000)
    with pytest.raises(ConfigError, match="has become shorter while it was read"):
        load(source.spec, source.fill, tubelet=1, image_size=32)


def pickle_weights(folder: Path) -> Path:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def test_pickled_weights_only_when_asked_for(tmp_path: Path) -> None:
    model = save(MODELS["vit"](), tmp_path)
    pickle_weights(tmp_path)
    with pytest.raises(ConfigError, match=r"read a pytorch_model\.bin with --model\.allow-pickle"):
        open_tower(config(tmp_path), seed=0)
    source = open_tower(config(tmp_path, allow_pickle=True), seed=0)
    assert source.checksum is not None
    tower = load(source.spec, source.fill, tubelet=1, image_size=32)
    images = draw_images(2, 3, 32)
    torch.testing.assert_close(tower(images), frame_vectors(model, source.spec, images), rtol=0, atol=1e-5)


class Code:
    """Writes a file when it is unpickled by anything that lets it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


def test_a_pickle_that_carries_code_is_not_run(tmp_path: Path) -> None:
    save(MODELS["vit"](), tmp_path)
    path = pickle_weights(tmp_path)
    torch.save({"a": Code(tmp_path / "ran")}, path)
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin cannot be unpickled safely"):
        open_tower(config(tmp_path, allow_pickle=True), seed=0)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04 nonsense"])
def test_a_damaged_pickle(content: bytes, tmp_path: Path) -> None:
    save(MODELS["vit"](), tmp_path)
    pickle_weights(tmp_path).write_bytes(content)
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin cannot be unpickled safely"):
        open_tower(config(tmp_path, allow_pickle=True), seed=0)


def test_a_trained_tower_that_was_moved_away_is_missed_by_its_folder(tmp_path: Path) -> None:
    """Not looked for under that name on the hub."""
    with pytest.raises(ConfigError, match=r"stage1/tower is not there: .*; put that folder back where it was"):
        open_tower(config(tmp_path), seed=0, folder=tmp_path / "stage1" / "tower", checksum="0" * 64)


def test_each_rank_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [choose_gpu(rank, 4) for rank in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ConfigError, match=r"LOCAL_RANK=1, but this node has 1 visible GPUs"):
        choose_gpu(1, 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")  # as a launcher that shows each rank its own says it
    assert choose_gpu(3, 1) == 0
    with pytest.raises(ConfigError, match="start at most 2 ranks"):
        choose_gpu(2, 2)
