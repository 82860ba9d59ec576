"""Every engine trains to the same losses: two gloo ranks of each against one plain process."""

from __future__ import annotations

import itertools
import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bigvivit.config import EvalConfig
from bigvivit.eval import evaluate_runs
from tests.launching import (
    BIN,
    LOSS_TOLERANCE,
    ROOT,
    STAGE1,
    STAGE2,
    ZERO3,
    Runs,
    environment,
    free_port,
    read_losses,
    train,
)

ZERO2 = ["--ds", "ds_configs/zero2.json"]
SHIPPED = sorted(path.stem for path in (ROOT / "ds_configs").glob("*.json"))
LAUNCHERS = {"zero3": "accelerate"}
"""Of the shipped files; the others go through DeepSpeed's own."""

ENGINES = {
    "ddp": ("torchrun", []),
    "zero0": ("torchrun", ["--ds", "zero0.json"]),
    "zero1": ("torchrun", ["--ds", "zero1.json"]),
    **{name: (LAUNCHERS.get(name, "deepspeed"), ["--ds", f"ds_configs/{name}.json"]) for name in SHIPPED},
    "fsdp2": ("torchrun", ["--fsdp"]),
}


SLOW = {
    *(("zero0", 1), ("zero0", 2), ("zero1", 1), ("zero1", 2), ("ddp", 2), ("zero2", 1), ("zero3_offload", 1)),
    ("fsdp2", 1),  # two nodes, below, train so too
}


@pytest.mark.parametrize(
    ("engine", "stage"),
    [
        pytest.param(*cell, marks=pytest.mark.slow) if cell in SLOW else cell
        for cell in itertools.product(ENGINES, (1, 2))
    ],
)
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
    assert (record["engine"], record["ranks"]) == (engine.partition("_")[0], 2)
    plain = runs[f"plain{stage}"]
    assert read_losses(tmp_path / "run") == pytest.approx(read_losses(plain), abs=LOSS_TOLERANCE)
    ours, expected = (load_file(run / "trainables.safetensors") for run in (tmp_path / "run", plain))
    assert ours.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], rtol=0, atol=1e-3, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_eight_bit_states_train_like_fp32_ones(name: str, runs: Runs, demo: Path, tmp_path: Path) -> None:
    """On the plain engine and sharded over two ranks, whose blocks of codes begin elsewhere."""
    lr = 0.02 if name == "sgd" else 3e-4
    settings = [*STAGE1, "--data.train", demo / "train.csv", "--optim.lr", lr]
    if name == "adamw":
        train("python", tmp_path / "fp32", *settings, "--optim.name", name)
    expected = read_losses(runs["plain1"] if name == "sgd" else tmp_path / "fp32")
    engines = {"plain": ("python", []), "zero3": ("torchrun", ZERO3), "zero2": ("torchrun", ZERO2)}
    for engine in ("plain", "zero3" if name == "sgd" else "zero2"):
        launcher, options = engines[engine]
        train(launcher, tmp_path / engine, *settings, *options, "--optim.name", f"{name}8bit")
        assert read_losses(tmp_path / engine) == pytest.approx(expected, abs=LOSS_TOLERANCE)


def test_two_nodes(runs: Runs, demo: Path, tmp_path: Path) -> None:
    """Two launchers that meet over TCP, each with a rank that is the first on its machine."""
    port = free_port()
    settings = ["--out", tmp_path / "run", *STAGE1, "--data.train", demo / "train.csv", "--fsdp"]
    nodes = []
    for node in range(2):
        meet = ["--nnodes", 2, "--node_rank", node, "--nproc_per_node", 1, "--master_addr", "127.0.0.1"]
        words = [BIN / "torchrun", *meet, "--master_port", port, "bigvivit/train.py", *settings]
        nodes.append(subprocess.Popen([str(word) for word in words], cwd=ROOT, env=environment()))
    assert [node.wait(300) for node in nodes] == [0, 0]
    assert read_losses(tmp_path / "run") == pytest.approx(read_losses(runs["plain1"]), abs=LOSS_TOLERANCE)


@pytest.mark.parametrize(
    ("launcher", "options"),
    [
        ("torchrun", ["--fsdp"]),
        pytest.param("torchrun", ["--ds", "ds_configs/zero3.json"], marks=pytest.mark.slow),
    ],
)
def test_validation_counts_each_clip_once(launcher: str, options: list, runs: Runs, demo: Path, tmp_path: Path) -> None:
    """15 clips over two ranks of 2: one rank has a batch fewer, and both a last one that is not full."""
    lines = (demo / "val.csv").read_text().replace("clips/", f"{demo}/clips/").splitlines()
    (tmp_path / "val.csv").write_text("\n".join(lines[:16]) + "\n")
    data = ["--data.train", demo / "train.csv", "--data.val", tmp_path / "val.csv"]
    train(launcher, tmp_path / "run", *STAGE1, *data, "--save-every", 4, *options)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    scores = [record for record in records if "val_top1" in record]
    assert [record["step"] for record in scores] == [4, 8]
    assert [record["loss"] for record in records if "loss" in record] == pytest.approx(
        read_losses(runs["plain1"]), abs=LOSS_TOLERANCE
    )
    config = EvalConfig(
        runs=(tmp_path / "run",), manifest=tmp_path / "val.csv", views=1, crops=1, batch_size=5, workers=0, device="cpu"
    )
    assert scores[-1]["val_top1"] == pytest.approx(evaluate_runs(config)[0]["top1"])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["val_top1"] == scores[-1]["val_top1"]
    better = scores[0]["val_top1"] > scores[-1]["val_top1"]
    assert ("best_checkpoint" in summary) == better == (tmp_path / "run" / "checkpoints").exists()
