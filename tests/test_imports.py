"""Who may import whom (the layout in README, "How it works")."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ANYTHING = {
    "processes",
    "advice",
    "oom_page",
    "train",
    "presets",
    "eval",
    "predict",
    "cli",
    "assemble",
    "caching",
    "fill_cache",
    "saving",
    "towers",
    "drift",
    "plan",
    "trial",
    "trial_run",
    "trial_virtual",
    "testing",
    "machine",
    "commands",
    "calibrate",
}
MAY_IMPORT = {
    "__init__": set(),
    "units": set(),
    "versions": {"config", "__version__"},
    "memory.plan": {"units"},
    "config": {"units", "memory.plan"},
    "recipes": {"config"},
    "model": {"model", "units", "versions"},
    "memory": {"memory", "units", "config", "versions"},
    "training": {"training", "units", "config", "memory", "versions", "forecast.virtual_gpu.inside"},
    "forecast": {"forecast", "memory", "training.step", "config", "units", "versions"},
    "data": {"data", "units", "config", "versions", "__version__"},
}
OUTSIDE_ONLY_IN = {"deepspeed": {"memory.zero"}, "torch.distributed.fsdp": {"memory.fsdp"}}
FILES = sorted((ROOT / "bigvivit").rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT / "bigvivit").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "__init__"


def imported_names(path: Path) -> set[str]:
    """Absolute names of all that a file imports, at the top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def faults(module: str, names: set[str]) -> list[str]:
    """The imports of a module that break a rule."""
    found = []
    for name in sorted(names):
        for package, homes in OUTSIDE_ONLY_IN.items():
            if f"{name}.".startswith(f"{package}.") and module not in homes:
                found.append(f"{module} imports {name}, which only {homes} may")
        top, _, inner = name.partition(".")
        if top in ("bench", "tests") or (inner.startswith("commands") and module != "cli"):
            found.append(f"{module} imports {name}")
        if top == "bigvivit" and module.partition(".")[0] not in ANYTHING:
            allowed = MAY_IMPORT.get(module) or MAY_IMPORT[module.partition(".")[0]]
            if not any(f"{inner}.".startswith(f"{prefix}.") for prefix in allowed):
                found.append(f"{module} imports {name}; allowed: {sorted(allowed) or 'nothing'}")
    return found


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_follow_the_layout(path: Path) -> None:
    assert faults(module_name(path), imported_names(path)) == []


def test_the_rule_sees_a_fault() -> None:
    assert faults("model.vivit", {"bigvivit.memory.plan.MemoryPlan"})
    assert faults("memory.apply", {"bigvivit.model.vivit.ViViT"})
    assert faults("units", {"bigvivit.config.ConfigError"})
    assert faults("training.loop", {"deepspeed"})
    assert faults("data.loader", {"tests.conftest.clip"})
    assert faults("forecast.replay", {"bigvivit.training.loop.train"})
    assert not faults("forecast.replay", {"bigvivit.training.step.train_step", "bigvivit.units.MiB"})
    assert not faults("train", {"bigvivit.model.vivit.ViViT"})
    assert faults("machine", {"bigvivit.commands.doctor.Finding"})
    assert not faults("cli", {"bigvivit.commands.doctor.doctor"})


UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
"""Modules that run code a file holds."""


def unpicklings(source: str) -> list[str]:
    """What in this source could unpickle a file: imports of such modules, and torch.load but for tensors only."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name in UNPICKLERS]
        elif isinstance(node, ast.ImportFrom) and node.module in UNPICKLERS:
            found.append(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("load", "load_checkpoint"):
            options = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if ast.unparse(node.func) in ("torch.load", "np.load") or ast.unparse(node.func).endswith("checkpoint"):
                found += [] if options.get("weights_only") == "True" else [ast.unparse(node)]
    return found


def test_nothing_is_unpickled() -> None:
    """`replay` reads pickles without such a module (tests/forecast/test_snapshot.py). memory_viz only writes; the
    virtual GPU's session and child are the ends of a pipe between a process and the one that it started."""
    found = {module_name(path): unpicklings(path.read_text()) for path in FILES}
    assert {module: names for module, names in found.items() if names} == {
        "forecast.memory_viz": ["pickle"],
        "forecast.virtual_gpu.child": ["pickle"],
        "forecast.virtual_gpu.session": ["pickle"],
    }
    assert re.findall(r"pickle\.(\w+)\(", (ROOT / "bigvivit/forecast/memory_viz.py").read_text()) == ["dumps"]
    for fault in ("torch.load(path)", "engine.load_checkpoint(folder)", "from pickle import load", "import dill"):
        assert unpicklings(fault), fault


WITHOUT_TORCH = ["bigvivit", "bigvivit.config", "bigvivit.cli", "bigvivit.train", "bigvivit.eval", "bigvivit.drift"]
WITHOUT_TORCH += ["bigvivit.versions", "bigvivit.machine", "bigvivit.commands.doctor", "bigvivit.data.demo"]
WITHOUT_TORCH += [
    "bigvivit.commands.dryrun",
    "bigvivit.commands.calibrate",
    "bigvivit.plan",
    "bigvivit.forecast.dryrun.recorder",
]
WITHOUT_TORCH += ["bigvivit.testing"]  # a plugin: every run of pytest that names it imports it
WITHOUT_TORCH += [f"bigvivit.forecast.{name}" for name in ("replay_report", "hardware", "overhead")]


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_what_needs_no_torch_imports_none(module: str) -> None:
    code = f"import sys, {module}; sys.exit(' '.join({{'torch', 'transformers', 'deepspeed'}} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"import {module} brings in {done.stderr}"


def test_no_module_takes_a_name_that_others_import() -> None:
    """`deepspeed bigvivit/train.py` puts bigvivit/ first on sys.path."""
    own = {path.stem for path in (ROOT / "bigvivit").iterdir()} - {"__init__", "__pycache__"}
    clash = own & sys.stdlib_module_names
    assert clash == set()
    assert not own & {"build", "datasets", "evaluate", "deepspeed", "profile", "packaging", "tests"}
