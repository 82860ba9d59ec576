"""launch.sh: the two commands of the README."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launching import ROOT


def launch(folder: Path, *words: str, **env: str | None) -> subprocess.CompletedProcess[str]:
    """launch.sh with these variables; None takes one away."""
    own = {name: value for name, value in {**os.environ, **env}.items() if value is not None}
    return subprocess.run(["./launch.sh", *words], check=False, cwd=folder, capture_output=True, text=True, env=own)


def copy_checkout(folder: Path) -> None:
    for name in ("launch.sh", "pyproject.toml"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    (folder / "launch.sh").chmod(0o755)


def test_an_unknown_word_is_refused_before_anything_is_installed(tmp_path: Path) -> None:
    (tmp_path / "launch.sh").write_bytes((ROOT / "launch.sh").read_bytes())
    (tmp_path / "launch.sh").chmod(0o755)
    done = launch(tmp_path, "tests")
    assert done.returncode == 1
    assert "launch.sh knows 'test' and 'train ...', or nothing at all; not 'tests'" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["launch.sh"]


def test_a_missing_or_old_python_is_named(tmp_path: Path) -> None:
    copy_checkout(tmp_path)
    old = tmp_path / "python2"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 2.7.18 || exit 1\n')
    old.chmod(0o755)
    assert "no-such-python is not on PATH" in launch(tmp_path, "test", PYTHON="no-such-python").stderr
    assert "Python 2.7.18 is too old" in launch(tmp_path, "test", PYTHON=str(old)).stderr


UV = """#!/usr/bin/env python3
import json, os, sys
told = {name: value for name, value in os.environ.items() if name.startswith(("UV_", "SSL", "HTTPS"))}
with open("calls.jsonl", "a") as file:
    print(json.dumps([sys.argv[1:], told]), file=file)
if sys.argv[1] == "venv":
    os.makedirs(".venv/bin")
    with open(".venv/bin/python", "w") as file:
        file.write("#!/bin/sh\\necho the tests ran: $*\\n")
    os.chmod(".venv/bin/python", 0o755)
"""
PIP = """[global]
index-url = https://index.example/simple
extra-index-url = https://a.example/simple
  https://b.example/simple
find-links = /wheels /more
constraint = /limits.txt
cert = /certificate.pem
proxy = http://proxy.example:3128
"""


def test_uv_installs_where_it_is_there_by_pips_configuration(tmp_path: Path) -> None:
    """A stand-in for uv, which records how it is called."""
    copy_checkout(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "uv").write_text(UV)
    (tmp_path / "bin" / "uv").chmod(0o755)
    (tmp_path / "pip.conf").write_text(PIP)
    env: dict[str, str | None] = {
        name: None for name in os.environ if name.startswith(("PIP_", "UV_", "SSL_", "HTTPS_"))
    }
    env |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PIP_CONFIG_FILE": str(tmp_path / "pip.conf")}
    done = launch(tmp_path, "test", "-x", PYTHON=sys.executable, **env)
    assert done.returncode == 0, done.stderr
    assert "the tests ran: -m pytest -x" in done.stdout
    (words, told), (more, _) = (json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines())
    assert words == ["venv", "--quiet", "--seed", "--python", sys.executable, ".venv"]
    assert more == ["pip", "install", "--quiet", "--python", ".venv/bin/python", "--editable", ".[dev]"]
    assert told["UV_DEFAULT_INDEX"] == "https://index.example/simple"
    assert told["UV_INDEX"] == "https://a.example/simple https://b.example/simple"
    assert told["UV_FIND_LINKS"] == "/wheels,/more"
    assert told["UV_CONSTRAINT"] == "/limits.txt"
    assert told["SSL_CERT_FILE"] == "/certificate.pem"
    assert told["HTTPS_PROXY"] == "http://proxy.example:3128"
    assert "installing" not in launch(tmp_path, "test", PYTHON=sys.executable, **env).stdout  # once


@pytest.mark.parametrize(
    ("visible", "gpus", "words"),
    [
        (None, 4, "--num_gpus 4"),
        ("1,3", 4, "--include localhost:1,3"),
        ("2", 4, "--include localhost:2"),
        ("", 4, "--num_gpus 2"),  # none: two ranks on the CPU
        ("-1", 4, "--num_gpus 2"),
        ("0", 0, "--num_gpus 2"),
    ],
)
def test_no_gpu_is_taken_that_is_not_to_be_seen(tmp_path: Path, visible: str | None, gpus: int, words: str) -> None:
    """DeepSpeed's launcher passes over CUDA_VISIBLE_DEVICES beside --num_gpus. Both programs are stand-ins."""
    done = launch_beside_gpus(tmp_path, gpus, visible)
    assert done.stdout == f"--log_level warning {words} bigvivit/train.py --stage 1\n", done.stderr


