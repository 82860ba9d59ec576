"""What the tests run of CUDA's libraries in child processes on virtual GPUs. Importing this imports no torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any


def train_recurrent(kind: str, packed: bool, options: dict[str, Any]) -> dict[str, Any]:
    """Two training steps in bf16 autocast of a recurrent network: where its weights lie, and the shapes of results."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    model = getattr(nn, kind)(24, 32, batch_first=True, **options)
    sizes = {name: parameter.shape for name, parameter in model.named_parameters()}
    model.cuda()
    inputs: Any = torch.randn(4, 7, 24, device="cuda", requires_grad=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        given = inputs
        if packed:
            given = nn.utils.rnn.pack_padded_sequence(inputs, torch.tensor([7, 5, 2, 1]), batch_first=True)
        with torch.autocast("cuda", torch.bfloat16):
            output, state = model(given)
        (output.data if packed else output).float().sum().backward()
        optimizer.step()
    with torch.no_grad():
        model.eval()(given)
    storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    places = sorted((p.data_ptr(), p.data_ptr() + p.nbytes) for p in model.parameters())
    return {
        "storages": len(storages),
        "bytes": next(model.parameters()).untyped_storage().nbytes(),
        "apart": all(end <= start for (_, end), (start, _) in itertools.pairwise(places)),
        "parameters": sum(p.nbytes for p in model.parameters()),
        "same shapes": sizes == {name: parameter.shape for name, parameter in model.named_parameters()},
        "gradients": all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters()),
        "input gradient": tuple(inputs.grad.shape),
        "output": tuple((output.data if packed else output).shape),
        "state": tuple((state[0] if kind == "LSTM" else state).shape),
    }


