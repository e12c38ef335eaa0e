"""Options of a launch, and what a device has room for."""

from __future__ import annotations

import struct

import torch
import triton.language as tl

TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


def capability(device: torch.device) -> int:
    """90 for compute capability 9.0; 0 where kernels are interpreted or compiled ahead."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    return 10 * major + minor


def shared_memory(device: torch.device) -> int | None:
    """Bytes of shared memory that a block can opt in to, None where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else None


def launch_options(warps: int, registers: int = 255) -> dict[str, int]:
    # triton 3.9 warns where fusion is left to it, and 3.10 fuses no products by itself
    options = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}
    # left to itself, ptxas spills a few bytes to raise the occupancy of programs that are one to a multiprocessor
    return {**options, "maxnreg": min(registers, 65536 // (32 * warps))}


def float64_bits(value: float) -> int:
    """For a kernel's argument: Triton passes a Python float as float32."""
    return int(struct.unpack("q", struct.pack("d", value))[0])
