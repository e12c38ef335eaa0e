"""Which backend serves a device, and why another does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reflora.backends import triton_backend

CPU, GPU = torch.device("cpu"), torch.device("cuda")
# a GPU as far as torch and Triton can be told, on a machine without a compiler
WITHOUT_COMPILER = """
import torch
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda device=None: (9, 0)
from triton.backends.nvidia.driver import CudaDriver
CudaDriver.is_active = staticmethod(lambda: True)
from reflora.backends import resolve
gpu = torch.device("cuda")
print(resolve(None, gpu).NAME)
try:
    resolve("triton", gpu)
except RuntimeError as error:
    print(error)
"""


def test_unavailable_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_backend.unavailable(CPU) is None
    assert "on the CPU" in str(triton_backend.unavailable(GPU))
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "CUDA device" in str(triton_backend.unavailable(CPU))
    monkeypatch.setattr(triton_backend, "_installed", lambda: False)
    assert "not installed" in str(triton_backend.unavailable(GPU))


def test_a_triton_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert triton_backend._version() >= (3, 6)
    monkeypatch.setattr(triton_backend, "_version", lambda: (3, 5))
    assert "Triton 3.6 or later" in str(triton_backend.unavailable(CPU))


@pytest.mark.parametrize("compiler", [None, "/bin/false"], ids=["no compiler", "no Python.h"])
def test_without_a_compiler_triton_is_unavailable_and_says_so(compiler: str | None, tmp_path: Path) -> None:
    """It would fail at the first launch, in the middle of a step."""
    pytest.importorskip("triton")
    unset = ("CC", "TRITON_INTERPRET")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment.update(PATH="/nowhere", TRITON_CACHE_DIR=str(tmp_path), TRITON_LIBCUDA_PATH=str(tmp_path))
    if compiler:
        environment["CC"] = compiler
    command = [sys.executable, "-c", WITHOUT_COMPILER]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    chosen, message = done.stdout.splitlines()
    assert chosen == "torch"
    assert "which takes a C compiler and Python.h" in message and len(message) < 300
