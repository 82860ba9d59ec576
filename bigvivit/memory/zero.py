"""DeepSpeed's ZeRO 0 to 3 behind the Engine protocol. The only module that imports deepspeed."""

from __future__ import annotations

import logging
import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from bigvivit.memory.ds_json import zero_stage
from bigvivit.memory.engine import (
    gather_optimizer_state,
    is_eight_bit,
    load_blocks,
    load_optimizer_state,
    read_blocks,
)
from bigvivit.memory.stream import StreamedLayer
from bigvivit.versions import require_known

log = logging.getLogger(__name__)


def init_deepspeed(device: torch.device) -> None:
    """Make DeepSpeed use the process group that exists, quietly, with or without a C++ compiler."""
    require_known("ZeRO", "deepspeed")
    be_quiet()
    if device.type == "cpu":
        go_on_without_compiler()
    deepspeed.init_distributed(verbose=False)
    if device.type == "cpu":
        unlink_shared_memory()


def be_quiet() -> None:
    """Say what concerns the user, and not how DeepSpeed calls PyTorch."""
    deepspeed.utils.logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)


def unlink_shared_memory() -> None:
    """Take away the name of this rank's buffer of that collective, 66 MiB in /dev/shm: DeepSpeed leaves it for good.

    By now every rank has mapped everyone's, which lasts as long as they do.
    """
    dist.barrier()
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{dist.get_rank()}"
    Path("/dev/shm", name).unlink(missing_ok=True)


def go_on_without_compiler() -> None:
    """On CPUs DeepSpeed compiles a shared-memory collective at start; gloo does the same work without it."""
    backend = sys.modules["deepspeed.comm.torch"]
    build = backend.build_shm_op

    def build_or_none() -> Any:
        if not any(map(shutil.which, ("c++", "g++", "clang++"))):
            reason = "no C++ compiler"
        elif not shutil.which("ninja"):
            reason = "no ninja on PATH"
        else:
            try:
                return build()
            except Exception as error:  # whatever a compiler can fail with; the op only makes things faster
                reason = str(error).splitlines()[0]
        if dist.get_rank() == 0:
            log.warning("DeepSpeed's shared-memory op is not used (%s): collectives go through gloo", reason)
        return None

    backend.build_shm_op = build_or_none  # type: ignore[attr-defined]


class ZeroSharder:
    """ZeRO-3's partitioning of units that have just been filled."""

    forgets_shapes = True

    def __init__(self, ds: dict[str, Any]) -> None:
        self.ds = ds

    def shard(self, unit: nn.Module) -> None:
        """Every rank has filled the unit; rank 0's values are the ones that count (DeepSpeed broadcasts them)."""
        deepspeed.zero.Init(module=unit, config_dict_or_path=self.ds, dtype=torch.float32)

    def finish(self, model: nn.Module) -> None:
        """Nothing: `deepspeed.initialize` takes over what is left."""


