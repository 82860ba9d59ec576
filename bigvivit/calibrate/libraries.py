"""Rows about the scratch of NVIDIA's libraries, which a virtual GPU has to estimate: cuDNN, cuFFT, cuSOLVER, cuSPARSE."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from bigvivit.calibrate.device import clear, cuda

Work = Callable[[], object]
Build = Callable[[torch.device], Work]
Kind = Iterator[tuple[str, Build]]
"""(name, what makes the work on a device)."""


def measure_library(kind: str) -> dict[str, Any]:
    """What each work of a kind asked of PyTorch's allocator while it ran: the most at a time, and every request, in
    order.

    Each runs twice and the second counts: the first also takes what a process takes once. One that fails says why.
    """
    device = cuda()
    found: dict[str, Any] = {}
    for name, build in KINDS[kind]():
        torch.manual_seed(0)
        try:
            work = build(device)
            work()
            clear()
            torch.cuda.memory._record_memory_history("all", context=None, clear_history=True)
            before = torch.cuda.memory_allocated()
            output = work()
            torch.cuda.synchronize()
            found[f"{name}_peak_bytes"] = torch.cuda.max_memory_allocated() - before
            trace = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
            found[f"{name}_asked"] = [entry["size"] for entry in trace if entry["action"] == "alloc"]
            del output
        except (RuntimeError, NotImplementedError) as error:
            found[f"{name}_failed"] = str(error).splitlines()[0]
        finally:
            torch.cuda.memory._record_memory_history(None)
    return found


CONVOLUTIONS = {
    # batch, channels in, out, side, kernel, stride, groups
    "3x3": (32, 64, 64, 56, 3, 1, 1),
    "3x3_wide": (16, 256, 512, 28, 3, 2, 1),
    "7x7": (16, 3, 64, 224, 7, 2, 1),
    "1x1": (32, 256, 1024, 14, 1, 1, 1),
    "patches": (8, 6, 768, 224, 16, 16, 1),
    "depthwise": (32, 192, 192, 56, 7, 1, 192),
}


def list_convolutions() -> Kind:
    """By element type and shape, and as cuDNN chooses when it may try."""
    for word, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        for shape, sizes in CONVOLUTIONS.items():
            yield f"{shape}_{word}", partial(convolve, dtype, sizes, False)
    for shape, sizes in CONVOLUTIONS.items():
        yield f"{shape}_fp16_chosen_by_trying", partial(convolve, torch.float16, sizes, True)
    yield "batch_norm_fp32", batch_norm


def convolve(
    dtype: torch.dtype, sizes: tuple[int, int, int, int, int, int, int], benchmark: bool, device: torch.device
) -> Work:
    """Forward and both gradients."""
    batch, channels, out, side, kernel, stride, groups = sizes
    image = torch.randn(batch, channels, side, side, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(out, channels // groups, kernel, kernel, device=device, dtype=dtype, requires_grad=True)

    def work() -> Tensor:
        torch.backends.cudnn.benchmark = benchmark
        try:
            padding = kernel // 2 if stride < kernel else 0
            output = F.conv2d(image, weight, stride=stride, padding=padding, groups=groups)
            torch.autograd.grad(output, [image, weight], torch.ones_like(output))
        finally:
            torch.backends.cudnn.benchmark = False
        return output

    return work


def batch_norm(device: torch.device) -> Work:
    """In training, forward and backward, by cuDNN."""
    norm = nn.BatchNorm2d(64, device=device)
    image = torch.randn(32, 64, 56, 56, device=device, requires_grad=True)
    return lambda: torch.autograd.grad(norm(image).sum(), image)


def list_recurrent() -> Kind:
    """Two layers of each kind."""
    for kind in (nn.LSTM, nn.GRU, nn.RNN):
        for word, dtype in (("fp32", torch.float32), ("fp16", torch.float16)):
            for name, more in {"": {}, "_both_ways": {"bidirectional": True}, "_dropout": {"dropout": 0.5}}.items():
                yield f"{kind.__name__.lower()}{name}_{word}", partial(recur, kind, dtype, more)


def recur(kind: type[nn.RNNBase], dtype: torch.dtype, more: dict[str, Any], device: torch.device) -> Work:
    """Two layers, forward and backward."""
    model = kind(128, 256, num_layers=2, device=device, dtype=dtype, **more)
    sequence = torch.randn(50, 16, 128, device=device, dtype=dtype, requires_grad=True)

    def work() -> Tensor:
        output = model(sequence)[0]
        output.sum().backward()
        model.zero_grad()
        sequence.grad = None
        return output

    return work


def on_random(function: Callable[[Tensor], Any], *shape: int, dtype: torch.dtype = torch.float32) -> Build:
    """The call on noise."""
    return lambda device: partial(function, torch.randn(*shape, device=device, dtype=dtype))


TRANSFORMS: dict[str, Build] = {
    "1d": on_random(torch.fft.fft, 64, 4096, dtype=torch.complex64),
    "1d_odd": on_random(torch.fft.fft, 64, 4099, dtype=torch.complex64),
    "1d_1000": on_random(torch.fft.fft, 64, 1000, dtype=torch.complex64),
    "2d": on_random(torch.fft.fft2, 32, 256, 256, dtype=torch.complex64),
    "2d_real": on_random(torch.fft.rfft2, 32, 224, 224),
    "1d_half": on_random(torch.fft.rfft, 64, 4096, dtype=torch.float16),
    "1d_double": on_random(torch.fft.fft, 64, 4096, dtype=torch.complex128),
    "inverse": on_random(torch.fft.irfft, 64, 2049, dtype=torch.complex64),
    "3d": on_random(torch.fft.fftn, 64, 64, 64, dtype=torch.complex64),
}


def list_solvers() -> Kind:
    """Each on small matrices, one and a batch."""
    for name, solve in SOLVERS.items():
        for side, batch in ((64, 8), (512, 1), (1024, 4)):
            yield f"{name}_{batch}_of_{side}", partial(on_matrix, solve, side, batch)


def on_matrix(solve: Callable[[Tensor], object], side: int, batch: int, device: torch.device) -> Work:
    """Of positive definite matrices, one or a batch."""
    noise = torch.randn(batch, side, side, device=device) if batch > 1 else torch.randn(side, side, device=device)
    matrix = noise @ noise.mT + side * torch.eye(side, device=device)
    return lambda: solve(matrix)


SOLVERS: dict[str, Callable[[Tensor], object]] = {
    "cholesky": torch.linalg.cholesky,
    "inverse": torch.linalg.inv,
    "solve": lambda matrix: torch.linalg.solve(matrix, matrix),
    "lu": torch.linalg.lu_factor,
    "qr": torch.linalg.qr,
    "eigh": torch.linalg.eigh,
    "svd": torch.linalg.svd,
    "lstsq": lambda matrix: torch.linalg.lstsq(matrix, matrix).solution,
    "determinant": torch.linalg.slogdet,
    "triangular": lambda matrix: torch.linalg.solve_triangular(matrix, matrix, upper=True),
}


def sparse_matrix(device: torch.device, layout: str) -> Tensor:
    """A thousandth of the entries of 4096 x 4096."""
    places = torch.randint(0, 4096, (2, 16384), device=device)
    coo = torch.sparse_coo_tensor(places, torch.randn(16384, device=device), (4096, 4096)).coalesce()
    return coo if layout == "coo" else coo.to_sparse_csr()


def list_sparse() -> Kind:
    """In both layouts."""
    for layout in ("coo", "csr"):
        yield f"{layout}_dense", partial(multiply, layout, 128)
        yield f"{layout}_vector", partial(multiply, layout, 1)


def multiply(layout: str, columns: int, device: torch.device) -> Work:
    """A sparse matrix times a dense one, or a vector."""
    matrix, dense = sparse_matrix(device, layout), torch.randn(4096, columns, device=device)
    return lambda: matrix @ (dense if columns > 1 else dense[:, 0])


def list_others() -> Kind:
    """What PyTorch's own kernels and CUB take."""
    yield "sort", on_random(torch.sort, 1 << 20)
    yield "cumsum", on_random(partial(torch.cumsum, dim=0), 1 << 20)
    yield "topk", on_random(partial(torch.topk, k=8), 64, 1 << 16)
    yield "unique", on_random(lambda noise: torch.unique((100 * noise).long()), 1 << 20)
    yield "index_put", index_put
    yield "embedding_backward", embed


