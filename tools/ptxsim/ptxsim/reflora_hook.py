"""RefLoRA's kernels on CPU tensors."""

from __future__ import annotations


def serve_reflora() -> bool:
    """RefLoRA's triton backend takes CPU tensors; False where there is no reflora."""
    try:
        from triton.runtime import driver

        from reflora.backends import triton_backend
        from reflora.kernels import options
    except ImportError:
        return False
    triton_backend.unavailable = lambda device: None if device.type == "cpu" else "the emulator serves CPU tensors"
    options.capability = lambda device: driver.active.get_current_target().arch
    return True
