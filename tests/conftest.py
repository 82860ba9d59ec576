"""What tests of several packages share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bigvivit.data.demo import DemoConfig, write_demo
from tests.launching import STAGE1, STAGE2, ZERO3, Runs, train

pytest_plugins = ["bigvivit.testing", "pytester"]
SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture
def shared() -> Callable[[str], Path]:
    """Finds real models and clips beside the checkout; the test is skipped where they are not."""

    def find(name: str) -> Path:
        if not (SHARED / name).exists():
            pytest.skip(f"needs {name} beside the checkout, in ../shared")
        return SHARED / name

    return find


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    write_demo(DemoConfig(folder=folder, train_clips=32, val_clips=16))
    return folder


@pytest.fixture(scope="session")
def runs(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    data = ["--data.train", demo / "train.csv"]
    after = ["--init-from", folder / "plain1"]
    printed = {
        "plain1": train("python", folder / "plain1", *STAGE1, *data, "--data.workers", 2),
        "zero1": train("deepspeed", folder / "zero1", *ZERO3, *STAGE1, *data),
        "plain2": train("bigvivit", folder / "plain2", *STAGE2, *data, *after),
        "zero2": train("deepspeed", folder / "zero2", *ZERO3, *STAGE2, *data, *after, "--data.workers", 1),
    }
    return Runs(folder, printed)
