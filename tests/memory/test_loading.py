"""What loading a tower takes, by the kernel's count of a process's anonymous memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bigvivit.model.towers import build_hf_model, resolve_tower
from bigvivit.processes import run_ranks
from tests.launching import ROOT, environment

PROGRAM = """
import ctypes, gc, json, os, sys, threading, time, torch
from pathlib import Path
from bigvivit import assemble
from bigvivit.config import ClipConfig, ModelConfig
from bigvivit.memory.apply import apply_plan
from bigvivit.memory.parallel import build_sharder
from bigvivit.memory.plan import MemoryPlan
from bigvivit.memory.ranks import rank_and_world, start_process_group

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024

folder, plan, engine = sys.argv[1], MemoryPlan(**json.loads(sys.argv[2])), sys.argv[3]
device, world = torch.device("cpu"), rank_and_world()[1]
zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
ds = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero} if engine == "zero3" else None
start_process_group(device, world, deepspeed=ds is not None, fsdp=engine == "fsdp")
sharder = build_sharder(ds, fsdp=engine == "fsdp", device=device)
config = ModelConfig(tower=folder, tower_init="pretrained", tubelet=1, temporal_depth=1, temporal_input="centred")
source = assemble.open_tower(config, seed=0)
clip = ClipConfig(frames=1, size=224, resize=224)
model = assemble.build_model(source, config, clip, classes=2, adapter=True, seed=0)
if plan.storage in ("int8", "nf4"):
    import bitsandbytes.functional  # not what is measured
gc.collect()
ctypes.CDLL(None).malloc_trim(0)  # what importing and opening left behind would otherwise go back in between
before, peak, done = anonymous(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
apply_plan(model, plan, frozen=True, fill=source.fill, device=device, scratch=Path(folder), sharder=sharder)
done = True
thread.join()
print(json.dumps([peak - before, anonymous() - before]), flush=True)
if world > 1:
    torch.distributed.barrier()
os._exit(0)
"""


def write_tower(folder: Path, size: str, dtype: torch.dtype, files: int) -> int:
    """A tower of this size with random weights in so many files; its number of parameters."""
    spec = resolve_tower(size)
    model = build_hf_model(spec, 1)
    model.config.save_pretrained(folder)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    weight_map = {}
    for number in range(files):
        own = list(shapes)[number::files]
        file = f"model-{number + 1:05}-of-{files:05}.safetensors" if files > 1 else "model.safetensors"
        save_file({name: torch.randn(shapes[name]).to(dtype) for name in own}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(own, file)
    if files > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(shape.numel() for shape in shapes.values())


def measure(folder: Path, **plan: object) -> tuple[int, int]:
    """Growth of anonymous memory at its peak and at the end."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, folder, json.dumps(plan), "plain"],
        check=False, cwd=ROOT, capture_output=True, text=True, env=environment(PYTHONPATH=str(ROOT)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    peak, end = json.loads(done.stdout.splitlines()[-1])
    return peak, end


@pytest.mark.parametrize(
    ("size", "dtype", "files", "codes"),
    [
        ("vit-b", torch.float32, 1, []),
        pytest.param("vit-b", torch.float32, 1, ["int8", "nf4"], marks=pytest.mark.slow),
        pytest.param("vit-g", torch.float32, 1, ["int8", "nf4"], marks=pytest.mark.slow),
        pytest.param("vit-g", torch.bfloat16, 3, [], marks=pytest.mark.slow),
    ],
)
def test_loading_takes_what_is_kept_and_little_more(
    size: str, dtype: torch.dtype, files: int, codes: list[str], tmp_path: Path
) -> None:
    parameters = write_tower(tmp_path, size, dtype, files)
    bf16 = parameters * 2
    layer, matrix = {"vit-b": (parameters / 12, 768 * 3072), "vit-g": (parameters / 40, 1408 * 6144)}[size]
    packing = 4 * (layer + 3 * matrix)  # a layer in fp32, and what quantising its largest matrix takes
    peak, end = measure(tmp_path, storage="bf16")
    print(f"{size}, {dtype}, {files} files: peak {peak / bf16:.3f}, end {end / bf16:.3f} of {bf16} bytes in bf16")
    assert bf16 * 0.95 <= end <= peak <= 1.15 * bf16  # all of it is touched
    if dtype == torch.float32:
        for storage in codes:
            kept = {"int8": parameters, "nf4": parameters * 0.53}[storage]
            peak, end = measure(tmp_path, storage=storage)
            print(f"  {storage}: peak {peak / kept:.3f}, end {end / kept:.3f} of {kept:.0f} bytes")
            assert kept * 0.9 <= end
            assert peak <= kept * 1.15 + packing, storage
        peak, end = measure(tmp_path, storage="bf16", placement="disk")
        assert peak <= bf16 / 3  # never the tower: a layer or two


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_a_rank_never_holds_the_tower_that_it_shards(engine: str, tmp_path: Path) -> None:
    """Two real ranks: a half each, and the layers that are being filled and sharded."""
    bf16 = write_tower(tmp_path, "vit-b", torch.float32) * 2
    words = ["-c", PROGRAM, str(tmp_path), json.dumps({"storage": "bf16"}), engine]
    for peak, end in run_ranks(words, 2, environment=environment(PYTHONPATH=str(ROOT))):
        assert bf16 * 0.45 <= end <= peak
        assert peak <= 0.5 * bf16 * 1.15 + 3 * bf16 / 12 < bf16
