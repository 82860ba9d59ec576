"""What the tests run of CUDA's libraries in child processes on virtual GPUs. Importing this imports no torch."""

from __future__ import annotations

import itertools
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


def count_convolutions() -> dict[str, int]:
    """Estimated convolutions of two forward and backward passes, by kind of layer."""
    import torch
    from torch import nn

    from bigvivit.forecast import virtual_gpu

    layers = {
        "patch": (nn.Conv2d(3, 8, 4, 4), (2, 3, 16, 16)),
        "tubelet": (nn.Conv3d(3, 8, (2, 4, 4), (2, 4, 4)), (2, 3, 4, 16, 16)),
        "pointwise": (nn.Conv1d(3, 8, 1), (2, 3, 16)),
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


def count_estimates() -> dict[str, int]:
    """Of this process so far."""
    from bigvivit.forecast import virtual_gpu

    return virtual_gpu.estimates()
