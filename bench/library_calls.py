"""The calls of `bench.library_scratch`: (what is called, as a string; what prepares it and gives the call)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
import torchvision
from torch import Tensor, nn

Work = Callable[[], Any]
Call = tuple[str, Callable[[], Work]]
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NETWORKS = ("resnet50", "efficientnet_b0", "convnext_tiny", "vgg16", "densenet121", "mobilenet_v3_large")
"""Of torchvision, whose convolutions are asked for."""


def list_convolutions(device: torch.device) -> Iterator[Call]:
    """Forward and both gradients, by element type and layout."""
    shapes = list(find_shapes())
    for word, layout in itertools.product(("tf32", "bf16", "fp16", "fp32"), ("rows", "channels last")):
        # PyTorch's default for convolutions; this project's runs have it off
        torch.backends.cudnn.conv.fp32_precision = "tf32" if word == "tf32" else "ieee"  # type: ignore[attr-defined]
        for image, weight, stride, padding, dilation, groups in shapes:
            if word == "fp32" and layout != "rows":
                continue
            for mode in ("forward", "data", "weight"):
                what = f"{mode} {word} {layout} {image} {weight} {stride} {padding} {dilation} {groups}"
                yield (
                    what,
                    partial(
                        convolve, device, DTYPES[word], layout, mode, image, weight, (stride, padding, dilation, groups)
                    ),
                )
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]


def find_shapes() -> Iterator[tuple[list[int], list[int], list[int], list[int], list[int], int]]:
    """(image, weight, stride, padding, dilation, groups), each once: of public networks, and of what they lack."""
    seen = set()
    for shape in itertools.chain(patches(), unets(), generators(), one_and_three(), shapes_of_networks()):
        if str(shape) not in seen:
            seen.add(str(shape))
            yield shape


def shapes_of_networks() -> Iterator[Any]:
    """Caught on the meta device."""
    for name, batch in itertools.product(NETWORKS, (16, 3)):
        caught: list[Any] = []

        def catch(module: Any, inputs: Any, to: list[Any] = caught) -> None:
            to.append(
                (list(inputs[0].shape), list(module.weight.shape), list(module.stride), list(module.padding),
                 list(module.dilation), module.groups)
            )  # fmt: skip

        with torch.device("meta"):
            network = getattr(torchvision.models, name)(weights=None).eval()
            for module in network.modules():
                if isinstance(module, nn.Conv2d):
                    module.register_forward_pre_hook(catch)
            network(torch.empty(batch, 3, 224, 224))
        yield from caught


def patches() -> Iterator[Any]:
    """Of vision transformers: windows side by side; of this project's, two frames deep."""
    for batch, channels, side, width in itertools.product((2, 8, 32), (3, 6), (14, 16, 32), (384, 768, 1408)):
        yield [batch, channels, 224, 224], [width, channels, side, side], [side, side], [0, 0], [1, 1], 1


def unets() -> Iterator[Any]:
    """3 x 3 at each resolution of diffusion models and of segmentation."""
    for batch, channels, out, side in itertools.product((1, 4, 16), (64, 320, 512), (64, 320), (64, 32, 16)):
        yield [batch, channels, side, side], [out, channels, 3, 3], [1, 1], [1, 1], [1, 1], 1
        yield [batch, channels, side, side], [out, channels, 3, 3], [2, 2], [1, 1], [1, 1], 1