def ctc(device: torch.device) -> Work:
    """Forward and backward, of lengths for which PyTorch takes cuDNN's."""
    scores = torch.randn(50, 16, 20, device=device, requires_grad=True)
    targets = torch.randint(1, 20, (16 * 30,), dtype=torch.int32)
    lengths, target_lengths = torch.full((16,), 50, dtype=torch.int32), torch.full((16,), 30, dtype=torch.int32)

    def work() -> Tensor:
        loss = F.ctc_loss(scores.log_softmax(2), targets, lengths, target_lengths)
        return torch.autograd.grad(loss, scores)[0]

    return work


def index_put(device: torch.device) -> Work:
    """Added at places that repeat."""
    table, places = torch.zeros(4096, 256, device=device), torch.randint(0, 4096, (1 << 16,), device=device)
    values = torch.randn(1 << 16, 256, device=device)
    return lambda: table.index_put_((places,), values, accumulate=True)


def embed(device: torch.device) -> Work:
    """The gradient of a table."""
    table = torch.randn(32000, 256, device=device, requires_grad=True)
    places = torch.randint(0, 32000, (16, 512), device=device)
    return lambda: torch.autograd.grad(F.embedding(places, table).sum(), table)


KINDS: dict[str, Callable[[], Kind]] = {
    "convolutions": list_convolutions,
    "recurrent networks": list_recurrent,
    "Fourier transforms": lambda: iter(TRANSFORMS.items()),
    "dense solvers": list_solvers,
    "sparse products": list_sparse,
    "sorting and scattering": list_others,
    "CTC loss": lambda: iter([("ctc_loss", ctc)]),
}
"""Each in a row of its own: what a virtual GPU has no answer to ends its process."""
