"""Runs Triton-compiled NVIDIA kernels on a CPU, from their PTX, with checks. See ../README.md."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from .module import Module, Options, PtxSimError, library, track_torch

__all__ = ["Module", "Options", "PtxSimError", "library", "serve", "track_torch"]


def serve(capability: int = 90, **options: Any) -> AbstractContextManager[None]:
    """Triton's kernels run in the emulator; see driver.serve. Triton is first imported here."""
    from . import driver

    return driver.serve(capability, **options)