def generators() -> Iterator[Any]:
    """4 x 4, stride 2, whose gradients are transposed convolutions; dilated; grouped."""
    for channels, out, side in ((3, 64, 64), (64, 128, 32), (128, 256, 16), (256, 512, 8)):
        yield [64, channels, side, side], [out, channels, 4, 4], [2, 2], [1, 1], [1, 1], 1
    for dilation in (2, 4):
        yield [8, 256, 28, 28], [256, 256, 3, 3], [1, 1], [dilation, dilation], [dilation, dilation], 1
    for groups in (2, 32):
        yield [8, 256, 28, 28], [256, 256 // groups, 3, 3], [1, 1], [1, 1], [1, 1], groups


def one_and_three() -> Iterator[Any]:
    """Of sound, and of video."""
    for channels, kernel, stride in ((512, 3, 2), (512, 2, 2), (80, 3, 1), (1, 10, 5)):
        yield [8, channels, 4000], [512, channels, kernel], [stride], [kernel // 2], [1], 1
    for channels, out, stride in ((3, 64, 2), (64, 64, 1), (64, 128, 2)):
        yield [2, channels, 8, 56, 56], [out, channels, 3, 3, 3], [1, stride, stride], [1, 1, 1], [1, 1, 1], 1


def convolve(
    device: torch.device, dtype: torch.dtype, layout: str, mode: str, image: list[int], weight: list[int], how: Any
) -> Work:
    """One call; the gradients of each by itself."""
    stride, padding, dilation, groups = how
    x, w = (torch.randn(shape, device=device, dtype=dtype) for shape in (image, weight))
    if layout == "channels last" and x.dim() == 4:
        x, w = (each.contiguous(memory_format=torch.channels_last) for each in (x, w))
    rest = (stride, padding, dilation, False, [0] * len(stride), groups)
    if mode == "forward":
        return lambda: torch.ops.aten.convolution(x, w, None, *rest)
    dy = torch.randn_like(torch.ops.aten.convolution(x, w, None, *rest))
    wanted = [mode == "data", mode == "weight", False]
    return lambda: torch.ops.aten.convolution_backward(dy, x, w, None, *rest, wanted)


def list_recurrent(device: torch.device) -> Iterator[Call]:
    """Workspace and what is kept for the backward pass, by every size that may matter."""
    base = {
        "steps": 50,
        "batch": 16,
        "input": 128,
        "hidden": 256,
        "layers": 2,
        "both": False,
        "dropout": 0.0,
        "projection": 0,
    }
    others: dict[str, tuple[Any, ...]] = {
        "steps": (1, 10, 100, 200), "batch": (1, 8, 32, 64, 100), "input": (64, 200, 512),
        "hidden": (64, 128, 320, 512, 1000, 1024), "layers": (1, 3, 4), "both": (True,), "dropout": (0.5,),
        "projection": (64,),
    }  # fmt: skip
    changes: list[dict[str, Any]] = [{}]
    changes += [{name: value} for name, values in others.items() for value in values]
    changes += [{**change, "both": True} for change in changes if "both" not in change]
    changes += [{**change, "layers": 1} for change in changes if "layers" not in change]
    for kind, word in itertools.product(("LSTM", "GRU", "RNN"), ("fp32", "fp16")):
        for change in changes:
            sizes = {**base, **change}
            if (sizes["projection"] and kind != "LSTM") or (sizes["dropout"] and sizes["layers"] == 1):
                continue
            for training in (True, False):
                what = f"{kind} {word} {'training' if training else 'inference'} {list(sizes.values())}"
                yield what, partial(recur, device, kind, DTYPES[word], training, **sizes)


def recur(
    device: torch.device, kind: str, dtype: torch.dtype, training: bool, steps: int, batch: int, input: int,
    hidden: int, layers: int, both: bool, dropout: float, projection: int,
) -> Work:  # fmt: skip
    """The forward call: its workspace is scratch, and what it keeps is counted too."""
    more: dict[str, Any] = {"proj_size": projection} if kind == "LSTM" else {}
    model = getattr(nn, kind)(
        input, hidden, layers, bidirectional=both, dropout=dropout, device=device, dtype=dtype, **more
    ).train(training)
    sequence = torch.randn(steps, batch, input, device=device, dtype=dtype, requires_grad=training)
    model(sequence)  # the generator's states of a dropout are made once
    if training:
        return lambda: model(sequence)

    def work() -> Any:
        with torch.no_grad():
            return model(sequence)

    return work


def list_attention(device: torch.device) -> Iterator[Call]:
    """cuDNN's, forward and backward."""
    sizes = itertools.product((2, 8), (4, 12), (64, 128, 197, 1024), (32, 64, 88, 128), (False, True))
    for word, (batch, heads, tokens, width, causal) in itertools.product(("bf16", "fp16"), sizes):
        for mode in ("forward", "backward"):
            what = f"{mode} {word} {[batch, heads, tokens, width]} {'causal' if causal else 'full'}"
            yield what, partial(attend, device, DTYPES[word], mode, (batch, heads, tokens, width), causal)


def attend(device: torch.device, dtype: torch.dtype, mode: str, shape: tuple[int, ...], causal: bool) -> Work:
    """One call."""
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))

    def forward() -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    if mode == "forward":
        return forward
    output = forward()
    gradient = torch.ones_like(output)
    return lambda: torch.autograd.grad(output, (q, k, v), gradient)


def list_transforms(device: torch.device) -> Iterator[Call]:
    """By length, element type and number of dimensions; real ones too."""
    lengths = [*(1 << power for power in range(1, 24, 2)), 3, 5, 7, 11, 13, 30, 100, 210, 400, 1000, 1001, 1155]
    lengths += [17, 31, 61, 67, 97, 101, 127, 131, 257, 509, 1009, 2047, 4099, 8191, 9973, 65537, 48000, 100003]
    for length, batch, word in itertools.product(lengths, (1, 16, 64), ("complex64", "complex128")):
        if length * batch <= 1 << 24:
            dtype = getattr(torch, word)
            yield f"fft {word} {[batch, length]}", partial(transform, device, torch.fft.fft, dtype, (batch, length))
    for length, batch in itertools.product(lengths, (1, 16, 64)):
        if 2 < length * batch <= 1 << 24:
            yield (
                f"rfft float32 {[batch, length]}",
                partial(transform, device, torch.fft.rfft, torch.float32, (batch, length)),
            )
            yield (
                f"irfft complex64 {[batch, length]}",
                partial(transform, device, torch.fft.irfft, torch.complex64, (batch, length)),
            )
    for side, batch in itertools.product((32, 100, 128, 224, 256, 509, 512, 1024, 2048), (1, 8)):
        for name, dtype in (("fft2", torch.complex64), ("rfft2", torch.float32), ("irfft2", torch.complex64)):
            function = getattr(torch.fft, name)
            yield f"{name} {[batch, side, side]}", partial(transform, device, function, dtype, (batch, side, side))
    for side in (16, 64, 101, 128):
        yield f"fftn {[side, side, side]}", partial(transform, device, torch.fft.fftn, torch.complex64, (side,) * 3)


