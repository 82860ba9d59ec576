"""Towers on the device, in the host's memory and on disk, as values and as codes."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigvivit.assemble import choose_device
from bigvivit.forecast.virtual_gpu import is_active
from bigvivit.memory.apply import apply_plan
from bigvivit.memory.freeze import count_parameters, describe_frozen
from bigvivit.memory.placement import DiskPlacement, Mover, plan_slots, view_slots
from bigvivit.memory.plan import MemoryPlan
from bigvivit.memory.quantize import pack_weights, unpack_weights
from bigvivit.model.towers import build_tower
from bigvivit.model.weights import random_weights
from bigvivit.units import format_bytes
from tests.memory.rounding import round_to
from tests.model.reference import DEMO, draw_images

CPU = torch.device("cpu")
PIXELS = draw_images(7, 6, 48)


class Model(nn.Module):
    """As much of a model as the plan is applied to."""

    def __init__(self) -> None:
        super().__init__()
        self.tower: Any = build_tower(DEMO, tubelet=2, image_size=48, droplayer=0.0)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.tower(pixels)


def build(scratch: Path, **plan: Any) -> Model:
    model = Model()
    apply_plan(model, MemoryPlan(**plan), frozen=True, fill=random_weights(DEMO, 0), device=CPU, scratch=scratch)
    return model


@pytest.mark.parametrize("storage", ["fp32", "bf16", "fp16", "int8", "nf4"])
@pytest.mark.parametrize("placement", ["cpu", "disk"])
def test_where_a_tower_lives_changes_nothing(storage: Any, placement: Any, tmp_path: Path) -> None:
    here = build(tmp_path, storage=storage, compute="fp32", chunk=2)
    there = build(tmp_path, storage=storage, compute="fp32", chunk=2, placement=placement)
    assert torch.equal(there(PIXELS), here(PIXELS))
    assert torch.equal(there(PIXELS), here(PIXELS))  # the second step fetches again
    assert not list(there.parameters())  # nothing for an engine to shard or to hold


@pytest.mark.parametrize(("storage", "least"), [("fp32", 1 - 1e-6), ("bf16", 0.9999), ("int8", 0.999), ("nf4", 0.95)])
def test_what_a_form_costs(storage: Any, least: float, tmp_path: Path) -> None:
    """Cosine of the frame vectors with those of fp32 weights; and no form is secretly another."""
    exact = build(tmp_path, storage="fp32", compute="fp32")(PIXELS)
    cosine = nn.functional.cosine_similarity(build(tmp_path, storage=storage, compute="fp32")(PIXELS), exact).min()
    assert cosine >= least
    assert storage == "fp32" or cosine < 1


@pytest.mark.parametrize(("group", "fetches"), [("all", 6), (4, 12), (2, 24)])
@pytest.mark.parametrize("placement", ["cpu", "disk"])
def test_each_layer_is_fetched_once_for_a_group_whatever_the_chunks(
    placement: Any, group: Any, fetches: int, tmp_path: Path
) -> None:
    for chunk in (1, 2):
        model = build(tmp_path, placement=placement, group=group, chunk=chunk)
        model(PIXELS)
        assert model.tower.placement.fetches == fetches


def test_codes_are_small_and_counted(tmp_path: Path) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1)
    sizes = {}
    for storage in ("bf16", "int8", "nf4"):
        tower = build(tmp_path, storage=storage, placement="cpu").tower
        assert count_parameters(tower) == (0, sum(parameter.numel() for parameter in Model().parameters()))
        sizes[storage] = sum(buffer.numel() for buffer in tower.placement.buffers)
        slots = sum(slot.nbytes for unit in tower.units() for slot in unit.slots)
        assert slots <= sizes[storage] < slots * 1.01  # alignment
        assert f" {format_bytes(slots)} " in describe_frozen("tower", tower, optimizer)
    matrices = 4 * (4 * 128 * 128 + 2 * 128 * 512)  # of the layers, all but 2 % of the tower
    assert sizes["int8"] < sizes["bf16"] - matrices * 0.95
    assert sizes["nf4"] < sizes["bf16"] - matrices * 1.4


def test_the_next_layer_comes_while_one_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading takes 20 ms a layer and computing as much: one after the other would take twice as long."""
    from bigvivit.memory import placement, stream

    reads: list[tuple[float, float]] = []
    real_read, real_call = placement.read_bytes, stream.functional_call

    def slow_read(*arguments: Any) -> Tensor:
        assert threading.current_thread() is not threading.main_thread()
        started = time.monotonic()
        time.sleep(0.02)
        target = real_read(*arguments)
        reads.append((started, time.monotonic()))
        return target

    calls: list[tuple[float, float]] = []

    def slow_call(*arguments: Any) -> Any:
        started = time.monotonic()
        time.sleep(0.02)
        output = real_call(*arguments)
        calls.append((started, time.monotonic()))
        return output

    monkeypatch.setattr(placement, "read_bytes", slow_read)
    monkeypatch.setattr(stream, "functional_call", slow_call)
    model = build(tmp_path, placement="disk", chunk="all", group="all")
    model(PIXELS)
    assert len(reads) == len(calls) == 6
    for coming, computing in zip(reads[1:], calls, strict=False):
        assert coming[0] < computing[1]  # began before the layer before it was done
        assert coming[1] > computing[0]


