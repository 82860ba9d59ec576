"""What this machine and this installation have, as facts for `bigvivit doctor`. Judges nothing, prints nothing.

Whatever can crash or hang (imports of native code, drivers, decoders) is asked in a process of its own, which answers
one question per line: the question it dies at is the one that gets the blame, and another process answers the rest.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from bigvivit import __version__
from bigvivit.versions import PACKAGES, has_package, is_in_range, minor, read_version

ANSWER_SECONDS = 180.0
"""How long all probes may take together; a cold disk reads PyTorch for a minute."""
COPY_BYTES = 256 << 20
"""What is copied to a GPU to time its link."""
SAMPLES = {
    "H.264": ("libx264", ".mp4", {}),
    "HEVC": ("libx265", ".mp4", {"x265-params": "log-level=none"}),
    "VP9": ("libvpx-vp9", ".webm", {}),
    "AV1": ("libsvtav1", ".mp4", {}),
    "MPEG-4": ("mpeg4", ".avi", {}),
}
"""Codec: encoder, ending and options of a sample."""


def gather_facts() -> dict[str, Any]:
    """Everything, as plain data for JSON. Takes some seconds: each optional package is imported once."""
    installed = [name for name in PACKAGES if has_package(name)]
    with ExitStack() as stack:
        folder = os.devnull  # without a folder to write in there are no samples, and no decoder that reads them
        with suppress(FileNotFoundError):
            folder = stack.enter_context(tempfile.TemporaryDirectory())
        names = ["cpu", "cuda", "links", "samples", *(f"decoder:{name}" for name in ("decord", "pyav", "torchcodec"))]
        answers = ask([*(f"import:{name}" for name in installed), *names], folder)
    return {
        "bigvivit": {"version": __version__, "folder": hide_home(Path(__file__).parent)},
        "python": {"version": platform.python_version(), "executable": hide_home(Path(sys.executable))},
        "system": {"platform": platform.platform(), "machine": platform.machine(), "cores": count_cores()},
        "packages": [describe_package(name, answers.get(f"import:{name}", {})) for name in PACKAGES],
        "cpu": answers["cpu"],
        "nvml": read_nvml(),
        "cuda": answers["cuda"],
        "links": answers["links"],
        "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "compiler": {name: find_program(*words) for name, words in PROGRAMS.items()},
        "decoders": {name: answers[f"decoder:{name}"] for name in ("decord", "pyav", "torchcodec")},
        "samples": answers["samples"],
        "memory": read_memory(),
        "disks": {name: read_disk(path) for name, path in disks().items()},
    }


def hide_home(path: Path) -> str:
    """A path without the name of its user, for reports that are published."""
    home = Path("~")
    with suppress(RuntimeError):  # a user whom the system does not know, as in containers
        home = home.expanduser()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_package(name: str, answer: dict[str, Any]) -> dict[str, Any]:
    """A package's version and `state`: ok, untested, outside (of the range that is accepted), missing or broken."""
    package, version = PACKAGES[name], read_version(name)
    if not has_package(name):
        state = "missing"
    elif answer.get("error"):
        state = "broken"
    elif version is None or not is_in_range(package, version):
        state = "outside"
    else:
        oldest, newest = map(minor, package.tested)
        state = "ok" if oldest <= minor(version) <= newest else "untested"
    tested = package.tested[0] if package.tested[0] == package.tested[1] else " to ".join(package.tested)
    return {"name": name, "version": version, "state": state, "tested": tested, "error": answer.get("error")}


PROGRAMS = {"C++ compiler": ("c++", "g++", "clang++"), "ninja": ("ninja",), "nvcc": ("nvcc",), "FFmpeg": ("ffmpeg",)}
"""What may be on PATH, under which names."""


def find_program(*names: str) -> str | None:
    """Where the first of these is."""
    return next((found for name in names if (found := shutil.which(name))), None)


def read_memory() -> dict[str, int | None]:
    """Bytes of the host's memory: all, available (under a container's limit too), and of /dev/shm; None if unknown."""
    found: dict[str, int | None] = dict.fromkeys(("total_bytes", "available_bytes", "shm_bytes", "shm_free_bytes"))
    with suppress(OSError, KeyError):
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        found["total_bytes"], found["available_bytes"] = (
            int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable")
        )
    with suppress(OSError, ValueError):  # "max" where there is no limit
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        found["total_bytes"] = min(limit, found["total_bytes"] or limit)
        found["available_bytes"] = min(limit - used, found["available_bytes"] or limit)
    limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    found["data_limit_bytes"] = None if limit == resource.RLIM_INFINITY else limit
    with suppress(OSError):
        shm = shutil.disk_usage("/dev/shm")
        found["shm_bytes"], found["shm_free_bytes"] = shm.total, shm.free
    return found


