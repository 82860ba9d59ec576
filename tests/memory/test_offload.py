"""What waits on the host for the backward gives what autograd gives without, on the CPU to the bit."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bigvivit.memory import offload
from bigvivit.memory.offload import Copies, Offload, Saved, keep_on_host

CPU = Copies(torch.device("cpu"))


class Layers(nn.Module):
    """Attention of strided views, norms, activations, expanded and transposed tensors."""

    def __init__(self, recompute: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True) for _ in range(4))
        self.scale = nn.Parameter(torch.ones(16))
        self.recompute = recompute

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            if self.recompute:
                hidden = checkpoint(layer, hidden, use_reentrant=self.recompute == "reentrant")
            else:
                hidden = layer(hidden)
        turned = hidden.transpose(1, 2)
        return turned.exp() * self.scale[None, :, None].expand_as(turned) + turned[..., 1:2] * turned


def inputs() -> Tensor:
    return torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()


def gradients(model: nn.Module, hidden: Tensor) -> list[Tensor]:
    found = [parameter.grad for parameter in [hidden, *model.parameters()]]
    assert all(gradient is not None for gradient in found)
    return [gradient.clone() for gradient in found if gradient is not None]


def train(model: nn.Module, context: AbstractContextManager[Any], passes: Any = Tensor.backward) -> list[Tensor]:
    """The gradients of a forward in this context after `passes(loss)`."""
    hidden = inputs()
    with context:
        output = model(hidden)
    passes(output.sum())
    return gradients(model, hidden)


def twice(loss: Tensor) -> None:
    loss.backward(retain_graph=True)
    loss.backward()


@pytest.mark.parametrize("recompute", ["", "reentrant", "other"])
@pytest.mark.parametrize("passes", [Tensor.backward, twice])
def test_gradients_are_those_without(recompute: str, passes: Any) -> None:
    moved, kept = (train(Layers(recompute), context, passes) for context in (keep_on_host(CPU), nullcontext()))
    assert all(map(torch.equal, moved, kept))


def test_gradients_of_gradients_are_those_without() -> None:
    found: list[Tensor] = []
    for context in (keep_on_host(CPU), nullcontext()):
        value = torch.linspace(0, 1, 7, requires_grad=True)
        with context:
            output = (value.exp() * value.sin()).sum()
        (slope,) = torch.autograd.grad(output, value, create_graph=True)
        found += torch.autograd.grad(slope.square().sum(), value)
    assert torch.equal(*found)


def test_layouts_are_kept() -> None:
    """Kernels sum in another order over tensors that lie otherwise."""
    pass_ = Offload(CPU)
    base = torch.randn(4, 6, 8)
    for tensor in (base, base.transpose(0, 2), base[:, 1:3], base[:, :, ::2], base[:1].expand(4, 6, 8), base[0, 0, 0]):
        packed = pass_.pack(tensor)
        assert isinstance(packed, Saved)
        packed.leave()
        back = pass_.unpack(packed)
        assert back.data_ptr() != tensor.data_ptr()
        assert back.stride() == tensor.clone().stride()
        assert torch.equal(back, tensor)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16, torch.float8_e4m3fn, torch.complex64])
def test_every_type_comes_back(dtype: torch.dtype) -> None:
    pass_, tensor = Offload(CPU), torch.arange(6).remainder(2).to(dtype)
    packed = pass_.pack(tensor)
    assert isinstance(packed, Saved)
    packed.leave()
    assert pass_.unpack(packed).view(torch.uint8).equal(tensor.view(torch.uint8))


def test_weights_and_views_of_them_stay() -> None:
    pass_, weight = Offload(CPU), nn.Parameter(torch.ones(4, 6))
    for tensor in (weight, weight.t(), weight[1:, 2], torch.empty(0, 3)):
        assert pass_.pack(tensor) is tensor


def test_without_gradients_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(offload, "empty_on_host", lambda nbytes, pinned: made.append(nbytes))
    with torch.no_grad(), keep_on_host(CPU):
        Layers().eval()(inputs())
    assert made == []


class Watched(torch.autograd.Function):
    """Doubles; says which saved tensors are on the device when its backward runs."""

    packed: ClassVar[list[Saved]] = []
    seen: ClassVar[list[list[int]]] = []

    @staticmethod
    def forward(context: Any, value: Tensor) -> Tensor:
        context.save_for_backward(value.clone())
        return value * 2

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        assert context.saved_tensors[0] is not None
        Watched.seen.append([number for number, saved in enumerate(Watched.packed) if saved.here is not None])
        return gradient * 2


def test_few_are_on_the_device_and_the_next_are_there_first(monkeypatch: pytest.MonkeyPatch) -> None:
    Watched.packed, Watched.seen = [], []
    pack, during = Offload.pack, []

    def watch(pass_: Offload, tensor: Tensor) -> Any:
        packed = pack(pass_, tensor)
        Watched.packed.append(packed)  # type: ignore[arg-type]
        during.append(sum(saved.here is not None for saved in Watched.packed))
        return packed

    monkeypatch.setattr(Offload, "pack", watch)
    value = torch.ones(3, requires_grad=True)
    with keep_on_host(CPU):
        output = value
        for _ in range(20):
            output = Watched.apply(output)
    output.sum().backward()
    assert max(during) == offload.LEAVING
    for number, there in zip(reversed(range(20)), Watched.seen, strict=True):
        assert there == list(range(max(number - offload.COMING, 0), number))


def test_a_change_in_place_is_autograds_error() -> None:
    """As long as the copy may be under way: what it has of the change is not known."""
    value = torch.ones(3, requires_grad=True)
    for context, words in ((keep_on_host(CPU), "in place"), (nullcontext(), "inplace operation")):
        with context:
            saved = value * 1
            output = saved.square()
            saved.add_(1)
            for _ in range(offload.LEAVING):
                output = output * output.detach()
        with pytest.raises(RuntimeError, match=words):
            output.sum().backward()


class Failing(torch.autograd.Function):
    """Fails once in its backward."""

    failed = False

    @staticmethod
    def forward(context: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        if not Failing.failed:
            Failing.failed = True
            raise ValueError("half way")
        return gradient


def test_after_an_error_half_way_gradients_are_those_without() -> None:
    Failing.failed, model, hidden = False, Layers(), inputs()
    handle = model.layers[2].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), keep_on_host(CPU):
        model(hidden)
    handle.remove()
    model.layers[1].register_forward_hook(lambda module, given, output: Failing.apply(output))
    with keep_on_host(CPU):
        loss = model(hidden).sum()
    with pytest.raises(ValueError, match="half way"):
        loss.backward(retain_graph=True)
    model.zero_grad()
    loss.backward()
    assert all(map(torch.equal, gradients(model, hidden), train(Layers(), nullcontext())))
