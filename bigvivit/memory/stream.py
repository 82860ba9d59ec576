"""A frozen tower as a stream: frames go through its layers in groups and chunks, each layer fetched once per group.

`group` tubelets have hidden states in memory at once, `chunk` of them go through a layer at once: all at once is the
paper's way, group = chunk is chunk-major, group = all is layer-major (FlexGen's zig-zag, arXiv:2303.06865, for towers).
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bigvivit.memory.placement import DevicePlacement, Placement, Slot, plan_slots, view_slots
from bigvivit.memory.plan import Stream
from bigvivit.memory.quantize import pack_weights, unpack_weights
from bigvivit.units import Storage

log = logging.getLogger(__name__)


class StagedTower(Protocol):
    """What `memory` needs of a tower: embed → layers → pool, and the pieces its weights come in."""

    embed: nn.Module
    layers: nn.ModuleList
    pool: nn.Module

    def pieces(self) -> list[tuple[str, nn.Module]]:
        """Every parameter of the tower, in exactly one named piece."""
        ...


class StreamedLayer(nn.Module):
    """One piece of a frozen tower, called once for all chunks of a group, in a compute type of its own.

    Its parameters are the unit that ZeRO-3 gathers (a leaf module) and FSDP2 wraps. Once `pack` was called it has none,
    and is handed the bytes that its placement fetched.
    """

    def __init__(self, layer: nn.Module, compute: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.layer: nn.Module = layer
        self.compute, self.device = compute, device
        self.slots: list[Slot] | None = None

    def pack(self, storage: Storage) -> Tensor:
        """Give up the parameters. Returns them as they are to be stored: uint8, on the CPU."""
        if storage == "nf4":
            self.layer.to(self.device)  # where codes are found much faster; bitsandbytes' int8 takes fp16 alone there
        stored = pack_weights(self.layer, storage)
        self.slots, size = plan_slots(stored)
        buffer = torch.zeros(size, dtype=torch.uint8)
        for name, view in view_slots(buffer, self.slots).items():
            view.copy_(stored[name])
        self.kept = self.cast_buffers(self.layer)
        layer = self.layer.to("meta")
        del self.layer
        # In a tuple, which nn.Module does not look into: neither engines nor checkpoints shall see it.
        self.packed = (layer,)
        return buffer

    def weights(self, fetched: Tensor | None) -> tuple[nn.Module, dict[str, Tensor]]:
        """The layer, and its parameters in the compute type; the copies last as long as the caller keeps them."""
        if self.slots is not None:
            assert fetched is not None
            (layer,) = self.packed
            return layer, {**unpack_weights(view_slots(fetched, self.slots), layer, self.compute), **self.kept}
        weights = {name: weight.to(self.compute) for name, weight in self.layer.named_parameters()}
        return self.layer, {**weights, **self.cast_buffers(self.layer)}

    def cast_buffers(self, layer: nn.Module) -> dict[str, Tensor]:
        """A layer's buffers on the device, numbers in the compute type."""
        return {
            name: buffer.to(self.device, self.compute if buffer.is_floating_point() else None)
            for name, buffer in layer.named_buffers()
        }

    def bytes_to_fetch(self) -> tuple[int, int]:
        """Of its weights as they are stored, and of the copies that `weights` makes of them to compute with."""
        if self.slots is not None:
            (layer,) = self.packed
            stored = max((slot.offset + slot.nbytes for slot in self.slots), default=0)
            ready = {slot.name for slot in self.slots if slot.dtype == self.compute}
        else:
            layer = self.layer
            stored = sum(weight.nbytes for weight in layer.parameters())
            ready = {name for name, weight in layer.named_parameters() if weight.dtype == self.compute}
        copied = sum(weight.numel() for name, weight in layer.named_parameters() if name not in ready)
        return stored, copied * self.compute.itemsize

    def is_ready(self) -> bool:
        """Whether the layer can compute with its parameters and buffers as they are, once they are gathered."""
        tensors = [*self.layer.parameters(), *self.layer.buffers()] if self.slots is None else []
        ready = (not each.is_floating_point() or each.dtype == self.compute for each in tensors)
        return self.slots is None and all(ready) and all(each.device == self.device for each in self.layer.buffers())

    def forward(self, chunks: list[Tensor], fetched: Tensor | None = None, **extras: Any) -> list[Any]:
        """Each chunk through the layer; `chunks` is emptied on the way, so that no chunk is held twice."""
        if self.is_ready():
            return chunk_by_chunk(self.layer, self.device, chunks, extras)
        layer, weights = self.weights(fetched)
        # Weights are exchanged once for all chunks: each exchange takes as long as starting many kernels does.
        named = {f"layer.{name}": weight for name, weight in weights.items()}
        outputs: list[Any] = functional_call(ChunkByChunk(layer, self.device), named, (chunks,), extras)
        return outputs


