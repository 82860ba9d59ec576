"""What a stored form costs, against the same number taken by Hugging Face's model with bitsandbytes' own weights."""

from __future__ import annotations

import json
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel, ViTConfig, ViTModel

from bigvivit.config import ClipConfig, ConfigError, EvalConfig
from bigvivit.data.loader import build_eval_loader
from bigvivit.data.manifest import read_manifest
from bigvivit.drift import DriftConfig, measure_drift
from bigvivit.eval import evaluate_runs
from bigvivit.model.towers import resolve_tower
from tests.launching import Runs, call
from tests.model.reference import frame_vectors, save

CLIP = ClipConfig(frames=4, size=48, resize=52)


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tower")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    save(ViTModel(ViTConfig(**sizes, patch_size=8, image_size=48), add_pooling_layer=False), folder)
    return folder


def store(model: PreTrainedModel, storage: str) -> PreTrainedModel:
    """What is left of every weight: codes for the linear layers of the blocks, 16 bits for all else."""
    matrices = {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name not in matrices or storage in ("bf16", "fp16"):
                kept = weight.half() if storage == "fp16" else weight.bfloat16()
            elif storage == "int8":
                codes, scales, _ = bnb.int8_vectorwise_quant(weight)
                kept = bnb.int8_vectorwise_dequant(codes, scales)
            else:
                kept = bnb.dequantize_4bit(*bnb.quantize_4bit(weight.detach(), quant_type="nf4", blocksize=64))
            weight.copy_(kept)
    return model


def test_cosines_are_those_of_hugging_faces_model(tower: Path, demo: Path, tmp_path: Path) -> None:
    config = DriftConfig(
        source=str(tower), manifest=demo / "val.csv", clip=CLIP, out=tmp_path / "d.json", workers=0, device="cpu"
    )
    result = measure_drift(config)
    assert json.loads((tmp_path / "d.json").read_text()) == result
    rows = {row["storage"]: row for row in result["rows"]}
    assert list(rows) == ["fp32", "bf16", "fp16", "int8", "nf4"]
    assert rows["fp32"]["cosine_min"] == pytest.approx(1, abs=1e-12)

    manifest, spec = read_manifest(demo / "val.csv"), resolve_tower(str(tower))
    loader = build_eval_loader(CLIP, manifest, views=1, crops=1, batch_size=4, workers=0, rank=0, world=1)
    images = torch.cat([batch.clips.flatten(0, 2) for batch in loader])
    assert len(images) == 4 * len(manifest.clips) == 4 * result["clips"]

    def vectors(storage: str) -> Tensor:
        model = ViTModel.from_pretrained(tower, add_pooling_layer=False)
        return frame_vectors(model if storage == "fp32" else store(model, storage), spec, images).double()

    exact = vectors("fp32")
    for storage in ("bf16", "fp16", "int8", "nf4"):
        cosines = cosine_similarity(vectors(storage), exact, dim=-1)
        lost, expected = 1 - rows[storage]["cosine_mean"], 1 - float(cosines.mean())
        assert lost == pytest.approx(expected, rel=0.05), storage
        assert rows[storage]["cosine_min"] == pytest.approx(float(cosines.min()), abs=0.05 * expected + 1e-9)
    assert rows["fp32"]["stored_bytes"] > 1.9 * rows["bf16"]["stored_bytes"] > rows["int8"]["stored_bytes"]
    assert rows["int8"]["stored_bytes"] > rows["nf4"]["stored_bytes"]


def test_a_run_also_has_its_accuracy(runs: Runs, demo: Path) -> None:
    """In the form it was trained with, that of `bigvivit eval`; a form that changes no prediction changes no top-1."""
    config = DriftConfig(source=str(runs["plain1"]), manifest=demo / "val.csv", workers=0, device="cpu")
    result = measure_drift(config)
    assert json.loads((runs["plain1"] / "drift.json").read_text()) == result
    evaluated = EvalConfig(runs=(runs["plain1"],), manifest=demo / "val.csv", views=1, crops=1, workers=0, device="cpu")
    exact = result["rows"][0]
    assert exact["top1"] == evaluate_runs(evaluated)[0]["top1"]
    assert (exact["top1_change"], exact["predictions_changed"]) == (0, 0)
    for row in result["rows"]:
        assert 0.5 < row["cosine_min"] <= row["cosine_mean"] <= 1 + 1e-12
        assert abs(row["top1_change"]) * result["clips"] <= row["predictions_changed"] + 1e-9
    assert result["rows"][-1]["cosine_min"] < exact["cosine_min"]


def test_on_the_terminal(tower: Path, demo: Path, tmp_path: Path) -> None:
    """A table; and a video that cannot be read is counted apart."""
    lines = (demo / "val.csv").read_text().replace("clips/", f"{demo}/clips/").splitlines()
    (tmp_path / "cut.mp4").write_bytes(b"no video")
    (tmp_path / "val.csv").write_text("\n".join([*lines[:4], lines[4].replace(lines[4].split(",")[0], "cut.mp4")]))
    clip = ["--clip.frames", "2", "--clip.size", "48", "--clip.resize", "52", "--workers", "0", "--device", "cpu"]
    done = call("drift", tower, "--manifest", "val.csv", *clip, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "\nnf4  " in done.stdout
    assert "top-1" not in done.stdout
    assert (
        "frame vectors of 3 clips of 2 frames against those of fp32 weights; 1 videos could not be read" in done.stdout
    )
    assert (tmp_path / "drift.json").is_file()


def test_what_cannot_be_compared(tower: Path, runs: Runs, demo: Path, tmp_path: Path) -> None:
    def refusal(source: Path, manifest: Path = demo / "val.csv", **options: object) -> str:
        with pytest.raises(ConfigError) as caught:
            measure_drift(DriftConfig(source=str(source), manifest=manifest, workers=0, device="cpu", **options))
        return str(caught.value)

    assert "is no run (no checkpoint.json in such a folder), and no tower: " in refusal(tmp_path)
    assert "is a run and has its own way to cut clips" in refusal(runs["plain1"], clip=CLIP)
    assert "none.csv cannot be read" in refusal(tower, tmp_path / "none.csv")
    assert "is not a folder; give another" in refusal(tower, out=tmp_path / "none" / "drift.json")
    (tmp_path / "cut.mp4").write_bytes(b"no video")
    (tmp_path / "cut.csv").write_text("path,label\ncut.mp4,0\n")
    assert "none of its 1 videos can be read" in refusal(tower, tmp_path / "cut.csv", out=tmp_path / "d.json")
    assert not (tmp_path / "d.json").exists()
    with pytest.raises(ConfigError, match="batch_size=0 must be at least 1"):
        DriftConfig(source="x", manifest=tmp_path, batch_size=0)