def disks() -> dict[str, Path]:
    """Folders that fill up: where a run is written by default, downloaded towers, and temporary files."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    temporary = os.environ.get("TMPDIR") or "/tmp"
    with suppress(FileNotFoundError):  # no folder that can be written
        temporary = tempfile.gettempdir()
    # Not Path's: who has no home downloads into a folder named ~, as the library does.
    return {"here": Path.cwd(), "downloads": Path(os.path.expanduser(home)), "temporary": Path(temporary)}


def read_disk(path: Path) -> dict[str, Any]:
    """Free bytes where this folder is or would be made, and whether it can be written."""
    there = next(folder for folder in (path, *path.parents) if os.path.isdir(folder))  # False where none may look
    free = shutil.disk_usage(there).free
    return {"path": hide_home(path), "free_bytes": free, "writable": os.access(there, os.W_OK | os.X_OK)}


def read_nvml() -> dict[str, Any]:
    """The driver's own list of GPUs; with `error` where it does not answer."""
    found: dict[str, Any] = {"error": None, "driver": None, "gpus": []}
    try:
        import pynvml
    except ImportError:
        return {**found, "error": "nvidia-ml-py is not installed"}
    try:
        pynvml.nvmlInit()
        found["driver"] = text(pynvml.nvmlSystemGetDriverVersion())
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            gpu: dict[str, Any] = {
                "name": text(pynvml.nvmlDeviceGetName(handle)),
            }
            gpu |= {"memory_bytes": int(memory.total), "free_bytes": int(memory.free), "mig": False, "pcie": None}
            with suppress(pynvml.NVMLError):  # of cards that have no MIG, and virtual ones without a link
                gpu["mig"] = bool(pynvml.nvmlDeviceGetMigMode(handle)[0])
            with suppress(pynvml.NVMLError):
                numbers = [
                    call(handle) for call in (
                        pynvml.nvmlDeviceGetCurrPcieLinkGeneration, pynvml.nvmlDeviceGetCurrPcieLinkWidth,
                        pynvml.nvmlDeviceGetMaxPcieLinkGeneration, pynvml.nvmlDeviceGetMaxPcieLinkWidth,
                    )
                ]  # fmt: skip
                gpu["pcie"] = dict(zip(("generation", "width", "max_generation", "max_width"), numbers, strict=True))
            found["gpus"].append(gpu)
    except pynvml.NVMLError as error:
        found["error"] = str(error)
    return found


def text(value: Any) -> str:
    """NVML's strings, which were bytes in older versions."""
    return value.decode() if isinstance(value, bytes) else str(value)


def ask(names: Iterable[str], folder: str, seconds: float = ANSWER_SECONDS) -> dict[str, dict[str, Any]]:
    """The probes' answers by name, from other processes. One that dies or hangs is `error` of the probe it was at."""
    waiting, answers = list(names), {}
    while waiting:
        words = [sys.executable, "-m", "bigvivit.machine", folder, *waiting]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            printed, _ = process.communicate(timeout=seconds)
            end = f"its process ended with exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            process.kill()
            printed, _ = process.communicate()
            end = f"it gave no answer within {seconds:g} s"
        for line in printed.splitlines():
            answers[waiting.pop(0)] = json.loads(line)
        if waiting:
            answers[waiting.pop(0)] = {"error": end}
    return answers


