"""Triton's own interpreter, in which a kernel can be stepped through with a debugger: TRITON_INTERPRET=1."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import torch
from reflora import LoRAPair, RefLoRAAdamW, linalg
ends = []
for backend in ("triton", "torch"):
    torch.manual_seed(0)
    pair = LoRAPair("", torch.randn(4, 30).requires_grad_(), torch.randn(20, 4).requires_grad_())
    optimizer = RefLoRAAdamW([pair], lr=1e-2, warmup_steps=0, backend=backend)
    for _ in range(2):
        pair.A.grad, pair.B.grad = torch.randn(4, 30), torch.randn(20, 4)
        optimizer.step()
    assert optimizer.backends == {"cpu": backend} and optimizer.diagnostics().refactored == 1
    X = torch.randn(2, 4, 4)
    ends.append([pair.A.detach(), pair.B.detach(), linalg.eigh(X + X.mT, backend=backend).eigenvalues])
for ours, theirs in zip(*ends):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
"""


def test_a_step_and_a_decomposition() -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
