"""One step of InvariantAdamW on one pair, in float64: the momentum, whitened in the frame of a metric.

With any metric `M = P P^T` and the second moments V of B's gradients, in the frame B' = B P^-T,

    dB = -lr mB P (P^T V P)^(-1/2) P^T = -lr mB (M # V^-1),        dA = -lr (M_A # V_A^-1) mA.

m and V are means of raw gradients in the axes of A and B. Under (Q^T A, B Q^-T) gradients, moments and metric all turn
along, so that the step of the product is the same for every equal pair.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .mean import condition, norm, present, refactoring
from .step import Hypers, Sides, each


class Frames(NamedTuple):
    """`[r, r]` P_A and P_B: the metrics are `P_A P_A^T` for A's step and `P_B P_B^T` for B's.

    why: "refactored", "degenerate" (in one frame or both a multiple of I stands in) or "skipped".
    """

    of_A: Tensor
    of_B: Tensor
    why: str


@dataclass(frozen=True)
class InvariantState:
    """What InvariantAdamW keeps for a pair, float64, of A and of B.

    exp_avg: means of the gradients, shaped like the factors. exp_avg_gram `[r, r]`: means of `gA gA^T / n_in` and
    `gB^T gB / n_out`; with moments="momentum" the last step's of the mean gradients, without their bias. step: steps of
    A and of B. master: weights that are not rounded.
    """

    exp_avg: Sides
    exp_avg_gram: Sides
    step: tuple[float, float] = (0, 0)
    master: Sides | None = None


def frames(A: Tensor, B: Tensor, metric: str, kappa_max: float = 1e6) -> Frames:
    """The frames of a metric: "reflora" (S for B, S^-1 for A), "scaled" (`(A A^T)^-1`, `(B^T B)^-1`) or "identity".

    A factor past `kappa_max` is degenerate: a multiple of I of the same size stands in for its metric.
    """
    r = A.shape[0]
    eye = torch.eye(r, dtype=torch.float64)
    if not (A.isfinite().all() and B.isfinite().all()):
        return Frames(eye, eye, "skipped")
    if metric == "identity":
        return Frames(eye, eye, "refactored")
    if metric == "scaled" or min(norm(A), norm(B)) == 0:
        of_B, wide_A = _inverse_root(A, kappa_max)
        of_A, wide_B = _inverse_root(B.mT, kappa_max)
        return Frames(of_A, of_B, "refactored" if wide_A and wide_B else "degenerate")
    there = present(A, B)
    a, b = A[there], B[:, there]
    root = float((norm(B) / norm(A)).sqrt())
    wide = len(a) <= min(A.shape[1], B.shape[0]) and max(condition(a), condition(b.mT)) <= kappa_max
    of_A, of_B = eye / root, eye * root
    if wide:
        S = refactoring(a, b)
        block = there[:, None] & there
        of_A[block], of_B[block] = S.P_inv_T.flatten(), S.P.flatten()
    return Frames(of_A, of_B, "refactored" if wide else "degenerate")


def _inverse_root(A: Tensor, kappa_max: float) -> tuple[Tensor, bool]:
    """P with `P P^T = (A A^T)^-1` for A `[r, n]`, and whether A has full rank.

    Where it has not, and in ranks that are 0, a multiple of I of the same size stands in; for A = 0 it is I.
    """
    there = A.ne(0).any(1)
    own = A[there].double()
    scale = len(own) ** 0.5 / float(norm(A)) if len(own) else 1.0
    P = scale * torch.eye(A.shape[0], dtype=torch.float64)
    if len(own) == 0 or len(own) > A.shape[1] or condition(own) > kappa_max:
        return P, False
    L = torch.linalg.qr(own.mT).R.mT
    P[there[:, None] & there] = torch.linalg.inv(L).mT.flatten()
    return P, True


def whitener(V: Tensor, P: Tensor, damping: float, eps: float) -> Tensor:
    """`K = P C^(-1/2) P^T` with `C = P^T V P + (damping tr(P^T V P) / r + eps^2) I`, `[r, r]`.

    That is `M # (V + (damping tr(M V) / r + eps^2) M^-1)^-1` for the metric `M = P P^T`: damped in the frame, where
    nothing depends on the pair. 0 where V is 0, which tells nothing.
    """
    r = V.shape[0]
    framed = P.mT @ V @ P
    if framed.trace() <= 0:
        return torch.zeros_like(V)
    size = float(damping * framed.trace() / r + eps**2)
    w, U = torch.linalg.eigh((framed + framed.mT) / 2)
    half = P @ U * (w.clamp_min(0) + size) ** -0.25
    return half @ half.mT


def invariant_step(
    A: Tensor, B: Tensor, grad_A: Tensor, grad_B: Tensor, state: InvariantState, hypers: tuple[Hypers, Hypers],
    metric: str = "reflora", moments: str = "gradients", damping: float = 1e-4, late: bool = False,
    storage: torch.dtype = torch.float64, kappa_max: float = 1e6,
) -> tuple[Tensor, Tensor, InvariantState, str]:  # fmt: skip
    """One step on one pair: (A, B, state after it, "refactored", "degenerate" or "skipped").

    moments: "gradients" for the mean of Grams; "momentum" for the Gram of the mean gradient, which makes all singular
    values of the step equal. storage: type of the factors. Nothing changes where a factor or gradient is not
    finite.

    late: whiten by the second moments of the step before, where there are any. No gradient has to be known before the
    momentum moves then, so that an element that is not finite is left out: its mean stays, and so do the second moments
    of its side, but for their bias.
    """
    factors, grads = (A.double(), B.double()), (grad_A.double(), grad_B.double())
    found = frames(*factors, metric, kappa_max)
    finite = all(g.isfinite().all() for g in grads)
    if found.why == "skipped" or not (late or finite):
        return *factors, state, "skipped"
    step = (state.step[0] + 1, state.step[1] + 1)
    grads = each(lambda g, h: -g if h.maximize else g, grads, hypers)
    sound = tuple(bool(g.isfinite().all()) for g in grads)
    grads = each(lambda g, m: g.where(g.isfinite(), m), grads, state.exp_avg)
    exp_avg = each(lambda m, g, h: h.beta1 * m + (1 - h.beta1) * g, state.exp_avg, grads, hypers)
    means = each(lambda m, t, h: m / (1 - h.beta1**t), exp_avg, step, hypers)
    if moments == "momentum":
        exp_avg_gram = gram_over_n(means[0]), gram_over_n(means[1].mT)
    else:
        grams = gram_over_n(grads[0]), gram_over_n(grads[1].mT)
        exp_avg_gram = each(lambda V, G, h: h.beta2 * V + (1 - h.beta2) * G, state.exp_avg_gram, grams, hypers)
    before = state.exp_avg_gram
    held = each(lambda old, t, h: old * held_by(t, h, moments), before, step, hypers)
    exp_avg_gram = each(lambda V, old, known: V if known else old, exp_avg_gram, held, sound)
    seconds = each(lambda V, old, t, h: _second(V, old, t, h, moments, late), exp_avg_gram, before, step, hypers)
    K = each(lambda V, P, h: whitener(V, P, damping, h.eps), seconds, found[:2], hypers)
    changes = K[0] @ means[0], means[1] @ K[1]
    weights = each(lambda w, d, h: w * (1 - h.lr * h.weight_decay) - h.lr * d, state.master or factors, changes, hypers)
    state = replace(
        state, exp_avg=exp_avg, exp_avg_gram=exp_avg_gram, step=step, master=weights if state.master else None
    )
    return *each(lambda w: w.to(storage).double(), weights), state, found.why if finite else "skipped"


def _second(V: Tensor, old: Tensor, t: int, h: Hypers, moments: str, late: bool) -> Tensor:
    """What whitens in step t, without its bias: of the second moments after the step, or before it."""
    before = late and float(old.trace()) > 0
    if moments == "momentum":
        return old if before else V
    return old / (1 - h.beta2 ** (t - 1)) if before else V / (1 - h.beta2**t)


def held_by(t: float, h: Hypers, moments: str) -> float:
    """What keeps the second moments as they are without their bias, where step t takes no part in them."""
    return 1.0 if moments == "momentum" or t < 2 else (1 - h.beta2**t) / (1 - h.beta2 ** (t - 1))


def gram_over_n(g: Tensor) -> Tensor:
    """`g g^T / n` of g `[r, n]`."""
    return g @ g.mT / g.shape[1]