class ZeroEngine:
    """A DeepSpeed engine; accumulation, clipping and the learning rate are its own."""

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, scheduler: LRScheduler, *, ds: dict[str, Any]
    ) -> None:
        self.stage = zero_stage(ds)
        self.name = f"zero{self.stage}"
        self.module, self.optimizer, self.scheduler = module, optimizer, scheduler
        streamed = any(isinstance(part, StreamedLayer) for part in module.modules())
        if self.stage == 3 and streamed:
            # Gathered whole before its forward and let go after it, however many operations happen in between.
            deepspeed.utils.set_z3_leaf_modules(module, [StreamedLayer])
        self.engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, lr_scheduler=scheduler, config=ds, dist_init_required=False
        )
        self.device = torch.device(self.engine.device)

    def __call__(self, clips: Tensor) -> Tensor:
        return self.engine(clips)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)  # divides by the number of micro-batches

    def step(self) -> float | None:
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()
            return None
        norm = None
        if self.stage == 0:  # where DeepSpeed clips without keeping the norm; gradients are reduced by now
            norm = nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])
        self.engine.step()
        return float(self.engine.get_global_grad_norm() if norm is None else norm)

    def averaged(self) -> AbstractContextManager[None]:
        return nullcontext()  # `optim.ema` is refused under DeepSpeed

    def gather_optimizer(self) -> dict[str, Tensor]:
        if self.stage == 0:
            return gather_optimizer_state(self.module, self.optimizer) if dist.get_rank() == 0 else {}
        if is_eight_bit(self.optimizer):
            # Blocks run over the borders of parameters and end at those of ranks: each rank's are kept as they are.
            own = read_blocks(self.optimizer, self.flat_by_name())
            everyone: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
            dist.gather_object(own, everyone)
            return {entry: value for part in everyone or [] for entry, value in part.items()}
        if self.stage < 3:
            self.link_states()
        whole = {}
        for name, parameter in self.trained():
            for key in self.state_keys():
                value = deepspeed.utils.safe_get_full_optimizer_state(parameter, key)  # every rank takes part
                if dist.get_rank() == 0:
                    whole[f"{name}.{key}"] = value.detach().cpu().clone()
            if isinstance(self.optimizer, torch.optim.AdamW) and dist.get_rank() == 0:
                whole[f"{name}.step"] = self.optimizer.state[self.flat_parameters()[0]]["step"].cpu().clone()
        return whole

    def load_optimizer(self, state: dict[str, Tensor]) -> None:
        if self.stage == 0:
            load_optimizer_state(self.module, self.optimizer, state)
            return
        if is_eight_bit(self.optimizer):
            load_blocks(self.optimizer, self.flat_by_name(), state)
            return
        # Torch's optimizers make their state in the first step; DeepSpeed's setters need it to be there.
        for flat in self.flat_parameters():
            self.optimizer.state[flat] = {key: torch.zeros_like(flat) for key in self.state_keys()}
            if isinstance(self.optimizer, torch.optim.AdamW):
                self.optimizer.state[flat]["step"] = next(v for k, v in state.items() if k.endswith(".step")).clone()
        if self.stage < 3:
            self.link_states()
        for name, parameter in self.trained():
            for key in self.state_keys():
                value = state[f"{name}.{key}"].to(self.device)
                if self.stage == 3:
                    # Not safe_set_full_…: it reads past the end where the elements do not divide over the ranks.
                    size = parameter.partition_numel()
                    padded = nn.functional.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
                    own = padded.narrow(0, size * dist.get_rank(), size)
                    deepspeed.utils.safe_set_local_optimizer_state(parameter, own, key)
                else:
                    deepspeed.utils.safe_set_full_optimizer_state(parameter, value, key)

    def link_states(self) -> None:
        """Have DeepSpeed's getters and setters see every state. It links them once, after the first parameter group's
        first step, when the other groups have none yet."""
        self.engine.optimizer._hp_optimizer_states_linked = False
        self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def trained(self) -> list[tuple[str, Any]]:
        """What the optimizer holds, by name."""
        return [(name, parameter) for name, parameter in self.module.named_parameters() if parameter.requires_grad]

    def state_keys(self) -> tuple[str, ...]:
        """Names of the optimizer's tensors that have a parameter's shape."""
        return ("exp_avg", "exp_avg_sq") if isinstance(self.optimizer, torch.optim.AdamW) else ("momentum_buffer",)

    def flat_parameters(self) -> list[Tensor]:
        """This rank's share of what is trained, in the form in which the torch optimizer sees it."""
        inner = self.engine.optimizer
        return list(inner.fp32_partitioned_groups_flat if self.stage == 3 else inner.single_partition_of_fp32_groups)

    def flat_by_name(self) -> dict[str, Tensor]:
        """`flat_parameters` under names that no other rank has."""
        return {f"rank{dist.get_rank()}.flat{i}": flat for i, flat in enumerate(self.flat_parameters())}

    def gather(self, module: nn.Module) -> dict[str, Tensor]:
        named = dict(module.named_parameters())
        with deepspeed.zero.GatheredParameters(list(named.values()), enabled=self.stage == 3):
            if dist.get_rank() > 0:
                return {}
            return {name: parameter.detach().cpu().clone() for name, parameter in named.items()}


def gather_at_once(
    handle: deepspeed.runtime.zero.partition_parameters.AllGatherCoalescedHandle, handle_dependency: bool = True
) -> None:
    """Its `wait`, without a tensor for every rank's part of every weight: 64 ranks of ViT-g's are 30,000 at a time."""
    for parameter in () if handle.complete else handle.params:
        gathered = torch.empty(parameter.ds_shape, dtype=handle.partitions[0].dtype)
        parameter.data = gathered.to(parameter.ds_tensor.dtype)
        parameter.ds_status = deepspeed.runtime.zero.partition_parameters.ZeroParamStatus.AVAILABLE
    handle.complete = True


def with_one_view(gather: Callable[..., None]) -> Callable[..., None]:
    """Its gathering of weights, with one view for every rank's part of a buffer: without values all are alike."""
    original = Tensor.narrow

    def call(*args: Any, **options: Any) -> None:
        views: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

        def narrow(tensor: Tensor, dim: int, start: int, length: int) -> Tensor:
            if (id(tensor), length) not in views:
                views[id(tensor), length] = tensor, original(tensor, dim, start, length)
            return views[id(tensor), length][1]

        with patch.object(Tensor, "narrow", narrow):
            gather(*args, **options)

    return call


