"""Which tests hold for which versions of PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch.torch_version import TorchVersion

takes_workspaces = pytest.mark.skipif(
    torch.__version__ >= TorchVersion("2.15"),
    reason="torch 2.15 asks its allocator for no workspace of cuBLAS here; what it does instead is not known yet",
)
