"""`bigvivit dryrun` as its users start it: their programs in processes of their own, on virtual GPUs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bigvivit.config import ConfigError
from bigvivit.forecast import virtual_gpu
from bigvivit.units import GiB
from tests.launching import BIN, call, environment, free_port

TRAIN = """
import sys, torch
size, path = int(sys.argv[1]), sys.argv[2]
net = torch.nn.Linear(1024, 1024).cuda()
optimizer = torch.optim.AdamW(net.parameters())
for step in range(2):
    net(torch.randn(size, 1024, device="cuda")).mean().backward()
    optimizer.step()
torch.cuda.synchronize()
open(path, "w").write(f"{torch.cuda.max_memory_allocated()} {torch.cuda.max_memory_reserved()}")
"""
DDP = """
import os, torch, torch.distributed as dist
torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group("nccl")
net = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(256, 256).cuda())
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
while True:
    optimizer.zero_grad()
    net(torch.randn(8, 256, device="cuda")).mean().backward()
    optimizer.step()
"""


@pytest.fixture(scope="module")
def _gpu() -> None:
    """A virtual GPU, or a skip that says why there is none."""
    try:
        virtual_gpu.environment("L4")
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.fixture
def program(tmp_path: Path, _gpu: None) -> Path:
    return tmp_path / "train.py"


def dryrun(*words: object, cwd: Path, timeout: int = 240) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    command = [sys.executable, "-m", "bigvivit.cli", "dryrun", *map(str, words)]
    return subprocess.run(
        command, check=False, cwd=cwd, capture_output=True, text=True, timeout=timeout, env=environment(COLUMNS="160")
    )


def test_what_a_program_says_of_itself_is_what_is_reported(program: Path, tmp_path: Path) -> None:
    program.write_text(TRAIN)
    snapshot = tmp_path / "snapshot.pickle"
    words = ("--gpu", "2080 Ti", "--json", "--snapshot", snapshot, "--", sys.executable, program, 64, tmp_path / "said")
    done = dryrun(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    allocated, reserved = map(int, (tmp_path / "said").read_text().split())
    assert (found["verdict"], found["evidence"], found["gpu"]) == ("fits", "virtual", "RTX 2080 Ti")
    assert (found["peak_allocated_bytes"], found["peak_reserved_bytes"]) == (allocated, reserved)
    assert found["peak_driver_bytes"] > reserved
    assert found["scratch_not_known"] == {}
    (rank,) = found["ranks"]
    assert (rank["steps"], rank["ended"]) == (2, "exit")
    phases = rank["devices"][0]["phases"]
    assert max(row["peak_allocated_bytes"] for row in phases) == allocated
    assert [(row["step"], row["phase"]) for row in phases][:5] == [
        ("loading", "loading"),
        *(("first", phase) for phase in ("forward", "backward", "after backward", "optimizer")),
    ]
    lines = {row["line"]: row["phase"] for row in rank["devices"][0]["largest"]}
    assert lines["train.py:4"] == "loading"  # the weights
    assert lines["train.py:8"] == "optimizer"  # AdamW's states
    assert found["expandable_segments"]["by"] == "allocator model"
    replayed = call("replay", snapshot, "--json")
    assert json.loads(replayed.stdout)["recorded_peak_reserved_bytes"] == reserved


def test_what_is_not_known_is_said(program: Path, tmp_path: Path) -> None:
    program.write_text("""
import torch
from torch import nn
net = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 3), nn.Flatten(2), nn.LSTM(36, 8)).cuda()
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
while True:
    net(torch.randn(2, 3, 32, 32, device="cuda"))[0].sum().backward()
    optimizer.step()