def test_each_fetch_starts_before_the_layer_before_it_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By order alone, without a clock; and never more than one layer ahead."""
    from bigvivit.memory import stream

    model = build(tmp_path, placement="cpu", chunk=4, group=4)  # two groups of one chunk
    events: list[str] = []
    placement, real_call = model.tower.placement, stream.functional_call
    real_fetch = placement.fetch

    def fetch(number: int) -> Any:
        events.append(f"fetch {number}")
        return real_fetch(number)

    def call(*arguments: Any) -> Any:
        events.append("compute")
        return real_call(*arguments)

    monkeypatch.setattr(placement, "fetch", fetch)
    monkeypatch.setattr(stream, "functional_call", call)
    model(PIXELS)
    expected = ["fetch 0"]
    for number in [*range(1, 6), *range(6)]:  # embed, four layers and pool, twice
        expected += [f"fetch {number}", "compute"]
    assert events == [*expected, "compute"]


def test_a_file_that_was_cut_is_an_error_not_a_wrong_number(tmp_path: Path) -> None:
    placement = DiskPlacement(CPU, tmp_path)
    number = placement.store(torch.arange(200, dtype=torch.uint8))
    assert torch.equal(placement.fetch(number).wait(), torch.arange(200, dtype=torch.uint8))
    placement.file.truncate(100)
    with pytest.raises(OSError, match="has become shorter"):
        placement.fetch(number).wait()


def test_nothing_is_left_on_the_disk(tmp_path: Path) -> None:
    model = build(tmp_path, placement="disk")
    model(PIXELS)
    assert list(tmp_path.iterdir()) == []


def test_slots_are_aligned_and_do_not_overlap() -> None:
    tensors = {"a": torch.arange(3), "b": torch.ones(5, 7, dtype=torch.bfloat16), "c": torch.ones(1, dtype=torch.int8)}
    slots, size = plan_slots(tensors)
    buffer = torch.zeros(size, dtype=torch.uint8)
    for name, view in view_slots(buffer, slots).items():
        view.copy_(tensors[name])
    for name, view in view_slots(buffer, slots).items():
        assert torch.equal(view, tensors[name])
    assert all(slot.offset % 64 == 0 for slot in slots)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [128, 4304, 32, 80, 65])  # as a rule, as in SigLIP So400m, and smaller ones
@pytest.mark.parametrize("storage", ["int8", "nf4"])
def test_codes_are_what_their_form_says(storage: Any, columns: int, compute: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(columns, 6)
    restored = unpack_weights(pack_weights(layer, storage), layer, compute)
    expected = round_to(layer.weight.detach(), storage)
    torch.testing.assert_close(restored["weight"].float(), expected, rtol=torch.finfo(compute).eps, atol=1e-8)
    assert torch.equal(restored["bias"], layer.bias.detach().bfloat16().to(compute))


@pytest.mark.gpu
def test_cuda_copies_on_a_stream_of_its_own(tmp_path: Path) -> None:
    device = choose_device("cuda")  # as runs do: PyTorch leaves TF32 on for convolutions
    for where in ("cpu", "disk"):
        model = Model()
        plan = MemoryPlan(storage="fp32", compute="fp32", placement=where)
        apply_plan(model, plan, frozen=True, fill=random_weights(DEMO, 0), device=device, scratch=tmp_path)
        here = build(tmp_path, storage="fp32", compute="fp32")
        vectors = model(PIXELS).cpu()
        if not is_active():  # a virtual GPU, whose kernels are not run
            torch.testing.assert_close(vectors, here(PIXELS), rtol=1e-4, atol=1e-4)
        assert isinstance(model.tower.placement.mover, Mover)
        assert model.tower.placement.mover.stream != torch.cuda.current_stream()
