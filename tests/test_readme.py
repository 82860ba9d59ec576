"""The README's numbers are those of the reports it links."""

from __future__ import annotations

import json
import re
from pathlib import Path

from bench.two_stages import readme_table
from bigvivit.config import ClipConfig, DataConfig, EvalConfig, ModelConfig, TrainConfig
from bigvivit.data.check import CheckConfig
from bigvivit.training.progress import flat_settings
from tests.launching import ROOT

README = (ROOT / "README.md").read_text()
TRAIN = TrainConfig(
    stage=1,
    out=Path("run"),
    clip=ClipConfig(frames=8),
    data=DataConfig(train=Path("train.csv")),
    model=ModelConfig(tower="vit-b"),
)


def test_the_table_is_the_linked_reports() -> None:
    (report,) = set(re.findall(r"bench/results/(demo_\S+)\.md", README))
    record = json.loads((ROOT / "bench" / "results" / f"{report}.json").read_text())
    assert readme_table(record["rows"]) in README
    assert all(row["evidence"] == "measured" for row in record["rows"])


def test_every_linked_file_is_there() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).is_file()] == []


def test_every_setting_the_readme_names_exists() -> None:
    """Of train, eval and check; the other words with dashes belong to launchers."""
    known = {name.replace("_", "-") for name in flat_settings(TRAIN)} | set(EvalConfig.__dataclass_fields__)
    known |= set(CheckConfig.__dataclass_fields__)
    launchers = {"help", "nproc_per_node", "num_gpus", "num_processes", "multi_gpu"}
    flags = set(re.findall(r"(?<![-\w])--([a-z][a-z._-]*)", README)) - launchers
    assert "clip.no-flip" in flags
    assert {flag for flag in flags if flag.replace(".no-", ".") not in known} == set()
