"""Children on virtual GPUs: results, errors, ends, and programs that know nothing of us."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bigvivit.config import ConfigError
from bigvivit.forecast.virtual_gpu import VirtualGpuError, driver_bytes, environment, is_active, virtual_gpu
from tests.forecast.virtual_gpu import programs

pytestmark = pytest.mark.usefixtures("library")


def test_results_and_errors_come_back(capfd: pytest.CaptureFixture[str]) -> None:
    with virtual_gpu("T4") as gpu:
        assert gpu.call(programs.says, "hello") == "HELLO"
        assert "hello" in capfd.readouterr().err
        with pytest.raises(ZeroDivisionError, match="as it must") as caught:
            gpu.call(programs.fails)
        assert "in fails" in str(caught.value.__cause__)  # the child's line, not ours
        assert gpu.call(programs.says, "goes on") == "GOES ON"


@pytest.mark.parametrize("chosen", ["3", ""])
def test_which_real_gpus_are_chosen_does_not_matter(monkeypatch: pytest.MonkeyPatch, chosen: str) -> None:
    """As on a cluster, whose scheduler sets the variable, or where somebody hides them all."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    with virtual_gpu("T4", gpus=2) as gpu:
        assert gpu.call(programs.count_gpus) == 2


def test_what_cannot_be_sent_is_said() -> None:
    with virtual_gpu("T4") as gpu, pytest.raises(ConfigError, match="defined at the top of an importable module"):
        gpu.call(lambda: 0)


def test_a_child_that_ends_says_how() -> None:
    with virtual_gpu("T4") as gpu, pytest.raises(VirtualGpuError, match=r"(?s)exit code 3.*last words"):
        gpu.call(programs.ends)


def test_what_is_not_answered_is_named_with_the_line_that_asked() -> None:
    with virtual_gpu("A100 80GB") as gpu, pytest.raises(VirtualGpuError, match=r"SIGABRT") as caught:
        gpu.call(programs.needs_sparselt)
    assert "no answer to cusparseLt" in str(caught.value)
    assert "in needs_sparselt" in str(caught.value)


def test_this_process_is_on_none() -> None:
    assert not is_active()
    with pytest.raises(RuntimeError, match="does not run on virtual GPUs"):
        driver_bytes(0)


def test_any_program_runs_and_its_own_sitecustomize_too(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import builtins; builtins.greeting = 'mine'")
    (tmp_path / "program.py").write_text("import torch; print(greeting, torch.ones(2, device='cuda').sum().shape)")
    env = {**os.environ, **environment("H100")}
    env["PYTHONPATH"] = os.pathsep.join([env["PYTHONPATH"], str(tmp_path)])
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, env=env, check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "mine torch.Size([])\n"), done.stderr


def test_what_is_tuned_here_is_not_taken_on_a_real_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """torch.compile keeps what was fastest by the name of the GPU, and nothing is timed here."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with virtual_gpu("H100") as gpu:
        assert str(tmp_path) not in gpu.call(programs.caches_of_compilers)


def test_environments_add_to_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "/lib/other.so")
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    added = environment("T4")
    assert added["LD_PRELOAD"].split(":")[1:] == ["/lib/other.so"]
    assert added["PYTHONPATH"].split(":")[1:] == ["/somewhere"]
    monkeypatch.setenv("LD_PRELOAD", added["LD_PRELOAD"])
    assert environment("T4")["LD_PRELOAD"] == added["LD_PRELOAD"]
