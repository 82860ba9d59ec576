"""Ranges of versions: the same as in pyproject.toml, and said where they are left."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bigvivit import versions
from bigvivit.config import ConfigError
from bigvivit.forecast import trace_step
from bigvivit.versions import PACKAGES, insides_of, is_in_range, minor, require, require_for_run, require_known
from tests.launching import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_requirements() -> dict[str, str]:
    """Ranges in pyproject.toml by name, those of extras for users too."""
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = project["dependencies"] + [
        line for extra in ("timm", "torchcodec", "tensorboard") for line in extras[extra]
    ]
    found = (re.match(r"([\w-]+)([^;]*)", line) for line in lines)
    return {match[1]: match[2].strip() for match in found if match}


def test_ranges_are_those_of_pyproject() -> None:
    wanted = read_requirements()
    del wanted["huggingface-hub"]  # transformers' own, in the versions that it wants
    assert {name: package.range for name, package in PACKAGES.items()} == wanted


def test_tested_versions_are_in_the_range() -> None:
    for package in PACKAGES.values():
        assert is_in_range(package, f"{package.tested[1]}.999"), package.name
        assert minor(re.search(r">=([\d.]+)", package.range)[1]) <= minor(package.tested[0]), package.name  # type: ignore[index]


@pytest.mark.parametrize(
    ("version", "known"),
    [
        *(("2.11.0", True), ("2.15.3+cu130", True), ("2.14.0a0+5228986c39.nv26.11", True)),
        *(("2.10.1", False), ("2.16.0.dev20261101", False), ("3.0", False), ("2.9.1", False)),
    ],
)
def test_builds_and_nightlies_count_as_their_release(version: str, known: bool) -> None:
    assert is_in_range(PACKAGES["torch"], version) == known


def install(monkeypatch: pytest.MonkeyPatch, **found: str) -> None:
    real = versions.read_version
    monkeypatch.setattr(versions, "read_version", lambda name: found.get(name) or real(name))


def test_versions_whose_insides_nobody_knows_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, torch="2.16.1", deepspeed="0.20.0", bitsandbytes="0.51.0")
    model = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r'a forecast reaches .* not 2\.16\.1, .*: pip install "torch>=2\.11,<2\.16"'):
        trace_step(lambda: model(torch.ones(1, 2)).sum().backward(), modules=model)
    with pytest.raises(ConfigError, match=r'ds=zero3 reaches into deepspeed .*"deepspeed>=0\.19\.8,<0\.20"'):
        require_for_run(ds=Path("zero3"))
    from bigvivit.memory.quantize import eight_bit_on_fake_tensors

    with (
        pytest.raises(ConfigError, match=r"its versions >=0\.50,<0\.51, not 0\.51\.0"),
        eight_bit_on_fake_tensors(in_place=True),
    ):
        pass
    require_for_run(optimizer="sgd8bit", storage="nf4")  # which only call what bitsandbytes documents


def test_a_folder_of_that_name_is_no_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torchcodec_").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(
        PACKAGES, "x", versions.Package(name="x", module="torchcodec_", range="", tested=("", ""), use="")
    )
    with pytest.raises(ConfigError, match='reading needs x, which is not installed: pip install "x"'):
        require("reading", "x")
    (tmp_path / "torchcodec_" / "__init__.py").write_text("")
    require("reading", "x")
    require_known("reading", "torch")


def test_what_has_moved_is_said_with_the_versions_that_are_known() -> None:
    with (
        pytest.raises(ConfigError, match=r"transformers \S+ is not as the versions 5\.17 to 5\.24"),
        insides_of("transformers"),
    ):
        from transformers.conversion_mapping import a_table_that_has_moved  # noqa: F401
