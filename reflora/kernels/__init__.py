"""Triton kernels: one file a kernel (jit function on top, launcher below), shared jit helpers in their own files."""
