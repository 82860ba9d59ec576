"""Towers of a hub that cannot be asked: one message, at once; and from its cache where they are there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.launching import environment, free_port
from tests.model.reference import MODELS, save

CODE = """
import time
from bigvivit import assemble
from bigvivit.config import ConfigError, ModelConfig
started = time.monotonic()
try:
    source = assemble.open_tower(ModelConfig(tower="lab/tower", tower_init="pretrained", tubelet=1), seed=0)
    print("opened", source.spec.width)
except ConfigError as error:
    print(error)
print(time.monotonic() - started)
"""


def open_tower(cache: Path, *, offline: bool) -> tuple[str, float, str]:
    """What was said, in how many seconds, and what went to stderr."""
    changes = {"HF_HUB_CACHE": str(cache), "HF_ENDPOINT": f"http://127.0.0.1:{free_port()}"}
    changes |= {"HF_HUB_OFFLINE": "1" if offline else "0", "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=240, env=environment(**changes))
    assert done.returncode == 0, done.stderr
    said, seconds = done.stdout.splitlines()
    return said, float(seconds), done.stderr


@pytest.mark.parametrize(("offline", "reason"), [(True, "HF_HUB_OFFLINE is set"), (False, "does not answer")])
def test_a_hub_that_cannot_be_asked(offline: bool, reason: str, tmp_path: Path) -> None:
    said, seconds, stderr = open_tower(tmp_path, offline=offline)
    assert said.startswith("model.tower=lab/tower is not in the hub's local cache, and ")
    assert reason in said
    assert said.endswith("download it elsewhere (`hf download lab/tower`) and give the folder")
    assert seconds < 5
    assert "Traceback" not in stderr
    assert "Retrying" not in stderr


@pytest.mark.parametrize("offline", [True, False])
def test_what_the_cache_has_needs_no_hub(offline: bool, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--lab--tower" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--lab--tower" / "refs").mkdir()
    (tmp_path / "models--lab--tower" / "refs" / "main").write_text("0" * 40)
    save(MODELS["vit"](), snapshot)
    said, seconds, _ = open_tower(tmp_path, offline=offline)
    assert said == "opened 32"
    assert seconds < 5
