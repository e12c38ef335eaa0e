"""Refactoring and preconditioning over lists of pairs, in place and without autograd.

Under torch.compile each is one operator, `torch.ops.reflora.refactor_` and `torch.ops.reflora.precondition_`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from . import direct, operators
from .checks import check_backend, check_flags, check_precision
from .diagnostics import Diagnostics
from .direct import Grads
from .pairs import PairLike


def refactor_(
    pairs: Iterable[PairLike], scalar: bool = False, backend: str | None = None, precision: str = "float64"
) -> Diagnostics:
    """Refactor every pair: `A <- P^T A`, `B <- B P^-T`, so that `A A^T = B^T B` and `B A` stays the same.

    Degenerate pairs get the scalar refactoring; pairs with a zero or non-finite factor are left alone. Optimizer state
    is not moved: in training use RefLoRAAdamW. Paper, section 3.

    Args:
        pairs: LoRAPairs, or tuples `(A [r, n_in], B [n_out, r])`; float32, float64, bfloat16 or float16.
        scalar: RefLoRA-S, `A <- sqrt(s) A`, `B <- B / sqrt(s)` with `s = ||B||_F / ||A||_F`.
        backend: None (the fastest that can serve the device), "triton", "cpp" or "torch".
        precision: of Grams and solve: "float64" or, faster on GPUs with slow float64, "float32".

    Returns:
        What was done, layer by layer; condition and imbalance are those before.

    Raises:
        TypeError: factors that are not tensors, an unsupported dtype.
        ValueError: shapes that do not match, factors that overlap, two devices or dtypes in a pair.
        RuntimeError: the backend cannot serve the device, with the reason; factors of inference mode, outside it.
    """
    _check_options(scalar, backend, precision)
    run = operators.refactor_traced if torch.compiler.is_compiling() else direct.refactor
    return run(pairs, scalar, backend, precision)


def precondition_(
    pairs: Iterable[PairLike],
    grads: Grads | None = None,
    scalar: bool = False,
    backend: str | None = None,
    precision: str = "float64",
) -> Diagnostics:
    """Precondition every pair's gradients in place: `gA <- S^-1 gA`, `gB <- gB S`, `S = (A A^T)^-1 # (B^T B)`.

    Pairs with a non-finite factor or gradient are left alone; degenerate pairs use `S = c I`, `c = ||B||_F / ||A||_F`
    (S = I where a norm is zero). Products past the storage range saturate. Paper, section 3.3.

    Args:
        pairs: as in `refactor_`.
        grads: one `(gA, gB)` per pair, shaped like the factors; default their `.grad`. Pairs where either is None are
            left alone. They are written, so they must share no memory with one another or with a factor.
        scalar: `S = c I` for every pair.
        backend: as in `refactor_`.
        precision: as in `refactor_`.

    Returns:
        What was done, layer by layer.

    Raises:
        TypeError: gradients that are not pairs of tensors, or None; and as `refactor_`.
        ValueError: gradients that do not match their factors, or share memory; `.grad` that GradientHooks already
            precondition; and as `refactor_`.
    """
    _check_options(scalar, backend, precision)
    run = operators.precondition_traced if torch.compiler.is_compiling() else direct.precondition
    return run(pairs, grads, scalar, backend, precision)


def _check_options(scalar: bool, backend: str | None, precision: str) -> None:
    check_flags({"scalar": scalar})
    check_backend(backend)
    check_precision(precision)
