"""What tests/versions.sh leaves to Python: bounds, results, and the tables of docs/installation.md."""

from __future__ import annotations

import csv
import json
import platform
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
ENVIRONMENTS = ("lowest", "shipped", "newest")
SHOWN = ("torch", "torchvision", "transformers", "deepspeed", "bitsandbytes", "accelerate", "av", "decord", "numpy")
PAGE = ROOT / "docs" / "installation.md"
CLIPS = 12


def bounds() -> None:
    """The lowest version of each dependency that pyproject.toml accepts, as a constraint."""
    text = (ROOT / "pyproject.toml").read_text()
    blocks = re.findall(r"^(?:dependencies = .*?^\]|(?:timm|tensorboard) = .*?$)", text, re.DOTALL | re.MULTILINE)
    for name, least in re.findall(r'"([\w-]+)>=([\d.]+)', "".join(blocks)):
        print(f"{name}=={least}")


def keep(name: str) -> None:
    """The result of a run of the suite, and what it ran with, for `table`."""
    from xml.etree import ElementTree

    from bigvivit.training.report import read_commit
    from bigvivit.versions import PACKAGES, read_version

    suite: Any = ElementTree.parse(ROOT / ".versions" / f"{name}.xml").getroot().find("testsuite")
    total, failed, errors, skipped = (int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped"))
    row = {
        "environment": name,
        "python": platform.python_version(),
        **{package: read_version(package) for package in PACKAGES},
        "passed": total - failed - errors - skipped,
        "failed": failed + errors,
        "skipped": skipped,
        "seconds": round(float(suite.get("time"))),
        "commit": read_commit(),
        "evidence": "measured",
    }
    (ROOT / ".versions" / f"{name}.json").write_text(json.dumps(row, indent=2) + "\n")


def table() -> None:
    """A report of the results that were kept, and the page that shows it."""
    import torch

    from bigvivit.training.report import write_report

    rows = [json.loads((ROOT / ".versions" / f"{name}.json").read_text()) for name in ENVIRONMENTS]
    stem = write_report(ROOT / "bench/results", "versions", device=torch.device("cpu"), settings={}, rows=rows)
    PAGE.write_text(fill(PAGE.read_text(), rows, stem.name))


def fill(text: str, rows: list[dict[str, Any]], report: str) -> str:
    """The page with its two tables as they should be."""
    for name, lines in (("versions", versions_table(rows, report)), ("parts", parts_table())):
        head, rest = text.split(f"<!-- {name} -->\n")
        text = f"{head}<!-- {name} -->\n{lines}{rest[rest.index('<!-- end -->') :]}"
    return text


def versions_table(rows: list[dict[str, Any]], report: str) -> str:
    """A column for each environment, and where it is from; nothing before there are results."""
    if not rows:
        return ""
    lines = [["", *(row["environment"] for row in rows)], ["---"] * (len(rows) + 1)]
    lines += [[key, *(str(row[key] or "none") for row in rows)] for key in ("python", *SHOWN)]
    lines += [[f"tests {key}", *(str(row[key]) for row in rows)] for key in ("passed", "failed", "skipped")]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + f"\n[The report](../bench/results/{report}.md).\n"


def parts_table() -> str:
    """A row for each package: which versions, and what cannot be done without it."""
    from bigvivit.versions import PACKAGES

    lines = [["package", "versions", "for"], ["---"] * 3]
    lines += [[found.name, f"`{found.range}`", found.use] for found in PACKAGES.values()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def manifest(folder: str, out: str) -> None:
    """Some real clips of a folder with clips.csv, for three steps of four."""
    with Path(folder, "clips.csv").open() as file:
        rows = list(csv.DictReader(file))[:CLIPS]
    with Path(out).open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "label"])
        table.writerows([Path(folder, row["path"]), row["label"]] for row in rows)


def write_snapshot(path: str) -> None:
    """A small memory snapshot in PyTorch's format."""
    from tests.forecast.snapshots import dump, snapshot

    blocks = [[512, "active_allocated", 512], [(2 << 20) - 512, "inactive", 0]]
    events = [["S", 4096, 2 << 20, 0], ["a", 4096, 512, 0]]
    dump(Path(path), snapshot([[4096, 2 << 20, 0, "small", False, blocks]], events))


if __name__ == "__main__":
    commands = {"bounds": bounds, "keep": keep, "table": table, "manifest": manifest, "snapshot": write_snapshot}
    commands[sys.argv[1]](*sys.argv[2:])
