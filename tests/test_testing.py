"""`bigvivit.testing` as another project uses it: a program of its own, a budget, a golden, and a regression."""

from __future__ import annotations

import json

import pytest

from bigvivit.config import ConfigError
from bigvivit.forecast import fake_tensors, virtual_gpu

with fake_tensors():
    pass  # what this imports does not stand being imported once more by each inner run of pytest

PROGRAM = """
import torch
from torch import nn

kept = []

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(256, 256) for _ in range(3))

    def forward(self, x):
        for number, block in enumerate(self.blocks):
            x = block(x).relu()
            LEAK
        return x

def test_net(memory_budget):
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), momentum=0.9)

    def step():
        optimizer.zero_grad()
        net(torch.ones(1024, 256)).mean().backward()
        optimizer.step()

    memory_budget(step, peak="BUDGET")
"""


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.delenv("CI", raising=False)
    pytester.makeconftest('pytest_plugins = ["bigvivit.testing"]')
    return pytester


def run(project: pytest.Pytester, *words: str, budget: str = "9 MiB", leak: str = "pass") -> pytest.RunResult:
    project.makepyfile(test_net=PROGRAM.replace("BUDGET", budget).replace("LEAK", leak))
    return project.runpytest_inprocess("-p", "no:cacheprovider", *words)


def test_a_step_within_its_budget_passes_and_one_above_names_what_grew(project: pytest.Pytester) -> None:
    run(project, "--update-memory-goldens").assert_outcomes(passed=1)
    (tests,) = json.loads((project.path / "memory_goldens.json").read_text()).values()
    golden = tests["test_net.py::test_net"]
    assert max(golden["most_bytes"].values()) < golden["peak_bytes"] < 9 * 2**20
    assert golden["most_bytes"]["gradients of net.blocks.0"] == 256 * 257 * 4
    run(project).assert_outcomes(passed=1)
    result = run(project, leak="kept.append(x.clone()) if number == 1 else None")
    result.assert_outcomes(failed=1)
    # The first line of causes; 1 MiB of each of the three steps.
    result.stdout.fnmatch_lines(
        ["*above the budget of 9 MiB; since*", "*+3,145,728 B  activations of net *aten.clone*"]
    )


def test_a_budget_holds_without_goldens_too(project: pytest.Pytester) -> None:
    result = run(project, budget="1 MiB")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*above the budget of 1 MiB; what it was made of before is not recorded*"])
    assert not (project.path / "memory_goldens.json").exists()


GOLDEN = """
def test_peak(memory_golden):
    memory_golden(PEAK, tolerance=0.02)
"""


def golden(project: pytest.Pytester, peak: int, *words: str) -> pytest.RunResult:
    project.makepyfile(test_peak=GOLDEN.replace("PEAK", str(peak)))
    return project.runpytest_inprocess("-p", "no:cacheprovider", "-rs", *words)


def test_goldens_are_written_when_asked_and_never_passed_over(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = golden(project, 1000)
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*has no peak of test_peak.py::test_peak for torch *only for nothing*"])
    golden(project, 1000, "--update-memory-goldens").assert_outcomes(passed=1)
    golden(project, 1020).assert_outcomes(passed=1)
    for peak, word in ((1021, "more"), (979, "less")):
        result = golden(project, peak)
        result.assert_outcomes(failed=1)
        result.stdout.fnmatch_lines([f"*{word} than the 1,000 B it was*--update-memory-goldens*"])
    path = project.path / "memory_goldens.json"
    path.write_text(path.read_text().replace('"torch 2.', '"torch 1.'))
    monkeypatch.setenv("CI", "true")
    golden(project, 5000).assert_outcomes(skipped=1)  # versions that are new: nobody has looked at them yet
    path.write_text(path.read_text().replace("test_peak.py", "test_other.py"))
    golden(project, 1000).assert_outcomes(failed=1)  # a test that is new: it was not recorded


ON_GPU = """
import torch
from torch import nn

def test_net(memory_budget):
    net = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    optimizer = torch.optim.SGD(net.parameters(), momentum=0.9)

    def step():
        optimizer.zero_grad()
        net(torch.ones(1024, 256)).mean().backward()
        optimizer.step()

    found = memory_budget(step, peak="BUDGET", gpu="L4")
    assert found.gpu == "L4"
    # weights, gradients and momentum; inputs and hidden values: all that is there, and rounding
    assert 3 * 2 * 257 * 256 * 4 < found.peak_bytes <= found.reserved_bytes < 64 * 2**20
    assert isinstance(net[0].weight, nn.Parameter) and net[0].weight.device.type == "cpu"
"""


@pytest.mark.parametrize(
    ("budget", "outcome"),
    [pytest.param("32 MiB", {"passed": 1}, marks=pytest.mark.slow), ("1 MiB", {"failed": 1})],
)
def test_a_budget_on_a_virtual_gpu_is_held_in_a_process_of_its_own(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, budget: str, outcome: dict[str, int]
) -> None:
    try:
        virtual_gpu.environment("L4")
    except ConfigError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    project.makepyfile(test_net=ON_GPU.replace("BUDGET", budget))
    result = project.runpytest_inprocess("-p", "no:cacheprovider")
    result.assert_outcomes(**outcome)
    if "failed" in outcome:
        result.stdout.fnmatch_lines(["*on a virtual L4 is *above the budget of 1,048,576 B*", "*B  * at test_net.py:*"])
