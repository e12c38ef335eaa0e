"""Batched linear algebra of small matrices: eigenvalues, singular values, polar factors, roots, geometric means.

Matrices are `[..., n, n]`, any leading dimensions. n <= 128 is one launch on a GPU ("triton") and one call on a CPU
("cpp"); larger ones go through torch.linalg ("torch"; `polar`, `geometric_mean`, `sqrtm`, `invsqrtm` stay in C++ at
any n on a CPU). float32 and float64; half types are computed in float32 or more and come back as they came.

Nothing raises on the values. A matrix that is not finite, or not positive definite where it must be, gives NaN in its
own result and nowhere else; every finite symmetric matrix has its eigenvalues, however degenerate (infinite where they
overflow). What must be symmetric counts by its symmetric part. On "triton" and "cpp" nothing waits for the device, and
a matrix has the same bits whatever batch it comes in and however many threads there are.

precision: type of the arithmetic. `eigh` and `eigvalsh` compute in the type of the input, as LAPACK does, unless told
otherwise; the others in float64, where "float32" is a faster mode of "triton" and, but for `polar`, of "torch".
out: where results are copied to, of the shapes and type they would have; the call returns them.
Results carry no autograd graph, but those of `eigh`, `eigvalsh`, `sqrtm` and `invsqrtm` of an X that requires grad.
Under torch.compile each function is one operator, `torch.ops.reflora`. Transforms of torch.func are not supported:
batch the matrices, and differentiate by autograd.
"""

from .functions import (
    SVD,
    Eigh,
    Polar,
    eigh,
    eigvalsh,
    geometric_mean,
    inv_root,
    invsqrtm,
    polar,
    sqrtm,
    svd,
)

__all__ = [
    "SVD",
    "Eigh",
    "Polar",
    "eigh",
    "eigvalsh",
    "geometric_mean",
    "inv_root",
    "invsqrtm",
    "polar",
    "sqrtm",
    "svd",
]
