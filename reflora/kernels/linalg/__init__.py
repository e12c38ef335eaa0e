"""Kernels over batches of matrices."""
