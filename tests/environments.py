"""Virtual environments with some of the packages that are installed here, as links: made in a moment, offline."""

from __future__ import annotations

import os
import subprocess
import venv
from collections.abc import Iterable
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.launching import ROOT

INSTALLED = {canonicalize_name(found.metadata["Name"]): found for found in reversed(list(distributions()))}
OURS = "bigvivit"


def with_what_they_need(names: Iterable[str]) -> set[str]:
    """These distributions and all that they require here, transitively."""
    found: set[str] = set()
    waiting = [Requirement(name) for name in names]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in INSTALLED and (name not in found or requirement.extras):
            found.add(name)
            for line in INSTALLED[name].requires or ():
                needed = Requirement(line)
                if any(applies(needed, extra) for extra in ("", *requirement.extras)):
                    waiting.append(needed)
    return found


def applies(requirement: Requirement, extra: str) -> bool:
    """Whether its marker holds on this machine."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def build_environment(folder: Path, names: Iterable[str]) -> Path:
    """A virtual environment with these distributions and no other; returns its interpreter."""
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for name in names:
        for top, there in find_parts(INSTALLED[name]).items():
            if not (site / top).exists():
                (site / top).symlink_to(there)
    return folder / "bin" / "python"


def find_parts(distribution: Distribution) -> dict[str, Path]:
    """The files and folders that it has put beside others, by name."""
    tops = {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}
    return {top: Path(str(distribution.locate_file(top))) for top in tops}


def everything_but(*names: str) -> set[str]:
    """All that is installed here but these, and this package itself."""
    return set(INSTALLED) - {canonicalize_name(name) for name in (*names, OURS)}


def run(python: Path, *words: object, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """The interpreter of an environment, on this checkout, without a GPU and on one thread."""
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "160", **env}
    own["PATH"] = f"{python.parent}:{os.environ['PATH']}"
    return subprocess.run(
        [str(word) for word in (python, *words)],
        check=False,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **own},
    )
