"""Faults in InvariantAdamW's and RiemannianAdamW's steps, in C++, Triton and Python."""

from __future__ import annotations

from .fault import SLOT_BARRIER, cpp, files, python, triton

WHITENED = files("spec", "invariant_step invariant riemannian_step")
COMPILED = f"{files('spec', 'invariant_step riemannian_step')} tests/property/test_adversarial.py"

FAULTS = (
    cpp("a singular frame is used", "whiten.h", "if (!(g.kappa <= (of_rank", "if (!(0 <= (of_rank", WHITENED),
    cpp("damping is absolute", "whiten.h", "(damping * mean + eps * eps)", "(damping + eps * eps)", WHITENED),
    cpp("V is not turned into the frame", "whiten.h", "d.symmetric_tn(P, X, U);", "d.symmetric_tn(P, P, U);", WHITENED),
    cpp(
        "the frame of the other side",
        "invariant.h",
        "side ? found.of_B : found.of_A, job.damping",
        "side ? found.of_A : found.of_B, job.damping",
        WHITENED,
    ),
    cpp(
        "V is not over the number of columns",
        "invariant.h",
        "unscale / double(g[side].n) * unscale",
        "unscale * unscale",
        WHITENED,
    ),
    cpp(
        "a step that V takes no part in changes its size",
        "invariant.h",
        "sound[side] ? average_second(side) : hold_second(side);",
        "if (sound[side]) average_second(side);",
        WHITENED,
    ),
    cpp(
        "an element that is not finite moves its mean",
        "momentum.h",
        "raw - raw == 0 ? u.one_minus_beta1 : T(0)",
        "u.one_minus_beta1",
        WHITENED,
    ),
    cpp("reg is left out", "damped.h", "g.U[i * d.rp + i] += reg / size;", "g.U[i * d.rp + i] += 0;", WHITENED),
    triton(
        "V is read before it is whole",
        "step/second_moments.py",
        f"tl.store(p_work + i * RC + j, (V * inverse).to(TC))\n{SLOT_BARRIER}",
        "tl.store(p_work + i * RC + j, (V * inverse).to(TC))\n",
        COMPILED,
    ),
    triton(
        "V of the step before has the bias of this one",
        "step/whiten.py",
        "        count -= 1\n        store_over_trace",
        "        store_over_trace",
        COMPILED,
    ),
    triton(
        "a step that V takes no part in changes its size",
        "step/second_moments.py",
        "keep = tl.where(sound == 1, keep, hold)",
        "keep = tl.where(sound == 1, keep, 1.0)",
        COMPILED,
    ),
    triton(
        "the frames of A and B are exchanged",
        "step/frames.py",
        "square_a, square_b = 1.0 / c, c",
        "square_a, square_b = c, 1.0 / c",
        COMPILED,
    ),
    triton(
        "the first step sums no gradients",
        "step/invariant.py",
        "gradient = trace_before(p_row, r, SIDE, RC) <= 0",
        "gradient = trace_before(p_row, r, SIDE, RC) < 0",
        COMPILED,
    ),
    triton(
        "the Gram of a factor before its update is left",
        "step/momentum.py",
        "of_factor += block_gram(p.to(TC), SIDE, TC) * one",
        "of_factor += block_gram(w.to(TC), SIDE, TC) * one",
        COMPILED,
    ),
    triton(
        "reg is left out",
        "step/damped.py",
        "tl.where(fits, reg * inverse, 1.0)",
        "tl.where(fits, 0.0 * inverse, 1.0)",
        COMPILED,
    ),
    python(
        "amsgrad for factors is taken",
        "optim/groups.py",
        'if group.get("amsgrad") and',
        'if not group.get("amsgrad", True) and',
        WHITENED,
    ),
)
