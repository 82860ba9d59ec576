"""What a stage leaves behind, and what of it is refused."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bigvivit.config import ClipConfig, ConfigError, ModelConfig
from bigvivit.memory.plan import MemoryPlan
from bigvivit.training.checkpoint import (
    HEADER,
    TRAINABLES,
    Header,
    explain_full_disk,
    read_header,
    read_sealed,
    read_trainables,
    seal,
    write_checkpoint,
)

HEAD = Header(
    stage=1,
    model=ModelConfig(tower="vit-demo", tower_init="random", tubelet=2, temporal_depth=2, temporal_input="centred"),
    clip=ClipConfig(frames=8, size=48, resize=52, flip=False),
    memory=MemoryPlan(),
    classes=("a", "b"),
    clip_seconds=1.5,
    seed=3,
    tower_folder="tower",
    tower_checksum="0" * 64,
)
TENSORS = {"head.weight": torch.randn(2, 8), "temporal.cls_token": torch.randn(8, 1, 1).transpose(0, 2)}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, HEAD, TENSORS)
    header = read_header(tmp_path)
    assert replace(header, trainables_checksum="") == HEAD
    tensors = read_trainables(tmp_path, header)
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


@pytest.mark.parametrize("change", ["edit", "cut", "remove"])
def test_other_weights_than_the_headers_are_refused(change: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, HEAD, TENSORS)
    file = tmp_path / TRAINABLES
    blob = bytearray(file.read_bytes())
    if change == "edit":
        blob[-1] ^= 1
        file.write_bytes(blob)
    elif change == "cut":
        file.write_bytes(blob[:-10])
    else:
        file.unlink()
    with pytest.raises(ConfigError, match=TRAINABLES):
        read_trainables(tmp_path, read_header(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"holds no checkpoint\.json: give the folder"),
        ("{", r"checkpoint\.json is damaged"),
        ("[]", r"is damaged \(it holds no sha256 of itself"),
        ('{"stage": 1}', r"is damaged \(it holds no sha256 of itself"),
        (seal({"stage": 1}), r"is not a header this version wrote"),
    ],
)
def test_a_header_that_is_none(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / HEADER).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_header(tmp_path)


def test_a_setting_of_another_version_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, HEAD, TENSORS)
    record = read_sealed(tmp_path / HEADER)
    record["clip"]["warp"] = 9
    (tmp_path / HEADER).write_text(seal(record))
    with pytest.raises(ConfigError, match=r"not a header this version wrote.*warp"):
        read_header(tmp_path)


def test_an_edited_header_is_refused(tmp_path: Path) -> None:
    """Names of classes in another order, say: still a header, still of this version."""
    write_checkpoint(tmp_path, HEAD, TENSORS)
    text = (tmp_path / HEADER).read_text()
    (tmp_path / HEADER).write_text(text.replace('"a"', '"c"'))
    with pytest.raises(ConfigError, match=r"checkpoint\.json is damaged \(it was edited: its SHA-256 differs\)"):
        read_header(tmp_path)
    (tmp_path / HEADER).write_text(text)
    assert read_header(tmp_path).classes == HEAD.classes


def test_a_run_that_has_not_finished_names_what_it_has(tmp_path: Path) -> None:
    newest = tmp_path / "checkpoints" / "step-00000008"
    newest.mkdir(parents=True)
    with pytest.raises(
        ConfigError, match=rf"has not finished; go on with --resume, or give a checkpoint of it, {newest}"
    ):
        read_header(tmp_path)


def test_only_a_disk_is_called_full(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match=r"x could not be written into .*No space left"),
        explain_full_disk(tmp_path, "x"),
    ):
        Path("/dev/full").write_text("x")
    with pytest.raises(ConfigError, match="free"), explain_full_disk(tmp_path / "not" / "there", "x"):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")
    with pytest.raises(FileNotFoundError), explain_full_disk(tmp_path, "x"):
        (tmp_path / "gone").read_text()