def reduce_at_once(tensors: list[Tensor], group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """Its `reduce_scatter_coalesced` in the same memory, without a view of every rank's part of every tensor."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    sizes = [math.ceil(tensor.numel() / world) for tensor in tensors]
    if len(tensors) == 1 and tensors[0].numel() == sizes[0] * world:
        buffer = tensors[0].view(-1)
    else:
        fill = [size - own_size(t, size, r) for r in range(world) for t, size in zip(tensors, sizes, strict=True)]
        padding = [tensors[0].new_empty(count) for count in fill if count]
        buffer = tensors[0].new_empty(sum(sizes) * world)
        del padding
    part = buffer.narrow(0, sum(sizes) * rank, sum(sizes))
    deepspeed.comm.reduce_scatter_fn(part, buffer, group=group, async_op=False)
    offsets = [sum(sizes[:place]) for place in range(len(sizes))]
    return [
        part.narrow(0, offset, own_size(tensor, size, rank))
        for tensor, size, offset in zip(tensors, sizes, offsets, strict=True)
    ]


def own_size(tensor: Tensor, size: int, rank: int) -> int:
    """Elements of a rank's part of a tensor that is cut into parts of `size`."""
    return max(0, min(size, tensor.numel() - size * rank))


FAKE_ANSWERS: dict[str, Callable[..., Any]] = {
    # Would compare ZeRO-3's order of fetches with that of rank 0, by values that nobody has.
    "assert_ints_same_as_other_ranks": lambda values: None,
    # Would compile the collective over shared memory and call it past PyTorch, where there is no fake one.
    "build_shm_op": lambda: None,
}
"""What stands in for functions of DeepSpeed, by name, in every module of it that has them."""


@contextmanager
def side_streams() -> Iterator[None]:
    """Have DeepSpeed gather and reduce on streams of their own, as on CUDA; it does without on a CPU. Nothing runs on
    them: a trace sees which one is the current one when memory is taken. How long `record_stream` keeps what is freed
    is not seen."""
    accelerator = type(deepspeed.accelerator.get_accelerator())
    own = torch.cpu.current_stream()
    with ExitStack() as stack:
        for name, answer in {
            "is_synchronized_device": lambda _: False,
            "Stream": torch.cpu.Stream,
            "Event": torch.cpu.Event,
            "stream": lambda _, stream: torch.cpu.stream(stream),
            "current_stream": lambda *_: torch.cpu.current_stream(),
            "default_stream": lambda *_: own,
        }.items():
            stack.enter_context(patch.object(accelerator, name, answer))
        stack.enter_context(patch.object(Tensor, "record_stream", lambda *_: None))
        stack.enter_context(patch.object(torch.cpu.Stream, "synchronize", lambda _: None, create=True))
        yield


@contextmanager
def zero_on_fake_tensors() -> Iterator[None]:
    """Make DeepSpeed's engine run on fake tensors and a fake process group; for a process that does nothing else."""
    require_known("a forecast of ZeRO", "deepspeed")
    be_quiet()
    handle = deepspeed.runtime.zero.partition_parameters.AllGatherCoalescedHandle
    stage3 = deepspeed.runtime.zero.stage3
    coordinator = deepspeed.runtime.zero.partitioned_param_coordinator.PartitionedParameterCoordinator
    with ExitStack() as stack:
        # As a launcher would say it; DeepSpeed looks nowhere else.
        ranks = {"RANK": str(dist.get_rank()), "LOCAL_RANK": "0", "WORLD_SIZE": str(dist.get_world_size())}
        stack.enter_context(patch.dict(os.environ, {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}))
        for keeper in (deepspeed.utils.groups, deepspeed.comm.comm):  # of groups, which end with this
            stack.enter_context(patch.dict(vars(keeper)))
        for name, module in list(sys.modules.items()):
            if name.startswith("deepspeed"):
                for key, answer in FAKE_ANSWERS.items():
                    if key in vars(module):
                        stack.enter_context(patch.object(module, key, answer))
        stack.enter_context(patch.object(handle, "wait", gather_at_once))
        gather = f"_{coordinator.__name__}__all_gather_params_"
        stack.enter_context(patch.object(coordinator, gather, with_one_view(getattr(coordinator, gather))))
        stack.enter_context(patch.object(stage3, "reduce_scatter_coalesced", reduce_at_once))
        stack.enter_context(side_streams())
        deepspeed.init_distributed(verbose=False)
        yield
