"""RefLoRA's kernels on CPU tensors."""

from __future__ import annotations


def serve_reflora() -> bool:
    """RefLoRA's triton backend takes CPU tensors; False where there is no reflora."""
    try:
        from reflora.backends import triton_backend
    except ImportError:
        return False
    triton_backend.unavailable = lambda device: None if device.type == "cpu" else "the emulator serves CPU tensors"
    return True
