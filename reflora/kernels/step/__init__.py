"""Kernels over the rows of pairs: the step, preconditioning, refactoring."""