class ChunkByChunk(nn.Module):
    """A layer called for one chunk after the other."""

    def __init__(self, layer: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.layer, self.device = layer, device

    def forward(self, chunks: list[Tensor], **extras: Any) -> list[Any]:
        """The output of each."""
        return chunk_by_chunk(self.layer, self.device, chunks, extras)


def chunk_by_chunk(layer: nn.Module, device: torch.device, chunks: list[Tensor], extras: dict[str, Any]) -> list[Any]:
    """The layer's output for each chunk; `chunks` is emptied on the way."""
    outputs = []
    for _ in range(len(chunks)):
        chunk = chunks.pop(0).to(device, non_blocking=True)  # pixels may still be in the host's memory
        outputs.append(layer(chunk, **extras))
        del chunk
    return outputs


class FrozenTower(nn.Module):
    """A tower without gradients and always in eval mode (paper, §3.2, stage 2)."""

    def __init__(
        self,
        tower: StagedTower,
        compute: torch.dtype,
        device: torch.device,
        choose: Callable[[int, int, int], Stream],
        placement: Placement | None = None,
    ) -> None:
        """`choose(tubelets, hidden_bytes, work_bytes)`, the bytes of one tubelet, says how they go through.

        `placement` is where layers are that have been packed.
        """
        super().__init__()
        self.sketch = copy.deepcopy(tower.embed).to("meta"), copy.deepcopy(tower.layers[0]).to("meta")
        self.embed = StreamedLayer(tower.embed, compute, device)
        self.layers = nn.ModuleList(StreamedLayer(layer, compute, device) for layer in tower.layers)
        self.pool = StreamedLayer(tower.pool, compute, device)
        self.choose, self.placement = choose, placement
        self.streams: dict[int, Stream] = {}
        self.eval()

    def units(self) -> list[StreamedLayer]:
        """What is fetched one after the other, in the order of the tower's pieces."""
        return [self.embed, *self.layers, self.pool]

    def train(self, mode: bool = True) -> FrozenTower:
        """Stay in eval mode: dropout and stochastic depth of a tower that does not learn would only be noise."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """Frame vectors [n, width] in the compute type, of uint8 tubelets [n, t * 3, height, width] on any device."""
        stream = self.stream(pixels)
        groups = pixels.split(stream.group)
        fetched = self.fetch_in_turn(len(groups))
        vectors: list[Tensor] = []
        # Autocast would turn norms, and with them the hidden states, back into fp32; to bf16, it refuses to join fp16.
        with torch.autocast(self.embed.device.type, enabled=False):
            for group in groups:
                embedded = self.embed(list(group.split(stream.chunk)), next(fetched))
                extras = embedded[0][1]  # positions and the like: the same for every chunk
                hidden = [chunk for chunk, _ in embedded]
                del embedded
                for layer in self.layers:
                    hidden = layer(hidden, next(fetched), **extras)
                vectors += self.pool(hidden, next(fetched))
            return torch.cat(vectors)

    def stream(self, pixels: Tensor) -> Stream:
        """How so many go through; chosen once, and said in the log."""
        tubelets = len(pixels)
        if tubelets not in self.streams:
            stream = self.choose(tubelets, *self.bytes_per_tubelet(pixels))
            log.info("tower: %d tubelets in %s", tubelets, stream.why)
            self.streams[tubelets] = stream
        return self.streams[tubelets]

    def bytes_per_tubelet(self, pixels: Tensor) -> tuple[int, int]:
        """Of hidden states between two layers, and of work inside one: twice its widest matrix product, and its input
        twice more for the norm and the attention."""
        embed, layer = self.sketch
        hidden, _ = embed(torch.empty(pixels[:1].shape, dtype=pixels.dtype, device="meta"))
        widest = max(part.out_features for part in layer.modules() if isinstance(part, nn.Linear))
        tokens, width = hidden.shape[1:]
        size = self.embed.compute.itemsize
        return tokens * width * size, 2 * tokens * (widest + width) * size

    def fetched_bytes(self) -> int:
        """Most that is in memory of layers besides where they live, by the plan: the one that computes and the next,
        as they are stored, and the first once more in the compute type where that is another."""
        sizes = [unit.bytes_to_fetch() for unit in self.units()]
        arriving = 0 if self.placement is None or isinstance(self.placement, DevicePlacement) else 1
        following = [stored for stored, _ in sizes[1:]] + [0]
        return max(arriving * (stored + after) + cast for (stored, cast), after in zip(sizes, following, strict=True))

    def fetch_in_turn(self, groups: int) -> Iterator[Tensor | None]:
        """Each unit's bytes when its turn comes, the next already on its way; None where units have parameters."""
        if self.placement is None:
            yield from itertools.repeat(None)
            return
        order = list(range(len(self.layers) + 2)) * groups
        coming = self.placement.fetch(order[0])
        try:
            for following in order[1:]:
                here = coming.wait()
                coming = self.placement.fetch(following)
                yield here
                del here
            yield coming.wait()
        except GeneratorExit:
            coming.wait()  # a forward that failed must not free what is still being written to
            raise
