"""The library of the virtual GPU: compiled once for each PyTorch, from csrc/, with the system's C compiler.

What PyTorch needs of CUDA and csrc/ does not answer is compiled in as a function that ends the process with its name:
the list is read from PyTorch's own libraries, so nothing can be missing silently.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bigvivit.config import ConfigError

SOURCES = Path(__file__).parent / "csrc"
NAMES = ("libcuda.so.1", "libcuda.so", "libnvidia-ml.so.1")
"""What else the library is found as: the driver and NVML."""
CUDA_SYMBOL = re.compile(r"(__cuda|cuda|cublas|cudnn|cusparse|cusolver|cufft|curand|nccl|cu)[A-Z]\w*")
NO_DEVICE_NEEDED = re.compile(
    r"cuFile\w+|cudnnGet(Version|CudartVersion|ErrorString|LastErrorString|Property)|"
    r"nccl(GetVersion|GetErrorString)|cu(sparse|solver|fft)Get(Version|ErrorString|ErrorName|Property)"
)
"""Left to NVIDIA's libraries, which are installed with PyTorch."""
LIBRARY, ARCHITECTURES = "libbigvivit_virtual_gpu.so", "architectures"
ELSE = "forecasts then use fake tensors, which need none of this"


@dataclass(frozen=True)
class Torch:
    """The installed PyTorch, read without importing it."""

    folder: Path
    version: str
    cuda: str
    """Of the build, such as 13.0."""


def find_torch() -> Torch:
    """Raises ConfigError where PyTorch is missing or has no CUDA."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise ConfigError(f"a virtual GPU needs PyTorch: pip install torch; {ELSE}")
    folder = Path(spec.origin).parent
    text = (folder / "version.py").read_text()
    values = {
        name: re.search(rf"^{name}\b[^=]*= *['\"]([^'\"]+)", text, re.MULTILINE) for name in ("__version__", "cuda")
    }
    version = values["__version__"].group(1) if values["__version__"] else "unknown"
    if values["cuda"] is None:
        raise ConfigError(
            f"a virtual GPU needs a CUDA build of PyTorch, and torch {version} has none: on Linux, pip install torch "
            f"gives one; {ELSE}"
        )
    return Torch(folder, version, values["cuda"].group(1))


def find_compiler() -> list[str]:
    """The command of the C compiler; raises ConfigError where there is none, or CC names what is not there."""
    if "CC" in os.environ:
        command = shlex.split(os.environ["CC"])
        if not command or shutil.which(command[0]) is None:
            raise ConfigError(f"CC={os.environ['CC']!r} is no program: set it to a C compiler, or unset it; {ELSE}")
        return command
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return [name]
    raise ConfigError(
        f"a virtual GPU is compiled once, and no C compiler (cc, gcc, clang) is on PATH: install one, for example "
        f"apt-get install gcc libc6-dev, or set CC; {ELSE}"
    )


def cache_folder() -> Path:
    """BIGVIVIT_CACHE, else bigvivit in XDG_CACHE_HOME or ~/.cache. Raises ConfigError for a user without a home."""
    if os.environ.get("BIGVIVIT_CACHE"):
        return Path(os.environ["BIGVIVIT_CACHE"])
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bigvivit"
    except RuntimeError:  # as containers have them
        raise ConfigError(
            f"a virtual GPU is compiled into a folder in your home, and this user has none: set BIGVIVIT_CACHE to a "
            f"folder; {ELSE}"
        ) from None


@dataclass(frozen=True)
class Library:
    path: Path
    """Its folder has it under the names of the driver and of NVML too."""
    architectures: tuple[int, ...]
    """Compute capabilities that PyTorch was compiled for."""
    torch: str
    """The version of PyTorch, for messages."""


def build_library() -> Library:
    """The library, compiled where it is not yet.

    Safe while others build the same. Raises ConfigError that says what is missing.
    """
    if not sys.platform.startswith("linux"):
        raise ConfigError(f"a virtual GPU needs Linux, this is {platform.system()}; {ELSE}")
    torch = find_torch()
    digest = hashlib.sha256()
    for path in [*sorted(SOURCES.iterdir()), Path(__file__)]:
        digest.update(path.read_bytes())
    name = f"torch-{torch.version}-cuda-{torch.cuda}-{platform.machine()}-{digest.hexdigest()[:16]}"
    folder = cache_folder() / "virtual_gpu" / name
    if not os.path.isdir(folder):  # False where none may look: Path's raises
        compile_into(folder, torch)
    known = tuple(map(int, (folder / ARCHITECTURES).read_text().split()))
    return Library(folder / LIBRARY, known, f"{torch.version} with CUDA {torch.cuda}")


def compile_into(folder: Path, torch: Torch) -> None:
    """Compile in a folder of our own and give it its name when it is whole; whoever is second keeps the first's."""
    compiler = find_compiler()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise ConfigError(
            f"a virtual GPU is compiled into {folder.parent}, which cannot be written ({error.strerror}): set "
            f"BIGVIVIT_CACHE to a folder that can; {ELSE}"
        ) from None
    try:
        known = architectures(torch)
        (place / ARCHITECTURES).write_text(" ".join(map(str, known)))
        (place / "unanswered.c").write_text(source_of_unanswered(needed_symbols(torch)))
        sources = [*sorted(SOURCES.glob("*.c")), place / "unanswered.c"]
        output = str(place / LIBRARY)
        run_compiler([*compiler, *flags(torch, known), "-o", output, *map(str, sources), "-lpthread", "-ldl"])
        for name in NAMES:
            (place / name).symlink_to(LIBRARY)
        try:
            place.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(place, ignore_errors=True)


