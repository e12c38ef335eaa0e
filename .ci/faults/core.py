"""Faults in the C++ core."""

from __future__ import annotations

from .fault import ABSENT, COUNTS, LINALG, START, cpp

FAULTS = (
    cpp("AdamW adds its step", "adamw.h", "u.decay - u.step_size * first", "u.decay + u.step_size * first"),
    cpp(
        "v of the gradient, not of its square", "adamw.h", "u.one_minus_beta2 * grad * grad", "u.one_minus_beta2 * grad"
    ),
    cpp("no bias correction of v", "adamw.h", "T(1 / root(bias2))", "T(1)"),
    cpp("0 / 0 is a step", "adamw.h", " + (first == 0 ? T(1) : T(0))", ""),
    cpp(
        "gradients do not saturate",
        "adamw.h",
        "bounded(g[PLAIN_STEP ? i : i * inc] * u.g_factor, limit)",
        "g[PLAIN_STEP ? i : i * inc] * u.g_factor",
    ),
    cpp(
        "amsgrad keeps the smaller v",
        "adamw.h",
        "highest > second ? highest : second",
        "highest < second ? highest : second",
    ),
    cpp(
        "the last column of a ragged block is left out",
        "apply.h",
        "k < count; ++k)\n                buffer",
        "k + 1 < count; ++k)\n                buffer",
    ),
    cpp(
        "no clamp where factors are stored",
        "apply.h",
        "narrow_saturated(values[o * lo + i * lin], p + i * si)",
        "narrow(values[o * lo + i * lin], p + i * si)",
    ),
    cpp(
        "S^-1 on both sides",
        "row.h",
        "apply_in_place<T, S>(gb, mixer_b, mixer_b, rp, in, out)",
        "apply_in_place<T, S>(gb, mixer_a, mixer_a, rp, in, out)",
    ),
    cpp("gradients are not looked at", "row.h", "!(all_finite(ga) && all_finite(gb))", "!all_finite(ga)"),
    cpp(
        "moments keep their old unit",
        "row.h",
        "return was_identity == identity ? 1 : identity ? c : 1 / c;",
        "return 1;",
    ),
    cpp("factors of no room are refactored", "row.h", "<= Storage<S>::max / 2;", "<= Storage<S>::max * 2;"),
    cpp("a step is not counted", "row.h", "empty ? 1 : *count + 1;", "empty ? 1 : *count;"),
    cpp(
        "the first row of a padded panel stays as it was",
        "storage.h",
        "for (int64_t i = f.r; i < rp; ++i) out[i] = 0;",
        "for (int64_t i = f.r + 1; i < rp; ++i) out[i] = 0;",
    ),
    cpp(
        "float64 Grams are not scaled",
        "solve.h",
        "-exponent_of(top < 1e-300 ? 1e-300 : top));\n    }\n    for",
        "0);\n    }\n    for",
    ),
    cpp("condition numbers are not looked at", "solve.h", "a.kappa <= kappa_max && b.kappa <= kappa_max", "true"),
    cpp(
        "S without its scale",
        "solve.h",
        "out.S[i] *= out.scale;\n        out.S_inv[i] /= out.scale;",
        "out.S[i] *= 1;\n        out.S_inv[i] /= 1;",
    ),
    cpp("S is transposed wrongly", "solve.h", "d.multiply(Q, a.E, Y);", "d.multiply(Q, a.U, Y);"),
    cpp("Newton-Schulz stops early", "dense.h", "if (!(away > 1e-8)) return;", "if (!(away > 1e-2)) return;"),
    cpp(
        "a polar factor that is none is not noticed",
        "matrices.h",
        "if (!(root(skew) <= rounding * norm",
        "if (!(true",
        LINALG,
    ),
    cpp("eigenvectors keep their signs", "eigh.h", "sign = z < 0 ? T(-1) : T(1);", "sign = T(1);", LINALG),
    cpp(
        "eigenvalues in descending order",
        "eigh.h",
        "x[order[k - 1] * step] > x[i * step]",
        "x[order[k - 1] * step] < x[i * step]",
        LINALG,
    ),
    cpp("a null space is not completed", "svd.h", "complete(G, flags);", "", LINALG),
    cpp("the start never ends", "row.h", "return steps * steps / (", "return 0 * steps / (", START),
    cpp("an idle expert's start goes on", "row.h", "job.start && !job.scalar && empty", "false && empty", COUNTS),
    cpp(
        "full steps leave RefLoRA-S balanced",
        "row.h",
        "if (!(job.scalar && was_identity)) *phase",
        "if (was_identity != identity) *phase",
        START,
    ),
    cpp("RefLoRA-S begins at once", "row.h", "if (equal || ", "if (true || ", START),
    cpp("ranks that are 0 count", "solve.h", "count += !absent(d, a, b, i);", "count += 1;", ABSENT),
    cpp(
        "absent ranks have a part in the condition",
        "solve.h",
        "if (count > 0) out.kappa =",
        "if (false) out.kappa =",
        ABSENT,
    ),
)