def recurrent_spaces(kind: str, layers: int, dropout: float) -> tuple[int, int]:
    """(bytes that a forward pass keeps beside its results, its scratch): 250 steps of 100 sequences in fp32."""
    import torch

    model = getattr(torch.nn, kind)(123, 320, layers, dropout=dropout).cuda()
    inputs = torch.randn(250, 100, 123, device="cuda")
    model(inputs[:1])  # makes the states of the dropout
    state = torch.zeros(layers, 100, 320, device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    torch.cuda.reset_peak_memory_stats()
    output, _ = model(inputs, (state, state) if kind == "LSTM" else state)
    stats = torch.cuda.memory_stats()
    results = output.nbytes + (2 if kind == "LSTM" else 1) * state.nbytes
    kept = stats["requested_bytes.all.current"] - before - results
    return kept, stats["requested_bytes.all.peak"] - stats["requested_bytes.all.current"]


def coalesce() -> tuple[int, int]:
    """Elements of a coalesced matrix of 3, and of the gradient of an embedding that was looked up 200 times."""
    import torch

    places = torch.tensor([[0, 1, 1], [2, 0, 2]]).cuda()
    matrix = torch.sparse_coo_tensor(places, torch.ones(3, device="cuda"), (3, 3))
    table = torch.nn.Embedding(100, 8, sparse=True).cuda()
    table(torch.randint(100, (200,), device="cuda")).sum().backward()
    gradient: Any = table.weight.grad
    return matrix.coalesce()._nnz(), gradient.coalesce()._nnz()


def sample() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of images sampled by a grid, and of the gradient of what made the grid."""
    import torch
    from torch.nn import functional

    motion = torch.zeros(2, 2, 3, device="cuda", requires_grad=True)
    images = torch.randn(2, 3, 8, 8, device="cuda", requires_grad=True)
    grid = functional.affine_grid(motion, [2, 3, 4, 5], align_corners=True)
    sampled = functional.grid_sample(images, grid, align_corners=True)
    sampled.sum().backward()
    assert images.grad is not None
    assert motion.grad is not None
    return tuple(sampled.shape), tuple(motion.grad.shape)


def count_convolutions(*, tf32: bool) -> dict[str, int]:
    """Estimated convolutions of two forward and backward passes in fp32, by kind of layer."""
    import torch
    from torch import nn

    from bigvivit.forecast import virtual_gpu

    torch.backends.cudnn.allow_tf32 = tf32
    layers = {
        "patch16": (nn.Conv2d(8, 16, 8, 8), (2, 8, 16, 16)),
        "patch": (nn.Conv2d(3, 8, 4, 4), (2, 3, 16, 16)),
        "tubelet": (nn.Conv3d(3, 8, (2, 4, 4), (2, 4, 4)), (2, 3, 4, 16, 16)),
        "pointwise": (nn.Conv1d(8, 8, 1), (2, 8, 16)),
        "overlapping": (nn.Conv2d(3, 8, 4, 2), (2, 3, 16, 16)),
        "padded": (nn.Conv2d(3, 8, 4, 4, padding=2), (2, 3, 16, 16)),
        "dilated": (nn.Conv2d(3, 8, 2, 2, dilation=2), (2, 3, 16, 16)),
        "transposed": (nn.ConvTranspose2d(3, 8, 4, 2), (2, 3, 16, 16)),
    }
    counted = {}
    for name, (layer, shape) in layers.items():
        images = torch.randn(shape, device="cuda", requires_grad=True)
        before = virtual_gpu.estimates()["convolutions"]
        for _ in range(2):
            layer.cuda()(images).sum().backward()
        counted[name] = virtual_gpu.estimates()["convolutions"] - before
    return counted


def lose_ctc(on_device: bool) -> dict[str, Any]:
    """A connectionist loss of 50 steps of four sequences, with labels of at most seven: its gradient and scratch."""
    import torch

    scores = torch.zeros(50, 4, 20, device="cuda", requires_grad=True)
    place = "cuda" if on_device else "cpu"
    labels = torch.ones(4 * 7, dtype=torch.int32, device=place)
    steps = torch.full((4,), 50, dtype=torch.int32, device=place)
    lengths = torch.full((4,), 7, dtype=torch.int32, device=place)
    logs = scores.log_softmax(2)
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    torch.cuda.reset_peak_memory_stats()
    loss = torch.nn.functional.ctc_loss(logs, labels, steps, lengths, reduction="sum")
    scratch = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    loss.backward()
    assert scores.grad is not None
    return {"loss": tuple(loss.shape), "gradient": tuple(scores.grad.shape), "scratch": scratch}


def count_estimates() -> dict[str, int]:
    """Of this process so far."""
    from bigvivit.forecast import virtual_gpu

    return virtual_gpu.estimates()


def transform() -> dict[str, Any]:
    """Shapes and dtypes of Fourier transforms, forward and backward, and the scratch of one of 64 x 1000."""
    import torch

    signal = torch.randn(64, 1000, device="cuda", requires_grad=True)
    spectrum = torch.fft.rfft(signal)
    back = torch.fft.irfft(spectrum, n=1000)
    back.sum().backward()
    images = torch.fft.fft2(torch.randn(2, 3, 16, 16, device="cuda", dtype=torch.float64))
    short = torch.stft(torch.randn(4, 4096, device="cuda"), 256, return_complex=True)
    complex_signal = torch.randn(64, 1000, device="cuda", dtype=torch.complex64)
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    torch.cuda.reset_peak_memory_stats()
    result = torch.fft.fft(complex_signal)
    scratch = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before - result.nbytes
    return {
        "spectrum": (tuple(spectrum.shape), str(spectrum.dtype)),
        "back": tuple(back.shape),
        "gradient": tuple(signal.grad.shape),
        "images": (tuple(images.shape), str(images.dtype)),
        "short": tuple(short.shape),
        "scratch": scratch,
    }


def factorise(matrix: Any, right: Any) -> dict[str, Callable[[], Any]]:
    """Functions of torch.linalg, of one matrix or a batch."""
    import torch

    linalg = torch.linalg
    return {
        "cholesky": lambda: linalg.cholesky(matrix),
        "cholesky_solve": lambda: torch.cholesky_solve(right, matrix),
        "cholesky_inverse": lambda: torch.cholesky_inverse(matrix),
        "qr": lambda: linalg.qr(matrix).Q,
        "svd": lambda: linalg.svd(matrix, full_matrices=False).U,
        "svdvals": lambda: linalg.svdvals(matrix),
        "eigh": lambda: linalg.eigh(matrix).eigenvectors,
        "eigvals": lambda: linalg.eigvals(matrix.detach()),
        "solve": lambda: linalg.solve(matrix, right),
        "inv": lambda: linalg.inv(matrix),
        "lstsq": lambda: linalg.lstsq(matrix, right).solution,
        "pinv": lambda: linalg.pinv(matrix),
        "slogdet": lambda: linalg.slogdet(matrix).logabsdet,
        "matrix_norm": lambda: linalg.matrix_norm(matrix, 2),
        "solve_triangular": lambda: linalg.solve_triangular(matrix, right, upper=True),
        "lu": lambda: linalg.lu(matrix).U,
        "ldl": lambda: linalg.ldl_factor(matrix.detach()).LD,
    }


def solve(dtype: str) -> dict[str, list[tuple[int, ...]]]:
    """Shapes of what torch.linalg gives for one matrix of 300 and for a batch of small ones; gradients come back where
    there are any. Nothing is computed, so no check of a matrix fails."""
    import torch

    shapes: dict[str, list[tuple[int, ...]]] = {}
    for size, batch in ((300, ()), (8, (5,))):
        matrix = torch.randn(*batch, size, size, device="cuda", dtype=getattr(torch, dtype), requires_grad=True)
        right = torch.randn(*batch, size, 3, device="cuda", dtype=matrix.dtype)
        for name, call in factorise(matrix, right).items():
            result = call()
            if result.requires_grad:
                (result.real if result.is_complex() else result).sum().backward()
                assert matrix.grad is not None
                assert matrix.grad.shape == matrix.shape
                matrix.grad = None
            shapes.setdefault(name, []).append(tuple(result.shape))
    return shapes


def multiply_sparse(layout: str) -> dict[str, tuple[int, ...]]:
    """Shapes of products of a sparse matrix of 6 x 5 with 7 elements, made on the host."""
    import torch

    dense = torch.zeros(6, 5)
    dense.view(-1)[::4][:7] = 1.0
    convert = "to_sparse" if layout == "coo" else f"to_sparse_{layout}"
    sparse, other = (getattr(each, convert)().cuda() for each in (dense, dense.flip(0)))
    wide, vector = torch.randn(5, 4, device="cuda"), torch.randn(5, device="cuda")
    result = {"matrix": tuple((sparse @ wide).shape), "vector": tuple((sparse @ vector).shape)}
    if layout == "coo":
        weight = torch.randn(5, 4, device="cuda", requires_grad=True)
        torch.sparse.mm(sparse, weight).sum().backward()
        result["gradient"] = tuple(weight.grad.shape)
    total = sparse + other
    result["sum"] = (*total.shape, total._nnz())
    if layout == "coo":
        square = sparse @ sparse.transpose(0, 1)
    else:
        square = sparse @ dense.t().to_sparse_csr().cuda()
        right = torch.randn(6, 4, device="cuda")
        result["solution"] = tuple(torch.triangular_solve(right, square, upper=True).solution.shape)
        result["sampled"] = tuple(torch.sparse.sampled_addmm(sparse, right, right[:5].T.contiguous()).shape)
    result["square"] = tuple(square.shape)
    return result


def scratch_of_convolutions(rows: list[list[Any]]) -> list[int]:
    """Of calls as bench/results/library_scratch_*.json lists them, in bytes that were asked for."""
    import torch

    torch.backends.cudnn.allow_tf32 = True

    def make(shape: list[int], layout: str, dtype: str) -> Any:
        tensor = torch.empty(shape, device="cuda", dtype=getattr(torch, dtype))
        return tensor.to(memory_format=torch.channels_last) if layout == "last" and len(shape) == 4 else tensor

    found = []
    for _, kind, dtype, *shapes, layouts, stride, padding, dilation, groups, _ in rows:
        image, weight, output = (make(shape, layout, dtype) for shape, layout in zip(shapes, layouts, strict=True))
        how = (stride, padding, dilation, False, [0] * len(stride), groups)
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        torch.cuda.reset_peak_memory_stats()
        if kind == "forward":
            result = torch.ops.aten.convolution(image, weight, None, *how)
        else:
            wanted = [kind == "image gradient", kind == "weight gradient", False]
            result = torch.ops.aten.convolution_backward(output, image, weight, None, *how, wanted)
        after = torch.cuda.memory_stats()
        found.append(after["requested_bytes.all.peak"] - after["requested_bytes.all.current"])
        assert after["requested_bytes.all.current"] > before
        del result
    return found


def convolve_at_the_limit(dtype: str) -> tuple[int, int]:
    """What a convolution asks for beside its output, with room for its workspace and without."""
    import torch

    torch.cuda.empty_cache()
    image = torch.empty(16, 64, 64, 64, device="cuda", dtype=getattr(torch, dtype))
    weight = torch.empty(64, 64, 3, 3, device="cuda", dtype=image.dtype)
    found = []
    for room in (1 << 30, image.nbytes + (4 << 20)):
        held = torch.empty(torch.cuda.mem_get_info()[0] - room, dtype=torch.uint8, device="cuda")
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        output = torch.nn.functional.conv2d(image, weight, padding=1)
        found.append(torch.cuda.max_memory_allocated() - before - output.nbytes)
        del output, held
        torch.cuda.empty_cache()
    return found[0], found[1]


def convolve_to_nothing() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The output of a transposed convolution without output channels, and the gradient of its input."""
    import torch

    images = torch.ones(2, 8, 16, 16, device="cuda", dtype=torch.float16, requires_grad=True)
    weight = torch.empty(8, 0, 3, 3, device="cuda", dtype=torch.float16, requires_grad=True)
    output = torch.nn.functional.conv_transpose2d(images, weight, padding=1)
    output.sum().backward()
    assert images.grad is not None
    return tuple(output.shape), tuple(images.grad.shape)


def requests_of_recurrent(name: str) -> list[int]:
    """Every request of one call of a network of bench/results/library_scratch_*.json, forward and backward."""
    import torch

    kind, *options, word = name.split("_")
    more: dict[str, Any] = {"bidirectional": "both" in options, "dropout": 0.5 if "dropout" in options else 0.0}
    dtype = {"fp32": torch.float32, "fp16": torch.float16}[word]
    model = getattr(torch.nn, kind.upper())(128, 256, num_layers=2, device="cuda", dtype=dtype, **more)
    sequence = torch.randn(50, 16, 128, device="cuda", dtype=dtype, requires_grad=True)

    def work() -> None:
        model(sequence)[0].sum().backward()
        model.zero_grad()
        sequence.grad = None

    return record_requests(work)


def requests_of_transform(name: str) -> list[int]:
    """Every request of one call of a transform of the same file."""
    import torch

    complex64, float32 = torch.complex64, torch.float32
    function, shape, dtype = {
        "1d": (torch.fft.fft, (64, 4096), complex64),
        "1d_odd": (torch.fft.fft, (64, 4099), complex64),
        "1d_1000": (torch.fft.fft, (64, 1000), complex64),
        "2d": (torch.fft.fft2, (32, 256, 256), complex64),
        "2d_real": (torch.fft.rfft2, (32, 224, 224), float32),
        "1d_half": (torch.fft.rfft, (64, 4096), torch.float16),
        "1d_double": (torch.fft.fft, (64, 4096), torch.complex128),
        "inverse": (torch.fft.irfft, (64, 2049), complex64),
        "3d": (torch.fft.fftn, (64, 64, 64), complex64),
    }[name]
    values = torch.randn(shape, device="cuda", dtype=dtype)
    return record_requests(lambda: function(values))


def record_requests(work: Callable[[], object]) -> list[int]:
    """Of the second call: the first also takes what a process takes once."""
    import torch

    work()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.memory._record_memory_history("all", context=None, clear_history=True)
    work()
    trace = torch.cuda.memory._snapshot()["device_traces"][0]
    torch.cuda.memory._record_memory_history(None)
    return [entry["size"] for entry in trace if entry["action"] == "alloc"]
