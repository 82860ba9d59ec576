"""`bigvivit doctor`: what this machine has, and what is missing for what, on one screen."""

from __future__ import annotations

import json
import platform
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import tyro

from bigvivit.machine import gather_facts
from bigvivit.units import GiB, MiB, format_bytes
from bigvivit.versions import PACKAGES

WIDTH = 110
MAIN_JOB = ("torch", "transformers", "safetensors", "tyro", "rich", "numpy", "torchvision", "av", "deepspeed")
"""Packages without which `deepspeed bigvivit/train.py --ds …` fails."""
RANK_BYTES = int(0.9 * GiB)
"""What a process holds that has imported everything and done nothing."""
SHM_OF_A_RANK = 66 * MiB
"""DeepSpeed's buffer for collectives on CPUs."""
SHM_OF_NCCL = GiB
"""What NCCL's documentation asks of containers."""
DOWNLOAD_BYTES = 5 * GiB
"""A ViT-g in fp32, with some air."""


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Say what this machine and this installation have, and what is missing for what. Exit code 1 where the main job,
    `deepspeed bigvivit/train.py --ds zero3`, would fail."""

    json: bool = False
    """Print JSON, for reports of faults; paths below your home folder are written without it."""


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be."""

    level: Literal["fails", "lacks"]
    """The main job fails, or it runs and something else is missing or slow."""
    what: str
    fix: str


