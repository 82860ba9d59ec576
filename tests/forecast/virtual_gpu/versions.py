"""Which tests hold for which versions of PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch.torch_version import TorchVersion

takes_workspaces = pytest.mark.skipif(
    torch.__version__ >= TorchVersion("2.15"),
    reason="torch 2.15 takes a workspace of cuBLAS for each product and gives it back (pytorch/pytorch#194311)",
)
