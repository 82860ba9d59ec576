"""A command that sees all files and changes none: what it writes goes to an overlay in a scratch folder.

Linux only: a user namespace with a mount namespace (`unshare`), overlayfs over every folder, and `chroot`. Where the
kernel or a container does not permit that, the sandbox is refused: half of one would be a lie. The network is not cut
off, since ranks talk through it; the variables by which well-known libraries stay offline are set.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from bigvivit.config import ConfigError

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "WANDB_MODE": "disabled",
    "COMET_MODE": "disabled",
    "NEPTUNE_MODE": "offline",
    "CLEARML_OFFLINE_MODE": "1",
}
"""What keeps libraries from uploads, and from downloads too."""
PSEUDO = {"proc", "sysfs", "devtmpfs", "devpts", "cgroup", "cgroup2", "mqueue", "securityfs", "debugfs", "tracefs"}
"""No files of anybody's: they, and what is mounted within them (shared memory), stay as they are."""
UNSHARE = ("unshare", "--user", "--map-root-user", "--mount")


def wrap(words: list[str], folder: Path) -> list[str]:
    """The words that run these in the sandbox; only `folder` is written to for good. Raises ConfigError where the
    system permits none."""
    for program in ("unshare", "mount", "chroot"):
        if shutil.which(program) is None:
            raise ConfigError(f"sandbox: there is no program {program!r} (util-linux, coreutils): leave --sandbox out")
    script = folder / "sandbox.sh"
    script.write_text("\n".join(write_script(folder)))
    start = [*UNSHARE, "sh", str(script)]
    tried = subprocess.run([*start, "true"], check=False, capture_output=True, text=True)
    if tried.returncode:
        said = tried.stderr.strip().splitlines() or ["no reason given"]
        raise ConfigError(
            f"sandbox: this system does not permit one ({said[0]}): it needs user namespaces and overlayfs (Linux 5.11 "
            "or newer; containers often forbid both), and a TMPDIR that is not itself an overlay; leave --sandbox out "
            "and let the program write where it does no harm"
        )
    return [*start, *words]


def write_script(folder: Path) -> Iterator[str]:
    """Lines of a shell script: build the new root, enter it, run the words it was given."""
    root = folder / "root"
    root.mkdir()
    yield "set -e"
    yield f"mount -t tmpfs tmpfs {shlex.quote(str(root))}"
    yield from show("/", root, read_mounts(), folder)
    own = shlex.quote(str(folder))
    yield f"mount --bind {own} {shlex.quote(str(root))}{own}"
    yield f'exec chroot {shlex.quote(str(root))} sh -c \'cd "$0" && exec "$@"\' {shlex.quote(os.getcwd())} "$@"'


def show(place: str, root: Path, mounts: dict[str, str], folder: Path) -> Iterator[str]:
    """Lines that let the new root have this place. Overlays take folders in which nothing else is mounted: a user
    namespace may not look below another's mounts. Around those, folders are made anew, and their files only read."""
    source, target = shlex.quote(place), shlex.quote(f"{root}{place}")
    if mounts.get(place) in PSEUDO:
        yield f"mkdir -p {target} && mount --rbind {source} {target}"
    elif os.path.islink(place):
        yield f"ln -s {shlex.quote(os.readlink(place))} {target}"
    elif not os.path.isdir(place):
        if os.path.isfile(place):
            yield f"touch {target} && mount --bind {source} {target} && mount -o remount,bind,ro {target}"
    elif any(other.startswith(place.rstrip("/") + "/") for other in mounts):
        yield f"mkdir -p {target}"
        for entry in sorted(os.listdir(place)):
            yield from show(os.path.join(place, entry), root, mounts, folder)
    else:
        layer = folder / "layers" / place.strip("/").replace("/", "_")
        upper, work = layer / "upper", layer / "work"
        upper.mkdir(parents=True)
        work.mkdir()
        shutil.copymode(place, upper)
        layers = shlex.quote(f"lowerdir={place},upperdir={upper},workdir={work},userxattr")
        yield f"mkdir -p {target}"
        yield f"mount -t overlay overlay -o {layers} {target}"


def read_mounts() -> dict[str, str]:
    """Where which kind of file system is mounted; nothing within those that are no files."""
    found: dict[str, str] = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        place = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), before.split(" ")[4])
        if os.access(place, os.R_OK):
            found[place] = after.split(" ")[0]  # the last one hides those before
    pseudo = [place for place, kind in found.items() if kind in PSEUDO]
    return {place: kind for place, kind in found.items() if not any(place.startswith(f"{outer}/") for outer in pseudo)}
