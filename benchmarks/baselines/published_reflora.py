"""The published RefLoRA, layer after layer in eager torch: the yardstick for speed, parity and failures.

It follows the authors' algorithm (arXiv 2505.18877, Theorem 3 equation 9, Theorem 5 equation 11, Appendix C), with its
two eigendecompositions a layer in the dtype of the factors, its epsilon and its unguarded square roots and divisions:
from PEFT's start B = 0 it goes dead (full variant) or NaN (scalar variant), and it must, since a test shows so.
A is `[r, n_in]`, B is `[n_out, r]`. torch only, any floating dtype that `torch.linalg.eigh` takes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

Pairs = Iterable[tuple[Tensor, Tensor]]


def mean_and_inverse(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """`S = (A A^T)^-1 # (B^T B)` and its inverse (equation 9), `[r, r]` in the dtype of A.

    With `A A^T = V D^2 V^T` and `(B V D)^T (B V D) = U M^2 U^T`:
    `S = V D^-1 U M U^T D^-1 V^T` and `S^-1 = V D U M^-1 U^T D V^T`, where `x^-1` is `1 / (x + eps)`.
    """
    eps = torch.finfo(A.dtype).eps
    d_squared, V = torch.linalg.eigh(A @ A.T)
    d = d_squared.sqrt()
    right = B @ (V * d)
    m_squared, U = torch.linalg.eigh(right.T @ right)
    m = m_squared.sqrt()
    outer = (V / (d + eps)) @ U
    inner = (V * d) @ U
    return outer * m @ outer.T, inner / (m + eps) @ inner.T


@torch.no_grad()
def precondition_(pairs: Pairs) -> None:
    """`A.grad <- S^-1 A.grad`, `B.grad <- B.grad S`, in front of an Adam-like step (RefLoRA under Adam, section 3.3).

    Raises torch.linalg.LinAlgError where a Gram holds NaN or its eigendecomposition fails, AttributeError or TypeError
    where a gradient is None.
    """
    for A, B in pairs:
        S, S_inverse = mean_and_inverse(A.data, B.data)
        A.grad = S_inverse @ A.grad
        B.grad = B.grad @ S


@torch.no_grad()
def refactor_scalar_(pairs: Pairs, optimizer: Optimizer | None = None) -> None:
    """RefLoRA-S (equation 11): `A <- sqrt(s) A`, `B <- B / sqrt(s)`, `s = ||B||_F / ||A||_F`, and Adam's moments along.

    To be called once before the first step and after every step.
    """
    for A, B in pairs:
        s = torch.linalg.norm(B.data) / torch.linalg.norm(A.data)
        root = s.sqrt()
        A.data.mul_(root)
        B.data.mul_(1 / root)
        if optimizer is not None and optimizer.state:
            optimizer.state[A]["exp_avg"].mul_(1 / root)
            optimizer.state[A]["exp_avg_sq"].mul_(1 / s)
            optimizer.state[B]["exp_avg"].mul_(root)
            optimizer.state[B]["exp_avg_sq"].mul_(s)


def attach(optimizer: Optimizer, pairs: Pairs, warmup_steps: int = 0, scalar: bool = False) -> None:
    """Hook the published loop into an optimizer, as its authors do; the first `warmup_steps` calls do nothing.

    With `scalar` the hook runs after each step and the loop once now, and that call counts for the warm-up too.
    """
    pairs = list(pairs)
    left = warmup_steps

    def before(*_: object) -> None:
        nonlocal left
        if left > 0:
            left -= 1
        else:
            precondition_(pairs)

    def after(*_: object) -> None:
        nonlocal left
        if left > 0:
            left -= 1
        else:
            refactor_scalar_(pairs, optimizer)

    if scalar:
        optimizer.register_step_post_hook(after)
        after()
    else:
        optimizer.register_step_pre_hook(before)