def answer_all(folder: str, names: list[str]) -> None:
    """In the other process: a line of JSON for each probe, on what was standard output; everything else is silent."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)  # libraries print when they are imported
        for name in names:
            kind, _, of = name.partition(":")
            try:
                answer = PROBES[kind](folder, of)
            except Exception as error:  # whatever a library can fail with: this is what doctor is for
                answer = {"error": (str(error).strip().splitlines() or [type(error).__name__])[0]}
            print(json.dumps({"error": None, **answer}), file=out, flush=True)


def probe_import(folder: str, name: str) -> dict[str, Any]:
    """Whether it can be imported."""
    importlib.import_module(PACKAGES[name].module)
    return {}


def probe_cpu(folder: str, _: str) -> dict[str, Any]:
    """Whether bf16 products run at full speed."""
    import torch

    from bigvivit.memory.apply import has_bf16_units
    from bigvivit.training.report import describe_device

    device = torch.device("cpu")
    return {"name": describe_device(device), "bf16_units": has_bf16_units(device)}


def probe_cuda(folder: str, _: str) -> dict[str, Any]:
    """GPUs as PyTorch sees them, and NCCL; `error` says why it sees none."""
    import torch

    found: dict[str, Any] = {"built_for": torch.version.cuda or torch.version.hip, "nccl": None, "gpus": []}
    if torch.distributed.is_nccl_available():
        version: Any = torch.cuda.nccl.version()
        found["nccl"] = ".".join(map(str, version)) if isinstance(version, tuple) else str(version)
    if found["built_for"] is None:
        return found
    try:
        torch.cuda.init()
    except Exception as error:
        return {**found, "error": (str(error).strip().splitlines() or [type(error).__name__])[0]}
    from bigvivit.memory.apply import has_bf16_units

    for index in range(torch.cuda.device_count()):
        card: Any = torch.cuda.get_device_properties(index)
        found["gpus"].append(
            {
                "name": card.name,
                "memory_bytes": card.total_memory,
                "capability": f"{card.major}.{card.minor}",
                "has_kernels": has_kernels(card.major, card.minor, torch.cuda.get_arch_list()),
                "bf16_units": has_bf16_units(torch.device("cuda", index)),
            }
        )
    return found


def has_kernels(major: int, minor: int, built: Iterable[str]) -> bool:
    """Whether a card runs one of these (`sm_90`, `compute_90`): binaries run on later cards of their generation, and
    intermediate code on all later ones."""
    for kind, number in (word.rstrip("af").split("_") for word in built):
        own = divmod(int(number), 10)
        if own <= (major, minor) and (kind == "compute" or own[0] == major):
            return True
    return False


def probe_links(folder: str, _: str) -> dict[str, Any]:
    """Bytes per second from the host's pinned memory to each GPU, and from GPU 0 to each other one."""
    import torch

    found: dict[str, Any] = {"to_gpu": [], "between_gpus": []}
    if not torch.cuda.is_available():
        return found
    host = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    first = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda:0")
    for index in range(torch.cuda.device_count()):
        target = first if index == 0 else torch.empty_like(first, device=f"cuda:{index}")
        found["to_gpu"].append(time_copy(host, target))
        if index:
            found["between_gpus"].append(time_copy(first, target))
    return found


def time_copy(source: Any, target: Any) -> float:
    """The best of five, in bytes per second."""
    import torch

    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(target.device)
        best = min(best, time.perf_counter() - start)
    return float(source.nbytes / best)


def probe_samples(folder: str, _: str) -> dict[str, Any]:
    """Write a short video in each codec that can be encoded here."""
    import av
    import numpy as np

    written = []
    for codec, (encoder, ending, options) in SAMPLES.items():
        with suppress(Exception), av.open(str(Path(folder, codec + ending)), "w") as container:
            stream: Any = container.add_stream(encoder, rate=10, options=options)
            stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
            for number in range(8):
                image = np.full((64, 96, 3), 16 * number, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode(None))
            written.append(codec)
    return {"written": written}


def probe_decoder(folder: str, name: str) -> dict[str, Any]:
    """Which of the samples this decoder reads, and why not the first that it does not."""
    from bigvivit.data import decode

    package = {"pyav": "av"}.get(name, name)
    if not has_package(package):
        return {"reads": [], "refuses": {}, "error": f"{package} is not installed"}
    readers: dict[str, Any] = {
        "decord": decode.DecordReader,
        "pyav": decode.PyAVReader,
        "torchcodec": decode.TorchcodecReader,
    }
    reader = readers[name]
    found: dict[str, Any] = {"reads": [], "refuses": {}}
    for codec, (_, ending, _) in SAMPLES.items():
        path = Path(folder, codec + ending)
        if path.is_file():
            try:
                reader(path, decode.scan_frames(path)).read([7])
                found["reads"].append(codec)
            except decode.DecodeError as error:
                found["refuses"][codec] = str(error).removeprefix(f"{path} ").removeprefix(f"{path}: ")
    return found


PROBES: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "import": probe_import,
    "cpu": probe_cpu,
    "cuda": probe_cuda,
    "links": probe_links,
    "samples": probe_samples,
    "decoder": probe_decoder,
}

if __name__ == "__main__":
    answer_all(sys.argv[1], sys.argv[2:])
