"""Batched linear algebra of small matrices: eigenvalues, singular values, polar factors, roots, geometric means.

Matrices are `[..., n, n]`, any leading dimensions. n <= 128 is one launch on a GPU ("triton") and one call on a CPU
("cpp"); larger ones go through torch.linalg ("torch"; `polar`, `geometric_mean`, `sqrtm`, `invsqrtm` stay in C++ at
any n on a CPU). float32 and float64; half types are computed in float32 or more and returned in their own dtype.

Values never raise. A matrix that is not finite, or not positive definite where it must be, gives NaN in its own result
and nowhere else; every finite symmetric matrix gets its eigenvalues, however degenerate (infinite where they overflow).
Of a matrix that must be symmetric, only the symmetric part counts. "triton" and "cpp" never sync, and give a matrix the
same bits in any batch and with any number of threads.

precision: dtype of the arithmetic. `eigh` and `eigvalsh` compute in the dtype of the input, as LAPACK does, unless told
otherwise; the others in float64, where "float32" is a faster mode of "triton" and, except for `polar`, of "torch".
out: tensors that results are copied to, of the shapes and dtype they would have; the call returns them.
Results carry no autograd graph, except those of `eigh`, `eigvalsh`, `sqrtm` and `invsqrtm` of an X that requires grad.
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