def transform(
    device: torch.device, function: Callable[[Tensor], Tensor], dtype: torch.dtype, shape: tuple[int, ...]
) -> Work:
    """The second call of its kind: the first makes the plan."""
    values = torch.randn(shape, device=device, dtype=dtype)
    function(values)
    return lambda: function(values)


def list_solvers(device: torch.device) -> Iterator[Call]:
    """One matrix, and batches."""
    sizes = itertools.product((8, 32, 33, 64, 128, 256, 500, 512, 1024, 2048), (1, 2, 16))
    for (side, batch), word in itertools.product(sizes, ("float32", "float64")):
        for name in SOLVERS:
            if side * batch <= 4096 and (name not in ("svd", "eigh", "eig") or side <= 512):
                what = f"{name} {word} {[batch, side, side]}"
                yield what, partial(solve, device, SOLVERS[name], getattr(torch, word), side, batch)


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
    "cholesky_solve": lambda matrix: torch.cholesky_solve(matrix, matrix),
    "matrix_exp": torch.linalg.matrix_exp,
}


def solve(
    device: torch.device, function: Callable[[Tensor], object], dtype: torch.dtype, side: int, batch: int
) -> Work:
    """Of positive definite matrices."""
    shape = (side, side) if batch == 1 else (batch, side, side)
    noise = torch.randn(shape, device=device, dtype=dtype)
    matrix = noise @ noise.mT + side * torch.eye(side, device=device, dtype=dtype)
    function(matrix)
    return lambda: function(matrix)


def list_sparse(device: torch.device) -> Iterator[Call]:
    """Products of sparse matrices with dense ones, and with vectors."""
    for layout, side, entries, columns in itertools.product(
        ("coo", "csr"), (1000, 4096), (1 << 10, 1 << 14, 1 << 17), (1, 16, 128)
    ):
        yield f"{layout} {[side, entries, columns]}", partial(multiply, device, layout, side, entries, columns)


def multiply(device: torch.device, layout: str, side: int, entries: int, columns: int) -> Work:
    """Places drawn once, the same everywhere."""
    generator = torch.Generator().manual_seed(0)
    places = torch.randperm(side * side, generator=generator)[:entries].sort().values
    both = torch.stack([places // side, places % side]).to(device)
    matrix = torch.sparse_coo_tensor(both, torch.ones(entries, device=device), (side, side), is_coalesced=True)
    if layout == "csr":
        matrix = matrix.to_sparse_csr()
    dense = torch.randn(side, columns, device=device)
    target = dense if columns > 1 else dense[:, 0]
    matrix @ target
    return lambda: matrix @ target


def list_losses(device: torch.device) -> Iterator[Call]:
    """Connectionist temporal classification, of lengths for which PyTorch takes cuDNN's."""
    for steps, batch, classes, target in ((50, 16, 20, 30), (100, 8, 40, 20), (200, 32, 30, 50), (50, 1, 20, 10)):
        yield f"ctc {[steps, batch, classes, target]}", partial(ctc, device, steps, batch, classes, target)


def ctc(device: torch.device, steps: int, batch: int, classes: int, target: int) -> Work:
    """Forward, which computes the gradient too."""
    scores = torch.randn(steps, batch, classes, device=device, requires_grad=True).log_softmax(2)
    labels = torch.randint(1, classes, (batch * target,), dtype=torch.int32)
    lengths, targets = torch.full((batch,), steps, dtype=torch.int32), torch.full((batch,), target, dtype=torch.int32)
    return lambda: F.ctc_loss(scores, labels, lengths, targets, reduction="sum")


SURVEYS: dict[str, Callable[[torch.device], Iterator[Call]]] = {
    "recurrent networks": list_recurrent,
    "Fourier transforms": list_transforms,
    "sparse products": list_sparse,
    "dense solvers": list_solvers,
    "convolutions": list_convolutions,
    "attention": list_attention,
    "losses": list_losses,
}
"""By kind, what takes long behind the others."""
