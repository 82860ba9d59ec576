"""Installations that lack a part: what does not need it works, and what needs it names it with the install command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bigvivit.versions import PACKAGES
from tests.environments import build_environment, everything_but, run, with_what_they_need
from tests.forecast.snapshots import dump, snapshot
from tests.launching import ROOT, STAGE1
from tests.test_testing import PROGRAM

LEAST = ("torch", "transformers", "safetensors", "tyro", "rich")
WALK = """
import contextlib, io, json, sys
from bigvivit import cli
results = {}
for name, words in json.load(sys.stdin).items():
    out, err, code = io.StringIO(), io.StringIO(), 0
    sys.argv = ["bigvivit", *words]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
    results[name] = [code, out.getvalue(), err.getvalue()]
json.dump(results, sys.stdout)
"""
Results = dict[str, tuple[int, str, str]]
BLOCKS = [[512, "active_allocated", 512], [(2 << 20) - 512, "inactive", 0]]
SNAPSHOT = snapshot([[4096, 2 << 20, 0, "small", False, BLOCKS]], [["S", 4096, 2 << 20, 0], ["a", 4096, 512, 0]])


def walk(python: Path, calls: dict[str, list[object]], cwd: Path) -> Results:
    """Commands in one process: exit code, output and errors of each."""
    (cwd / "walk.py").write_text(WALK)
    (cwd / "calls.json").write_text(json.dumps({name: [str(word) for word in words] for name, words in calls.items()}))
    done = run(python, "-c", "import sys; sys.stdin = open('calls.json'); exec(open('walk.py').read())", cwd=cwd)
    assert done.returncode == 0, done.stderr
    results: Results = json.loads(done.stdout)
    return results


TRAIN: list[object] = ["train", "--out", "run", *STAGE1, "--data.train", "none.csv"]
CARD: list[object] = ["--hardware", "RTX 3090", "--tower", "vit-demo", "--size", 48, "--frames", 8, "--classes", 8]
CALLS: dict[str, list[object]] = {
    "train": TRAIN,
    "train --ds": [*TRAIN, "--ds", "zero3"],
    "train 8 bits": [*TRAIN, "--optim.name", "sgd8bit"],
    "plan --ds": ["plan", *CARD, "--ds", "zero3", "--memory.group", 0],
    "eval": ["eval", "none", "--manifest", "none.csv"],
    "predict": ["predict", "none", "none.mp4"],
    "drift": ["drift", "none", "--manifest", "none.csv", "--out", "none/none"],
    "check": ["check", "none.csv"],
    "report": ["report", "none"],
    "demo": ["demo", "file"],
    "replay": ["replay", "none"],
}
"""Each fails at what it is given, before torch is imported, unless it is stopped by what is missing first."""
NEEDED = {
    "deepspeed": {"train --ds"},
    "bitsandbytes": {"train 8 bits", "drift"},
    "av": {"train", "train --ds", "train 8 bits", "eval", "predict", "drift", "check", "demo"},
    "torchvision": {"train", "train --ds", "train 8 bits", "eval", "predict", "drift"},
    "torchmetrics": {"eval"},
    "matplotlib": {"eval", "report"},
    "decord": set(),
    "accelerate nvidia-ml-py ninja timm torchcodec tensorboard": set(),
}


@pytest.mark.parametrize("missing", NEEDED)
def test_one_part_is_missing(missing: str, tmp_path: Path) -> None:
    """Its metadata, too."""
    python = build_environment(tmp_path / "env", everything_but(*missing.split()))
    (tmp_path / "file").write_text("")
    for name, (code, _, errors) in walk(python, CALLS, tmp_path).items():
        assert code == 2, (name, errors)
        assert errors.startswith("error: "), (name, errors)
        needs = (
            f"needs {missing}, which is not installed: {PACKAGES[missing].install}" if " " not in missing else "needs"
        )
        assert (needs in errors) == (name in NEEDED[missing]), (name, errors)
    code = "from bigvivit.training.report import *; import json; print(json.dumps(read_versions(PACKAGES)))"
    done = run(python, "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    versions = json.loads(done.stdout)
    absent = {name for name, version in versions.items() if version == "not installed"}
    assert absent == set(versions) & set(missing.split())


@pytest.fixture(scope="module")
def least(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """torch, transformers, safetensors, tyro, rich, what they need themselves, and pytest."""
    return build_environment(tmp_path_factory.mktemp("least") / "env", with_what_they_need((*LEAST, "pytest")))


def test_what_five_packages_are_enough_for(least: Path, tmp_path: Path) -> None:
    dump(tmp_path / "snapshot.pickle", SNAPSHOT)
    works: dict[str, list[object]] = {
        "towers": ["towers"],
        "plan": ["plan", *CARD],
        "replay": ["replay", "snapshot.pickle", "--json"],
    }
    refused: dict[str, list[object]] = {
        "timm": ["plan", *CARD, "--tower", "timm/eva_giant_patch14_224"],
        "deepspeed": ["plan", *CARD, "--ds", "zero3"],
        "bitsandbytes": ["plan", *CARD, "--memory.storage", "nf4"],
        "av": CALLS["train"],
    }
    results = walk(least, {**works, **refused}, tmp_path)
    for name in works:
        assert results[name][0] == 0, results[name]
    assert "dinov2-giant" in results["towers"][1]
    assert ": fits (" in results["plan"][1]
    for name in refused:
        assert results[name][0] == 2
        assert f"needs {name}" in results[name][2], results[name]
        assert PACKAGES[name].install in results[name][2]


def test_doctor_says_what_is_missing_for_what(least: Path, tmp_path: Path) -> None:
    done = run(least, "-m", "bigvivit.cli", "doctor", "--json", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    facts = json.loads(done.stdout)
    states = {found["name"]: found["state"] for found in facts["packages"]}
    assert {name for name, state in states.items() if state != "missing"} == {*LEAST, "numpy"}
    failing = [finding for finding in facts["findings"] if finding["level"] == "fails"]
    for name in ("av", "torchvision", "deepspeed"):
        assert any(PACKAGES[name].install == finding["fix"] for finding in failing), name


def test_the_pytest_plugin(least: Path, tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["bigvivit.testing"]')
    (tmp_path / "test_net.py").write_text(PROGRAM.replace("BUDGET", "9 MiB").replace("LEAK", "pass"))
    done = run(least, "-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=tmp_path)
    assert "1 passed" in done.stdout, done.stdout + done.stderr


def test_replay_needs_no_torch(tmp_path: Path) -> None:
    python = build_environment(tmp_path / "env", with_what_they_need(("tyro", "rich")))
    dump(tmp_path / "snapshot.pickle", SNAPSHOT)
    done = run(python, "-c", "import torch", cwd=tmp_path)
    assert "No module named 'torch'" in done.stderr
    code, printed, errors = walk(python, {"replay": ["replay", "snapshot.pickle", "--json"]}, tmp_path)["replay"]
    assert code == 0, errors
    assert json.loads(printed)


def test_training_where_there_is_pyav_and_no_other_decoder(least: Path, tmp_path: Path) -> None:
    """What an installation on ARM reads videos with; neither TensorBoard nor any engine but PyTorch's."""
    python = build_environment(tmp_path / "env", with_what_they_need((*LEAST, "av", "torchvision")))
    words: dict[str, list[object]] = {
        "demo": ["demo", "clips", "--train-clips", 8, "--val-clips", 8],
        "check": ["check", "clips/val.csv", "--jobs", 1],
        "train": [*TRAIN[:-1], "clips/train.csv", "--optim.epochs", 1, "--save-every", 1],
        "predict": ["predict", "run", "clips/clips", "--workers", 0, "--json"],
    }
    for name, (code, _, errors) in walk(python, words, tmp_path).items():
        assert code == 0, (name, errors)
    summary: dict[str, Any] = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 1
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["versions"]["decord"] == record["versions"]["deepspeed"] == "not installed"
    assert "8 by pyav" in (tmp_path / "clips" / "val.check.txt").read_text()


def test_tests_that_decode_nothing_need_no_decoder(tmp_path: Path) -> None:
    python = build_environment(tmp_path / "env", everything_but("av", "decord", "torchcodec"))
    done = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_units.py", cwd=ROOT)
    assert " passed" in done.stdout, done.stdout + done.stderr