def test_gpus_by_other_names_are_refused(tmp_path: Path) -> None:
    done = launch_beside_gpus(tmp_path, 4, "GPU-8932f937")
    assert done.returncode == 1
    assert "CUDA_VISIBLE_DEVICES=GPU-8932f937: DeepSpeed's launcher knows GPUs by number" in done.stderr


def launch_beside_gpus(folder: Path, gpus: int, visible: str | None) -> subprocess.CompletedProcess[str]:
    copy_checkout(folder)
    programs = {
        ".venv/bin/deepspeed": 'echo "$@"',
        "bin/nvidia-smi": "; ".join(["echo GPU 0: A100"] * gpus) or "exit 9",
    }
    for name, line in programs.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)
    sums = subprocess.run(["cksum"], input=(folder / "pyproject.toml").read_bytes(), check=True, capture_output=True)
    (folder / ".venv" / "installed").write_text(f"dev {sums.stdout.decode()}")
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    return launch(folder, "train", "--stage", "1", PATH=path, CUDA_VISIBLE_DEVICES=visible)


def test_a_failed_installation_says_where_indexes_come_from(tmp_path: Path) -> None:
    copy_checkout(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "uv").write_text("#!/bin/sh\necho no route to host >&2\nexit 2\n")
    (tmp_path / "bin" / "uv").chmod(0o755)
    done = launch(tmp_path, "test", PYTHON=sys.executable, PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert done.returncode == 1
    assert "no route to host\nerror: installing failed, see above; an index of your own or a proxy" in done.stderr
    assert not (tmp_path / ".venv" / "installed").exists()


@pytest.mark.skipif(shutil.which("unshare") is None or os.geteuid() != 0, reason="needs a mount of its own")
@pytest.mark.parametrize(("word", "goes"), [("test", ".venv goes"), ("demo", "the demo's clips and runs go")])
def test_a_read_only_checkout_says_so(word: str, goes: str, tmp_path: Path) -> None:
    copy_checkout(tmp_path)
    mount = f"mount --bind {tmp_path} {tmp_path} && mount -o remount,ro,bind {tmp_path} && cd {tmp_path}"
    script = f"{mount} && PYTHON={sys.executable} ./launch.sh {word}"
    done = subprocess.run(["unshare", "--mount", "sh", "-c", script], check=False, capture_output=True, text=True)
    if "permission denied" in done.stderr.lower() or done.stderr.startswith("unshare:"):
        pytest.skip("no mounts here")
    assert done.returncode == 1
    assert f"error: {tmp_path} cannot be written, where {goes}" in done.stderr


@pytest.mark.slow
def test_the_main_job_on_a_fresh_clone(tmp_path: Path) -> None:
    """Both stages, evaluation and the table; the second call reuses everything."""
    subprocess.run(["git", "clone", "--quiet", ROOT, tmp_path / "clone"], check=True)
    done = launch(tmp_path / "clone", COLUMNS="160")
    assert done.returncode == 0, done.stderr
    rows = {
        line.split("│")[1].strip(): line.split("│")[3].strip(" %") for line in done.stdout.splitlines() if "│" in line
    }
    assert float(rows["top-1"]) >= 85
    assert float(rows["top-1, frames shuffled"]) <= 55
    again = launch(tmp_path / "clone", COLUMNS="160")
    assert again.returncode == 0
    assert again.stdout.count("is there already") == 3
    wrong = launch(
        tmp_path / "clone", "train", "--stage", "1", "--out", "x", "--data.train", "x.csv", "--clip.frames", "8"
    )
    assert "model.tower is not set" in wrong.stderr
    assert wrong.returncode != 0
