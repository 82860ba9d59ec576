"""Every engine trains to the same losses: two gloo ranks of each against one plain process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.launching import LOSS_TOLERANCE, STAGE1, STAGE2, Runs, read_losses, train

ENGINES = {
    "ddp": ("torchrun", []),
    "zero0": ("torchrun", ["--ds", "zero0.json"]),
    "zero1": ("torchrun", ["--ds", "zero1.json"]),
    "zero2": ("deepspeed", ["--ds", "ds_configs/zero2.json"]),
    "zero3": ("accelerate", ["--ds", "ds_configs/zero3.json"]),
    "fsdp2": ("torchrun", ["--fsdp"]),
}


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_give_the_losses_of_one_plain_process(
    engine: str, stage: int, runs: Runs, demo: Path, tmp_path: Path
) -> None:
    launcher, options = ENGINES[engine]
    if options[-1:] in (["zero0.json"], ["zero1.json"]):
        options = ["--ds", tmp_path / options[-1]]
        options[-1].write_text(json.dumps({"zero_optimization": {"stage": int(engine[-1])}}))
    data = ["--data.train", demo / "train.csv"]
    settings = [*STAGE1, *data] if stage == 1 else [*STAGE2, *data, "--init-from", runs["plain1"]]
    train(launcher, tmp_path / "run", *options, *settings)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["engine"], record["ranks"]) == (engine, 2)
    plain = runs[f"plain{stage}"]
    assert read_losses(tmp_path / "run") == pytest.approx(read_losses(plain), abs=LOSS_TOLERANCE)
    ours, expected = (load_file(run / "trainables.safetensors") for run in (tmp_path / "run", plain))
    assert ours.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], rtol=0, atol=1e-3, msg=name)
