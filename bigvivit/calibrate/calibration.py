"""What `bigvivit calibrate` measured on one card, and how it takes the place of tables' constants in forecasts.

Kept in the user's cache folder under the card's name and driver. A file of a virtual GPU has the same form, says so,
and is never taken.
"""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from bigvivit.config import ConfigError
from bigvivit.forecast.accelerators import Accelerator, Measured
from bigvivit.forecast.hardware import find_accelerator, normalise
from bigvivit.forecast.virtual_gpu.build import cache_folder
from bigvivit.machine import read_nvml

FOLDER = "calibrations"
AUTO, NONE = "auto", "none"


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Of one device. Bytes, bytes per second and operations per second; None where a row is missing."""

    card: str
    """As PyTorch names it, or the processor."""
    device: str
    """cuda or cpu."""
    evidence: str
    """measured, or virtual: then it is refused."""
    date: str
    torch: str
    cuda: str | None
    driver: str | None
    capability: int | None
    memory_bytes: int
    context_bytes: tuple[int, int, int] | None
    """Least, expected and most that is taken beside PyTorch's tensors: on CUDA by the driver's context."""
    workspace_bytes: int | None
    """Of cuBLAS, of each thread."""
    scratch_bytes: int | None
    """Of a tower's convolution while it runs."""
    rates: dict[str, float]
    bandwidth: float | None
    host_bandwidth: float | None
    disk_bandwidth: float | None

    @property
    def where(self) -> str:
        """`measured on this card on 2026-11-26 (driver 580.65, torch 2.14.1)`."""
        driver = f"driver {self.driver}, " if self.driver else ""
        what = "card" if self.device == "cuda" else "CPU"
        return f"measured on this {what} on {self.date[:10]} ({driver}torch {self.torch})"


def folder() -> Path:
    """Where calibrations are kept."""
    return cache_folder() / FOLDER


def file_name(card: str, driver: str | None) -> str:
    """Letters, digits and dots of both."""
    words = re.findall(r"[a-z0-9.]+", f"{card} {driver or ''}".lower())
    return f"{'-'.join(words)}.json"


def write(calibration: Calibration, path: Path) -> Path:
    """Replace the file, at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(asdict(calibration), indent=2) + "\n")
    unfinished.replace(path)
    return path


def keep(calibration: Calibration) -> Path:
    """Write it where `plan` looks. Raises ConfigError for what was not measured."""
    refuse_virtual(calibration, "it")
    return write(calibration, folder() / file_name(calibration.card, calibration.driver))


def read(path: Path) -> Calibration:
    """Raises ConfigError for what is none."""
    try:
        values = json.loads(path.read_text())
        known = {field.name for field in fields(Calibration)}
        if not isinstance(values, dict) or set(values) != known:
            raise ValueError(f"it needs the entries {', '.join(sorted(known))}, and no others")
        if values["context_bytes"] is not None:
            low, expected, high = map(int, values["context_bytes"])
            values["context_bytes"] = (low, expected, high)
        return Calibration(**values)
    except OSError as error:
        raise ConfigError(f"calibration={path} cannot be read: {error.strerror or error}") from None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"calibration={path} is no file of bigvivit calibrate ({error}): run it again") from None


def refuse_virtual(calibration: Calibration, name: str) -> None:
    """Raise ConfigError where nothing was measured."""
    if calibration.evidence != "measured":
        raise ConfigError(
            f"calibration: {name} is of a virtual {calibration.card}, on which nothing is measured: run bigvivit "
            "calibrate on the card itself"
        )


def is_of(calibration: Calibration, card: Accelerator) -> bool:
    """Whether it is this row's, under any of its names."""
    if calibration.device != "cuda":
        return False
    try:
        return find_accelerator(calibration.card).name == card.name
    except ConfigError:
        return normalise(calibration.card) == normalise(card.name)


def find(card: Accelerator) -> Calibration | None:
    """The newest of this card in the cache; on a machine that has the card, only of the driver that runs it now."""
    try:
        paths = sorted(folder().glob("*.json"))
    except ConfigError:  # a user without a home
        return None
    found = []
    for path in paths:
        try:
            found.append(read(path))
        except ConfigError as error:  # of another version, or cut by hand
            print(f"passed over: {error}", file=sys.stderr)
    found = [each for each in found if each.evidence == "measured" and is_of(each, card)]
    if found:
        nvml = read_nvml()
        names = {normalise(each.card) for each in found}
        if any(normalise(gpu["name"]) in names for gpu in nvml["gpus"]):
            found = [each for each in found if each.driver == nvml["driver"]]
    return max(found, key=lambda each: each.date, default=None)


def choose(card: Accelerator, option: str) -> Accelerator:
    """The card with what was measured on it: `auto` takes what `find` does, `none` the tables', and else `option` is a
    file. Raises ConfigError for a file that is not of this card, or of a virtual one."""
    if option == NONE:
        return card
    if option == AUTO:
        calibration = find(card)
        return card if calibration is None else apply(card, calibration)
    calibration = read(Path(option))
    refuse_virtual(calibration, option)
    if not is_of(calibration, card):
        raise ConfigError(
            f"calibration={option} was measured on {calibration.card}, which is not {card.name}: leave it out"
        )
    return apply(card, calibration)


def apply(card: Accelerator, calibration: Calibration) -> Accelerator:
    """The row with its measured constants."""
    if card.device is not None and card.memory_source != "free now, by NVML":
        card = replace(card, memory_bytes=calibration.memory_bytes, memory_source=calibration.where)
    return replace(card, measured=constants(calibration))


def constants(calibration: Calibration) -> Measured:
    """What forecasts take."""
    return Measured(
        where=calibration.where,
        context_bytes=calibration.context_bytes,
        workspace_bytes=calibration.workspace_bytes,
        scratch_bytes=calibration.scratch_bytes,
        rates=calibration.rates,
        host_bandwidth=calibration.host_bandwidth,
    )


def find_cpu(option: str) -> Accelerator:
    """This machine's processor, as it was measured, or a file's. Raises ConfigError where it was not: no table has what
    a process takes beside its tensors."""
    from bigvivit.training.report import describe_device

    if option in (AUTO, NONE):
        import torch

        name = describe_device(torch.device("cpu"))
        path = folder() / file_name(name, None)
        if option == NONE or not path.exists():
            raise ConfigError(
                f"hardware=cpu needs what was measured on this {name}: run bigvivit calibrate --device cpu once, which "
                "takes a minute"
            )
        calibration = read(path)
    else:
        calibration = read(Path(option))
    if calibration.device != "cpu":
        raise ConfigError(f"calibration={option} is of {calibration.card}, which is no CPU: leave it out")
    return Accelerator(
        name=f"CPU ({calibration.card})",
        memory_bytes=calibration.memory_bytes,
        memory_source=calibration.where,
        bandwidth=calibration.bandwidth,
        rates={},
        capability=None,
        kernels=("math",),
        link="none",
        link_bandwidth=None,
        host_bandwidth=None,
        source=calibration.where,
        measured=constants(calibration),
        on_host=True,
    )
