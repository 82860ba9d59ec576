"""Which versions of other packages are known here, and what is said where one is missing. Imports no torch.

The ranges are those of pyproject.toml (tests/test_versions.py compares them); their ends are what tests/versions.sh
runs the tests with. Where the insides of a package are replaced or read, the range is enforced: what has moved there
would be an AttributeError at best, and a wrong number at worst.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from bigvivit import __version__
from bigvivit.config import ConfigError


@dataclass(frozen=True, kw_only=True)
class Package:
    """A distribution that this one uses."""

    name: str
    """On the package index."""
    module: str
    """What is imported."""
    range: str
    """Versions that are accepted, as pyproject.toml says it."""
    tested: tuple[str, str]
    """Oldest and newest minor versions that the tests have run with."""
    use: str
    """What cannot be done without it."""
    extra: str = ""
    """The extra of ours that installs it; "" where every installation has it."""

    @property
    def install(self) -> str:
        """The command that installs a version that works."""
        wanted = f"bigvivit[{self.extra}]" if self.extra else f"{self.name}{self.range}"
        return f'pip install "{wanted}"'


def release(version: str) -> tuple[int, ...]:
    """`2.14.1+cu130` → (2, 14, 1); `0.20` → (0, 20, 0)."""
    found = re.match(r"[\d.]*", version)
    numbers = [int(number) for number in found[0].split(".") if number] if found else []
    return (*numbers, 0, 0, 0)[: max(3, len(numbers))]


def minor(version: str) -> tuple[int, ...]:
    """`2.14.1+cu130` → (2, 14)."""
    return release(version)[:2]


PACKAGES: dict[str, Package] = {
    package.name: package
    for package in (
        Package(
            name="torch", module="torch", range=">=2.11,<2.16", tested=("2.11", "2.15"), use="everything"
        ),
        Package(
            name="transformers", module="transformers", range=">=5.17,<6", tested=("5.17", "5.24"),
            use="image towers and the temporal transformer",
        ),
        Package(name="safetensors", module="safetensors", range=">=0.8", tested=("0.8", "0.8"), use="weights"),
        Package(name="tyro", module="tyro", range=">=1.0.17", tested=("1.0", "1.0"), use="every command line"),
        Package(name="rich", module="rich", range=">=14.3", tested=("14.3", "15.0"), use="tables on the terminal"),
        Package(name="numpy", module="numpy", range=">=2", tested=("2.0", "2.5"), use="reading videos"),
        Package(
            name="torchvision", module="torchvision", range=">=0.26", tested=("0.26", "0.29"),
            use="resizing the frames of videos: train, eval, predict, drift",
        ),
        Package(
            name="av", module="av", range=">=16,<20", tested=("16.0", "19.0"),
            use="reading videos: train, eval, predict, drift, check, demo",
        ),
        Package(name="decord", module="decord", range=">=0.6", tested=("0.6", "0.6"), use="the faster video decoder"),
        Package(
            name="deepspeed", module="deepspeed", range=">=0.19.8,<0.20", tested=("0.19", "0.19"),
            use="ZeRO: every --ds",
        ),
        Package(
            name="bitsandbytes", module="bitsandbytes", range=">=0.50,<0.51", tested=("0.50", "0.50"),
            use="8-bit optimizers, storage in int8 and nf4",
        ),
        Package(name="accelerate", module="accelerate", range=">=1.13", tested=("1.13", "1.15"), use="its launcher"),
        Package(name="torchmetrics", module="torchmetrics", range=">=1.9", tested=("1.9", "1.9"), use="eval"),
        Package(
            name="matplotlib", module="matplotlib", range=">=3.9", tested=("3.9", "3.11"),
            use="pictures: report, eval, bench",
        ),
        Package(
            name="nvidia-ml-py", module="pynvml", range=">=13.580.65", tested=("13.580", "13.615"),
            use="GPUs as the driver sees them: doctor",
        ),
        Package(
            name="ninja", module="ninja", range=">=1.11.1", tested=("1.11", "1.13"),
            use="building DeepSpeed's operators",
        ),
        Package(
            name="timm", module="timm", range=">=1.0.26", tested=("1.0", "1.0"), extra="timm", use="towers from timm"
        ),
        Package(
            name="torchcodec", module="torchcodec", range=">=0.11", tested=("0.17", "0.17"), extra="torchcodec",
            use="a third video decoder",
        ),
        Package(
            name="tensorboard", module="tensorboard", range=">=2.20", tested=("2.20", "2.21"), extra="tensorboard",
            use="curves while a run trains",
        ),
    )
}  # fmt: skip
"""By name, the indispensable ones first."""


def read_version(name: str) -> str | None:
    """The installed version of a distribution; None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def has_package(name: str) -> bool:
    """Whether it can be imported, as far as that is known without doing so."""
    try:
        spec = importlib.util.find_spec(PACKAGES[name].module)
    except (ImportError, ValueError):  # what some tools leave in its place
        return False
    return spec is not None and spec.origin is not None  # any folder of that name would be a package without origin


def read_versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of this package, of these and of Python; "not installed" where one is missing."""
    found = {name: read_version(name) or "not installed" for name in names}
    return {"bigvivit": __version__, **found, "python": platform.python_version()}


def require(what: str, *names: str) -> None:
    """Raise ConfigError where `what`, a setting with its value or a thing that is done, needs what is not installed."""
    for name in names:
        if not has_package(name):
            raise ConfigError(f"{what} needs {name}, which is not installed: {PACKAGES[name].install}")


def require_known(what: str, name: str) -> None:
    """`require`, and raise ConfigError for a version outside the range: `what` replaces or reads its insides."""
    require(what, name)
    version = read_version(name)
    package = PACKAGES[name]
    if version is not None and not is_in_range(package, version):
        raise ConfigError(
            f"{what} reaches into {name} and knows its versions {package.range}, not {version}, which is installed: "
            f"{package.install}"
        )


def is_in_range(package: Package, version: str) -> bool:
    """Whether a version is accepted: makers' builds and nightlies count as the release that they lead to."""
    least, most = (re.search(rf"{sign}([\d.]+)", package.range) for sign in (">=", "<"))
    own = release(version)
    return (least is None or own >= release(least[1])) and (most is None or own < release(most[1]))


@contextmanager
def insides_of(name: str) -> Iterator[None]:
    """Around imports of what a package may move between two releases: ConfigError where it has moved."""
    try:
        yield
    except ImportError as error:
        package = PACKAGES[name]
        oldest, newest = package.tested
        raise ConfigError(
            f"{name} {read_version(name)} is not as the versions {oldest} to {newest} are, which are known here "
            f'({error}): pip install "{name}>={oldest},<={newest}.99"'
        ) from error


def require_for_run(*, ds: object = None, optimizer: str = "", storage: str = "") -> None:
    """Raise ConfigError where a training or a forecast with these settings needs what is not installed or not known."""
    if ds is not None:
        require_known(f"ds={ds}", "deepspeed")
    if optimizer.endswith("8bit"):
        require(f"optim.name={optimizer}", "bitsandbytes")
    if storage in ("int8", "nf4"):
        require(f"memory.storage={storage}", "bitsandbytes")