def flags(torch: Torch, known: list[int]) -> list[str]:
    """The compiler's flags for this build of PyTorch, whose library has code for the compute capabilities `known`."""
    major, minor = (int(part) for part in torch.cuda.split(".")[:2])
    return [
        *("-std=gnu11", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", f"-I{SOURCES}"),
        f"-DCUDA_MAJOR={major}",
        f"-DCUDA_VERSION_NUMBER={1000 * major + 10 * minor}",
        f"-DCODE_LIST={','.join(map(str, known))}",
    ]


def run_compiler(command: list[str]) -> None:
    """Compile. Raises ConfigError with the compiler's first error."""
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[-300:])
        raise ConfigError(f"the virtual GPU does not compile with {command[0]!r}: {first}; {ELSE}")


def architectures(torch: Torch) -> list[int]:
    """Compute capabilities for which PyTorch's library has code: kernels' scratch depends on which is chosen."""
    code = "import torch; print(torch._C._cuda_getArchFlags())"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    found = re.findall(r"sm_(\d+)", done.stdout)
    if not found:
        raise ConfigError(f"torch {torch.version} does not import, or names no architectures: {done.stderr[-300:]}")
    return sorted(map(int, found))


def needed_symbols(torch: Torch) -> set[str]:
    """What PyTorch's libraries want of CUDA's."""
    wanted: set[str] = set()
    for path in (torch.folder / "lib").glob("lib*.so"):
        wanted.update(name for name in undefined_symbols(path) if CUDA_SYMBOL.fullmatch(name))
    return {name for name in wanted if not NO_DEVICE_NEEDED.fullmatch(name)}


def source_of_unanswered(names: set[str]) -> str:
    """Functions that end the process with their name; csrc/ takes precedence, since these are weak."""
    lines = [f'EXPORT __attribute__((weak)) int {name}(void) {{ unanswered("{name}"); }}' for name in sorted(names)]
    return "\n".join(['#include "virtual_gpu.h"', *lines, ""])


def undefined_symbols(path: Path) -> list[str]:
    """What a 64-bit little-endian ELF library takes from others, by its dynamic symbols; nothing for other files."""
    with path.open("rb") as file:
        header = file.read(64)
        if header[:6] != b"\x7fELF\x02\x01":
            return []
        offset, entry, count = struct.unpack_from("<Q", header, 40)[0], *struct.unpack_from("<HH", header, 58)
        file.seek(offset)
        table = file.read(entry * count)
        sections = [struct.unpack_from("<IIQQQQIIQQ", table, entry * index) for index in range(count)]
        symbols = next((section for section in sections if section[1] == 11), None)  # SHT_DYNSYM
        if symbols is None:
            return []
        file.seek(symbols[4])
        data = file.read(symbols[5])
        strings = sections[symbols[6]]
        file.seek(strings[4])
        text = file.read(strings[5])
    names = []
    for name, _, _, section, _, _ in struct.iter_unpack("<IBBHQQ", data):
        if name and section == 0:
            names.append(text[name : text.index(b"\0", name)].decode())
    return names