""")
    done = dryrun("--gpu", "L4", "--", sys.executable, program, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    said = [line for line in done.stdout.splitlines() if " ran whose " in line]
    assert said == [  # forward, and gradients of data and weight, in each of three steps
        "9 convolutions ran whose scratch in cuDNN is an estimate.",
        "9 passes of recurrent networks ran whose space in cuDNN is an estimate.",
    ]


def test_out_of_memory_is_said_with_its_line(program: Path, tmp_path: Path) -> None:
    program.write_text(TRAIN)
    words = ("--gpu", "2080 Ti", "--", sys.executable, program, 4_000_000, tmp_path / "said")
    done = dryrun(*words, cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "out of memory (virtual)" in done.stdout
    assert "CUDA out of memory. Tried to allocate 15.26 GiB" in done.stdout
    assert "in the loading and initialisation, at train.py:7" in done.stdout
    assert "expandable_segments:True, run again: ends the same way" in done.stdout
    assert not (tmp_path / "said").exists()


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import torch; torch.ones(3, device='cuda') @ torch.ones(4, device='cuda')", "RuntimeError: inconsistent"),
        ("import sys; sys.exit('no such dataset')", "no such dataset"),
        ("print('nothing')", "none of its processes used CUDA"),
    ],
)
def test_a_program_that_fails_of_something_else_never_fits(program: Path, tmp_path: Path, code: str, said: str) -> None:
    program.write_text(code)
    done = dryrun("--gpu", "L4", "--", sys.executable, program, cwd=tmp_path)
    assert done.returncode == 3, done.stdout + done.stderr
    assert said in done.stdout
    assert "fits" not in done.stdout


def test_ranks_of_torchrun_end_without_a_word_of_their_launcher(program: Path, tmp_path: Path) -> None:
    program.write_text(DDP)
    launcher = (BIN / "torchrun", "--nproc_per_node", 2, "--master_port", free_port(), program)
    done = dryrun("--gpu", "A100 80GB", "--gpus", 2, "--json", "--", *launcher, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert (found["verdict"], found["exit_code"]) == ("fits", 0)
    assert [(rank["rank"], rank["steps"], rank["ended"]) for rank in found["ranks"]] == [
        (0, 3, "steps"),
        (1, 3, "steps"),
    ]


CAUGHT = """
import sys, torch
net = torch.nn.Linear(1024, 1024).cuda()
optimizer = torch.optim.AdamW(net.parameters())
size = 4_000_000
while True:
    try:
        optimizer.zero_grad()
        net(torch.randn(size, 1024, device="cuda")).mean().backward()
        optimizer.step()
    except torch.OutOfMemoryError:
        if "gives up" in sys.argv:
            break
        size //= 8
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("word", "code", "said"), [("halves", 0, "went on after 1 alloc"), ("gives up", 1, "15.3 GiB")]
)
def test_who_catches_the_error_fits_only_if_it_steps_after_it(
    program: Path, tmp_path: Path, word: str, code: int, said: str
) -> None:
    program.write_text(CAUGHT)
    done = dryrun("--gpu", "2080 Ti", "--", sys.executable, program, word, cwd=tmp_path)
    assert done.returncode == code, done.stdout + done.stderr
    assert said in done.stdout


@pytest.mark.slow
def test_the_largest_size_that_fits_is_searched_for(program: Path, tmp_path: Path) -> None:
    program.write_text(TRAIN.replace("size, path = int(sys.argv[1])", "size, path = int(sys.argv[3]) * 65536"))
    words = ("--gpu", "T4", "--search", "{} --last", "--json", "--", sys.executable, program, "x", "said", 8, "--last")
    done = dryrun(*words, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    verdicts = {row["value"]: row["verdict"] for row in found["tried"]}
    assert verdicts[found["largest"]] == "fits"
    assert verdicts[found["largest"] + 1] == "out of memory"
    # Each unit is 256 MiB of inputs and as many outputs, and their gradients: 14.56 GiB hold 18 to 29 of them.
    assert 18 <= found["largest"] <= 29
    assert done.stderr.count("run ") == len(verdicts)


def test_the_sandbox_keeps_files_as_they_are(program: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("before")
    program.write_text(
        "import os, sys\n"
        "open('kept', 'w').write('after'); open('new', 'w').write('x'); os.makedirs('deep/er')\n"
        "sys.exit(' '.join([open('kept').read(), *sorted(os.listdir('.')), os.environ['HF_HUB_OFFLINE']]))"
    )
    done = dryrun("--gpu", "L4", "--sandbox", "--", sys.executable, program, cwd=tmp_path)
    if done.returncode == 2 and "does not permit" in done.stderr:
        pytest.skip(done.stderr)
    assert "after deep kept new train.py 1" in done.stdout, done.stderr
    assert (tmp_path / "kept").read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "train.py"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--gpu", "L4"), "no command is given"),
        (("--gpu", "GTX 1", "--", "python"), "GTX 1"),
        (("--gpu", "TPU v3", "--", "python"), "no NVIDIA GPU"),
        (("--gpu", "L4", "--steps", "1", "--", "python"), "steps=1 must be at least 2"),
        (("--gpu", "L4", "--gpus", "65", "--", "python"), "gpus=65"),
        (("--gpu", "L4", "--search", "batch", "--", "python"), "must have one {}"),
        (("--gpu", "L4", "--snapshot", "nowhere/x.pickle", "--", "python"), "not a folder"),
    ],
)
def test_wrong_usage_is_said_before_anything_runs(words: tuple[str, ...], said: str) -> None:
    done = call("dryrun", *words)
    assert done.returncode == 2
    assert said in done.stderr