def doctor(argv: list[str]) -> None:
    """`bigvivit doctor`."""
    config = tyro.cli(DoctorConfig, args=argv, prog="bigvivit doctor")
    facts = gather_facts()
    findings = [*judge_packages(facts), *judge_gpus(facts), *judge_machine(facts)]
    fails = any(finding.level == "fails" for finding in findings)
    if config.json:
        print(json.dumps({**facts, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        print("\n".join([*describe(facts), *tell(findings)]))
    sys.exit(1 if fails else 0)


def judge_packages(facts: dict[str, Any]) -> Iterator[Finding]:
    """What is missing, cannot be imported, or is of a version that is not accepted or was never tested."""
    for found in facts["packages"]:
        name, version, package = found["name"], found["version"], PACKAGES[found["name"]]
        level: Literal["fails", "lacks"] = "fails" if name in MAIN_JOB else "lacks"
        if found["state"] == "missing" and not (name == "decord" and not has_decord_wheel()):
            yield Finding(level, f"{name} is not installed, for {package.use}", package.install)
        elif found["state"] == "broken":
            yield Finding(level, f"{name} {version} cannot be imported ({found['error']})", package.install)
        elif found["state"] == "outside":
            yield Finding(level, f"{name} {version} is none of the versions {package.range}", package.install)
        elif found["state"] == "untested":
            what = f"{name} {version} was not tested, {found['tested']} were"
            yield Finding("lacks", what, "if something fails, " + package.install)
    codecs = {codec for answer in facts["decoders"].values() for codec in answer.get("reads", ())}
    if "H.264" in facts["samples"].get("written", ()) and "H.264" not in codecs:
        reasons = "; ".join(f"{name}: {answer['error']}" for name, answer in facts["decoders"].items())
        yield Finding("fails", f"no decoder reads H.264 ({reasons})", PACKAGES["av"].install)


def has_decord_wheel() -> bool:
    """Whether decord can be installed here at all."""
    return (platform.system(), platform.machine()) == ("Linux", "x86_64")


def judge_gpus(facts: dict[str, Any]) -> Iterator[Finding]:
    """Where the driver and PyTorch see different GPUs, and what PyTorch cannot do with those it sees."""
    driver, cuda, shown = facts["nvml"]["gpus"], facts["cuda"], facts["cuda_visible_devices"]
    gpus = cuda.get("gpus", [])
    if driver and not gpus:
        if shown in ("", "-1"):
            what = f"CUDA_VISIBLE_DEVICES={shown!r} hides all {len(driver)} GPUs"
            yield Finding("lacks", what + ": training runs on the CPU", "unset CUDA_VISIBLE_DEVICES")
        elif cuda.get("built_for") is None:
            what = f"the driver has {len(driver)} GPU(s), and this PyTorch is built for CPUs"
            yield Finding("fails", what, "install PyTorch for CUDA (pytorch.org, Get started)")
        else:
            what = f"the driver {facts['nvml']['driver']} has {len(driver)} GPU(s), and PyTorch finds none"
            fix = f"install a driver for CUDA {cuda['built_for']}, or PyTorch for an older CUDA"
            if shown is not None:  # a word that names no GPU, and all after it, is passed over without a message
                what += f" under CUDA_VISIBLE_DEVICES={shown!r}"
                fix = f"unset CUDA_VISIBLE_DEVICES; if there are still none, {fix}"
            yield Finding("fails", f"{what} ({cuda['error']})", fix)
    elif gpus and facts["nvml"]["error"]:
        what = f"NVML does not answer ({facts['nvml']['error']}): reports lack what all programs use of a GPU"
        yield Finding("lacks", what, PACKAGES["nvidia-ml-py"].install)
    elif len(driver) != len(gpus) and shown is None and not any(gpu["mig"] for gpu in driver):
        what = f"the driver has {len(driver)} GPUs and PyTorch finds {len(gpus)}"
        yield Finding("lacks", what, "compare nvidia-smi -L with the devices that the container was given")
    for gpu in gpus:
        if not gpu["has_kernels"]:
            what = f"this PyTorch has no kernels for {gpu['name']} (capability {gpu['capability']})"
            yield Finding("fails", what, "install a PyTorch that was built for it (pytorch.org, Previous versions)")
    for gpu in driver:
        if gpu["free_bytes"] < gpu["memory_bytes"] / 2:
            what = f"other programs hold {format_bytes(gpu['memory_bytes'] - gpu['free_bytes'])} of {gpu['name']}"
            yield Finding("lacks", what, "nvidia-smi names them")
        if gpu["pcie"] and gpu["pcie"]["width"] < gpu["pcie"]["max_width"]:
            what = f"{gpu['name']} is linked by {gpu['pcie']['width']} of {gpu['pcie']['max_width']} PCIe lanes"
            yield Finding("lacks", what + ", which slows --memory.placement cpu", "try another slot")
    if len(gpus) > 1 and cuda.get("nccl") is None:
        yield Finding("fails", f"this PyTorch has no NCCL for {len(gpus)} GPUs", PACKAGES["torch"].install)


def judge_machine(facts: dict[str, Any]) -> Iterator[Finding]:
    """Memory, disks and compilers."""
    memory, gpus, compiler = facts["memory"], facts["cuda"].get("gpus", []), facts["compiler"]
    available, limit, shm = (memory[name] for name in ("available_bytes", "data_limit_bytes", "shm_free_bytes"))
    ranks = max(len(gpus), 2)
    if available is not None and available < ranks * RANK_BYTES:
        what = (
            f"{format_bytes(available)} of memory are available; {ranks} ranks need {format_bytes(ranks * RANK_BYTES)}"
        )
        yield Finding("fails", what + " to start", "close other programs, or raise the container's limit")
    if limit is not None and limit < RANK_BYTES:
        what = f"RLIMIT_DATA is {format_bytes(limit)}, and a rank needs {format_bytes(RANK_BYTES)} to start"
        yield Finding("fails", what, "ulimit -d unlimited")
    builds = compiler["C++ compiler"] is not None and compiler["ninja"] is not None
    if not gpus and not builds:
        what = "no C++ compiler or no ninja on PATH: DeepSpeed's collectives on CPUs go through gloo, which is slower"
        yield Finding("lacks", what, "install g++ and ninja")
    wanted = SHM_OF_NCCL if len(gpus) > 1 else ranks * SHM_OF_A_RANK if not gpus and builds else 0
    if shm is not None and shm < wanted:
        what = f"/dev/shm has {format_bytes(shm)} free, and {ranks} ranks may need {format_bytes(wanted)}"
        yield Finding("lacks" if gpus else "fails", what, "start the container with --shm-size=2g")
    for name, disk in facts["disks"].items():
        if not disk["writable"]:
            fix = {"here": "give --out elsewhere", "downloads": "set HF_HOME", "temporary": "set TMPDIR"}[name]
            yield Finding("fails" if name == "temporary" else "lacks", f"{disk['path']} cannot be written", fix)
        elif disk["free_bytes"] < (DOWNLOAD_BYTES if name == "downloads" else GiB):
            yield Finding("lacks", f"{disk['path']} has {format_bytes(disk['free_bytes'])} free", "make room there")


def describe(facts: dict[str, Any]) -> list[str]:
    """What there is, a line or two for each thing."""
    python, system, memory = facts["python"], facts["system"], facts["memory"]
    own = f"{facts['bigvivit']['version']} in {facts['bigvivit']['folder']}"
    there = [f"{found['name']} {found['version']}" for found in facts["packages"] if found["version"]]
    sizes = [f"{format_bytes(memory['available_bytes'])} of {format_bytes(memory['total_bytes'])} available"] * (
        memory["available_bytes"] is not None
    )
    if memory["shm_bytes"] is not None:
        sizes.append(f"/dev/shm {format_bytes(memory['shm_free_bytes'])} of {format_bytes(memory['shm_bytes'])} free")
    disks = [f"{disk['path']} {format_bytes(disk['free_bytes'])} free" for disk in facts["disks"].values()]
    cpu = facts["cpu"]
    units = f"unknown ({cpu['error']})" if cpu["error"] else "yes" if cpu["bf16_units"] else "no: it computes in fp32"
    decoders = [
        f"{name}: {', '.join(answer.get('reads', ())) or answer['error'] or 'none of the samples'}"
        for name, answer in facts["decoders"].items()
    ]
    rows = {
        "bigvivit": own,
        "python": f"{python['version']}, {python['executable']}",
        "system": f"{system['platform']}, {cpu.get('name') or system['machine']}, {system['cores']} cores",
        "packages": ", ".join(there),
        "GPUs": describe_gpus(facts),
        "bf16 on the CPU": units,
        "compilers": ", ".join(f"{name} {where or 'none'}" for name, where in facts["compiler"].items()),
        "decoders": "; ".join(decoders),
        "memory": ", ".join(sizes) or "unknown",
        "disks": ", ".join(disks),
    }
    lines = []
    for name, text in rows.items():
        lines += textwrap.wrap(text, WIDTH, initial_indent=f"{name:16}", subsequent_indent=" " * 16)
    return lines


def describe_gpus(facts: dict[str, Any]) -> str:
    """Those that PyTorch uses, or why it uses none."""
    cuda, driver, links = facts["cuda"], facts["nvml"], facts["links"]
    if not cuda.get("gpus"):
        why = "PyTorch built for CPUs" if cuda.get("built_for") is None and not cuda["error"] else cuda["error"]
        return f"none for PyTorch ({why}); NVML: {driver['error'] or str(len(driver['gpus'])) + ' GPUs'}"
    cards = [
        f"{gpu['name']} {format_bytes(gpu['memory_bytes'])}, bf16 {'yes' if gpu['bf16_units'] else 'no'}"
        + (f", {links['to_gpu'][number] / 1e9:.3g} GB/s from the host" if number < len(links.get("to_gpu", ())) else "")
        for number, gpu in enumerate(cuda["gpus"])
    ]
    between = [f"{speed / 1e9:.3g}" for speed in links.get("between_gpus", ())]
    more = [f"CUDA {cuda['built_for']}", f"driver {driver['driver'] or 'unknown'}", f"NCCL {cuda['nccl'] or 'none'}"]
    more += [f"GB/s from GPU 0 to the others: {', '.join(between)}"] * bool(between)
    more += ["MIG: a process sees one instance"] * any(gpu["mig"] for gpu in driver["gpus"])
    if facts["cuda_visible_devices"] is not None:
        more.append(f"CUDA_VISIBLE_DEVICES={facts['cuda_visible_devices']}")
    return "; ".join([*cards, *more])


def tell(findings: list[Finding]) -> list[str]:
    """What is missing for what, the worst first, and whether the main job can run."""
    lines = [""]
    for finding in sorted(findings, key=lambda finding: finding.level):
        mark = "FAILS" if finding.level == "fails" else "note"
        text = f"{finding.what}: {finding.fix}"
        lines += textwrap.wrap(text, WIDTH, initial_indent=f"{mark:7}", subsequent_indent=" " * 7)
    failing = sum(finding.level == "fails" for finding in findings)
    job = "deepspeed bigvivit/train.py --ds zero3"
    return [*lines, f"{job} would fail here: {failing} reason(s)" if failing else f"{job} can run here"]
