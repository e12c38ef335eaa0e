"""Triton kernels: one file per kernel (jit function on top, launcher below), shared jit helpers in their own files."""