@pytest.mark.usefixtures("_gpu")
def test_a_program_that_is_not_there() -> None:
    done = call("dryrun", "--gpu", "L4", "--", "no-such-program")
    assert (done.returncode, "'no-such-program' is no program" in done.stderr) == (2, True)


def test_what_was_measured_on_the_card_counts(program: Path, tmp_path: Path) -> None:
    program.write_text(TRAIN)
    values = {
        "card": "NVIDIA GeForce RTX 2080 Ti", "device": "cuda", "evidence": "measured", "date": "2026-11-26",
        "torch": "2.14.1", "cuda": "13.0", "driver": "580.65", "capability": 75, "memory_bytes": 10 * GiB,
        "context_bytes": [GiB, 2 * GiB, 2 * GiB], "workspace_bytes": None, "scratch_bytes": None, "rates": {},
        "bandwidth": None, "host_bandwidth": None, "disk_bandwidth": None,
    }  # fmt: skip
    (tmp_path / "calibration.json").write_text(json.dumps(values))
    words = ("--calibration", tmp_path / "calibration.json", "--", sys.executable, program, 64, tmp_path / "said")
    done = dryrun("--gpu", "2080 Ti", "--json", *words, cwd=tmp_path)
    found = json.loads(done.stdout)
    assert found["calibration"]["where"].startswith("measured on this card on 2026-11-26 (driver 580.65")
    assert found["peak_driver_bytes"] == found["peak_reserved_bytes"] + 2 * GiB
    assert "context 2 GiB, measured on this card" in dryrun("--gpu", "2080 Ti", *words, cwd=tmp_path).stdout
    refused = dryrun("--gpu", "L4", *words, cwd=tmp_path)
    assert (refused.returncode, "Traceback" in refused.stderr) == (2, False)
    assert "was measured on NVIDIA GeForce RTX 2080 Ti, which is not L4" in refused.stderr


LARGE = """
import resource, torch
net = torch.nn.Sequential(*[torch.nn.Linear(8192, 8192, bias=False) for _ in range(104)])  # 7 B, 26 GiB in fp32
with torch.no_grad():
    net[0].weight.normal_(std=0.02)
net.cuda()
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
for _ in range(3):
    net(torch.randn(2, 8192, device="cuda")).mean().backward()
    open(f"{__file__}.rss", "w").write(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
    optimizer.step()
    optimizer.zero_grad()
"""


def test_a_model_larger_than_the_host_runs_without_its_initialisation(program: Path, tmp_path: Path) -> None:
    """7 B weights take nothing of the host, and 52 GiB of the GPU with their gradients."""
    program.write_text(LARGE)
    done = dryrun("--gpu", "A100 80GB", "--steps", 3, "--skip-init", "--json", "--", "python", program, cwd=tmp_path)
    found = json.loads(done.stdout)
    assert found["verdict"] == "fits", done.stdout
    assert found["peak_allocated_bytes"] > 2 * 104 * 8192**2 * 4
    assert int((tmp_path / "train.py.rss").read_text()) < 2 * GiB / 1024  # of KiB, with what importing torch takes
