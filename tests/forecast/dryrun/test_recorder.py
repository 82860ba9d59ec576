"""When a run ends: real loops of PyTorch on the CPU, each in a forked process that must end after three steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.launching import ROOT

LOOPS = """
import importlib.util, os, sys
from bigvivit.forecast.dryrun import recorder

recorder.install()
assert importlib.util.find_spec("torch") is not None  # as libraries ask: torch is not imported yet

import torch, torch._dynamo
from torch import nn

def plain():
    net = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(net.parameters())
    while True:
        for _ in range(2):  # accumulates
            yield "forward"
            net(torch.ones(4)).sum().backward()
        optimizer.step()
        yield "step"

def two_optimizers():
    one, two = nn.Linear(4, 4), nn.Linear(4, 4)
    first, second = torch.optim.SGD(one.parameters(), lr=0.1), torch.optim.Adam(two.parameters())
    while True:
        one(torch.ones(4)).sum().backward()
        first.step()
        yield "first"
        two(torch.ones(4)).sum().backward()
        second.step()
        yield "second"

def groups_of_one_step():
    net = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    while True:
        net(torch.ones(4)).sum().backward()
        for _ in range(3):  # as ZeRO steps
            optimizer.step()
            yield "call"

def lbfgs():
    net = nn.Linear(4, 4)
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=5)
    def closure():
        optimizer.zero_grad()
        loss = net(torch.ones(4)).square().sum()
        loss.backward()
        return loss
    while True:
        optimizer.step(closure)
        yield "step"

def within_backward():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in net.parameters()}
    for p in net.parameters():
        p.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
    while True:
        net(torch.ones(4)).sum().backward()
        yield "pass"

def skipped_by_the_scaler():
    net = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    while True:
        optimizer.zero_grad()
        scaler.scale(net(torch.full((4,), float("inf"))).sum()).backward()
        scaler.step(optimizer)
        yield "skipped"
        scaler.update()

def stepped_by_the_scaler():
    net = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    while True:
        optimizer.zero_grad()
        scaler.scale(net(torch.ones(4)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        yield "step"

for loop in (plain, two_optimizers, groups_of_one_step, lbfgs, within_backward, skipped_by_the_scaler,
             stepped_by_the_scaler):
    sys.stdout.flush()
    if os.fork() == 0:
        seen = []
        try:
            for word in loop():
                print(loop.__name__, word)
                if len(seen) > 100:
                    print(loop.__name__, "does not end")
                    break
                seen.append(word)
        finally:
            print(loop.__name__, "left by itself")
            sys.stdout.flush()
            os._exit(1)
    _, status = os.wait()
    print(loop.__name__, "exit", os.waitstatus_to_exitcode(status))
"""


def test_every_kind_of_loop_ends_after_its_steps(tmp_path: Path) -> None:
    settings = json.dumps({"folder": str(tmp_path), "steps": 3, "snapshot": False, "skip_init": False})
    environment = {**os.environ, "BIGVIVIT_DRYRUN": settings, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOOPS], check=False, capture_output=True, text=True, env=environment, timeout=120
    )
    printed: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        name, _, what = line.partition(" ")
        printed.setdefault(name, []).append(what)
    assert printed == {
        "plain": ["forward", "forward", "step"] * 2 + ["forward", "forward", "exit 0"],
        "two_optimizers": ["first", "second"] * 2 + ["first", "exit 0"],
        "groups_of_one_step": ["call"] * 8 + ["exit 0"],  # the last call of the third step does not return
        "lbfgs": ["step"] * 2 + ["exit 0"],
        "within_backward": ["pass"] * 2 + ["exit 0"],
        "skipped_by_the_scaler": ["skipped"] * 3 + ["exit 0"],
        "stepped_by_the_scaler": ["step"] * 2 + ["exit 0"],
    }, done.stderr
