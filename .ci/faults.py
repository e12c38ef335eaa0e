"""The deliberate faults of mutants.py, each with the tests that are asked."""

from __future__ import annotations

from dataclasses import dataclass

LINALG = "tests/test_linalg.py tests/test_eigh.py tests/test_adversarial_linalg.py"
STEPS = "tests/test_functional.py tests/test_adamw.py tests/test_adamw_state.py tests/test_adamw_changes.py"
START = "tests/test_start.py tests/test_start_states.py"
COUNTS, HOOKS = "tests/test_start_counts.py", "tests/test_hooks.py"
TRITON = "tests/test_kernels_adamw.py tests/test_kernels.py tests/test_kernels_linalg.py tests/test_kernels_storages.py"
SLOT_BARRIER = "    tl.debug_barrier()\n"


@dataclass(frozen=True)
class Fault:
    """`before` becomes `after`, once, in `file`; `tests` are asked, with pytest's -k `only`.

    compiled: the tests of kernels, on what Triton compiles for a GPU.
    """

    what: str
    file: str
    before: str
    after: str
    tests: str
    only: str
    compiled: bool = False


def cpp(what: str, file: str, before: str, after: str, tests: str = STEPS) -> Fault:
    return Fault(what, f"csrc/{file}", before, after, f"{tests} tests/test_adversarial.py", "cpp")


def triton(what: str, file: str, before: str, after: str, tests: str = TRITON) -> Fault:
    return Fault(what, f"reflora/kernels/{file}", before, after, tests, "", compiled=True)


def python(what: str, file: str, before: str, after: str, tests: str, only: str = "") -> Fault:
    return Fault(what, f"reflora/{file}", before, after, tests, only)


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
        "saturated(g[PLAIN_STEP ? i : i * inc] * u.grad, top)",
        "g[PLAIN_STEP ? i : i * inc] * u.grad",
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
        "apply_in_place<T, S>(gb, right, right, rp, in, out)",
        "apply_in_place<T, S>(gb, left, left, rp, in, out)",
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
        "out.S[i] *= out.scale, out.S_inv[i] /= out.scale",
        "out.S[i] *= 1, out.S_inv[i] /= 1",
    ),
    cpp(
        "S is transposed wrongly",
        "solve.h",
        "d.transpose(b.U, tmp), d.matmul(X, a.E, Y), d.matmul(tmp, Y, out.S);",
        "d.transpose(b.U, tmp), d.matmul(X, a.U, Y), d.matmul(tmp, Y, out.S);",
    ),
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
    triton(
        "AdamW adds its step", "update.py", "tl.fma(-step_size, m / denominator", "tl.fma(step_size, m / denominator"
    ),
    triton(
        "no mask at the ragged edge",
        "pair.py",
        "m = (i < r)[:, None] & (k < n)[None, :]\n        if VECTOR",
        "m = (i < r)[:, None] & (k < n + 1)[None, :]\n        if VECTOR",
    ),
    triton(
        "inner blocks are read past r",
        "apply.py",
        "offsets(start, sr, sn, r - inner, end",
        "offsets(start, sr, sn, RC, end",
        "tests/test_kernels.py",
    ),
    triton(
        "gradients do not saturate",
        "update.py",
        "bounded(mixed, limit), m_factor",
        "mixed, m_factor",
        "tests/test_kernels_routes.py",
    ),
    # ---- what compiled code alone shows: barriers, orders of memory, masks of wide accesses, what the hardware rounds
    triton(
        "a Gram is read before it is whole",
        "chunks.py",
        f"+ i * RC + j, b.to(TC))\n{SLOT_BARRIER}",
        "+ i * RC + j, b.to(TC))\n",
    ),
    triton("arrivals order no memory", "gather.py", 'sem="acq_rel"', 'sem="relaxed"'),
    triton("RefLoRA-S: arrivals order no memory", "adamw_scalar.py", 'sem="acq_rel"', 'sem="relaxed"'),
    triton(
        "RefLoRA-S: counts are written while others read them",
        "adamw_scalar.py",
        "written\n        tl.debug_barrier()",
        "written",
    ),
    triton(
        "chunk Grams are overwritten while they are read",
        "chunks.py",
        f"{SLOT_BARRIER}    tl.store(slot(area, SLOT_A",
        "    tl.store(slot(area, SLOT_A",
    ),
    triton(
        "a diagonal block is read before it is reduced",
        "cholesky.py",
        f"first, r, RC)\n        {SLOT_BARRIER}",
        "first, r, RC)\n",
    ),
    triton(
        "Newton-Schulz begins out of its range",
        "solve.py",
        "scale = 1.0 / tl.sqrt(eigenvalue_bound(y))",
        "scale = 2.0 / tl.sqrt(eigenvalue_bound(y))",
    ),
    triton(
        "Newton-Schulz reads a slot that is being written",
        "solve.py",
        "newton_update(p_x, p_y, z, RC, BM, TC)\n    tl.debug_barrier()",
        "newton_update(p_x, p_y, z, RC, BM, TC)",
    ),
    triton(
        "masked lanes read what others overwrite", "chunks.py", "o, mask, chunks_a, chunks", "o, None, chunks_a, chunks"
    ),
    triton(
        "no mask on wide accesses",
        "pair.py",
        "m = tl.max_constancy(m, [1, 4])",
        "m = tl.max_constancy(m | (o >= 0), [1, 4])",
        "tests/test_kernels_storages.py",
    ),
    triton(
        "wide accesses anywhere", "launch.py", "_ADDRESSES] & 15", "_ADDRESSES] & 3", "tests/test_kernels_storages.py"
    ),
    triton(
        "wide accesses past the last column",
        "launch.py",
        "[*_FAR, A_SIDE + N, R]",
        "[*_FAR, R]",
        "tests/test_kernels_storages.py",
    ),
    triton("the next block is the same again", "update.py", "offsets(start + BN, sr", "offsets(start, sr"),
    triton("a subnormal v counts as 0", "dtypes.py", "tl.sqrt_rn(x)", "tl.sqrt(x)", "tests/test_kernels_adamw.py"),
    triton(
        "NaN becomes a number",
        "dtypes.py",
        "tl.where(x == x, tl.minimum(tl.maximum(x, -limit), limit), x)",
        "tl.minimum(tl.maximum(x, -limit), limit)",
        "tests/test_kernels_adamw.py",
    ),
    triton("moments move the wrong way", "settle.py", "1.0 / used, 1.0)", "used, 1.0)"),
    triton("a NaN is no reason to skip", "chunks.py", "if CHECK:\n            bad", "if False:\n            bad"),
    triton(
        "the first block of a chunk is left out of its Gram",
        "chunks.py",
        "acc += block_gram(x, SIDE",
        "acc += block_gram(y.to(TC), SIDE",
    ),
    triton(
        "traces are not made 1",
        "chunks.py",
        "tl.where(usable, 1.0 / tl.where(usable, trace, 1.0), 0.0), norm",
        "tl.where(usable, 1.0, 0.0), norm",
    ),
    triton(
        "RefLoRA-S forgets what the first update comes to",
        "adamw_scalar.py",
        "if (before & after) | returns:",
        "if False:",
    ),
    triton(
        "squares keep an older exponent",
        "scalar.py",
        "acc *= power_of_two(tl.maximum(2 * (exponent - larger), -1000))",
        "acc *= 1.0",
        "tests/test_kernels_routes.py",
    ),
    triton("RefLoRA-S multiplies gradients the wrong way", "scalar.py", "= 1.0 / s, s", "= s, 1.0 / s"),
    triton("S of a skipped row is what was there", "precondition.py", "if status == col.SKIPPED:", "if status < 0:"),
    triton("P^T and P^-T change places", "refactor.py", "p_x, root, largest", "p_y, 1.0 / root, largest"),
    triton("v moves as m does", "update.py", "1.0 / turn, 1.0 / (turn * turn)", "1.0 / turn, 1.0 / turn"),
    triton("a saved S is not taken back", "settle.py", "elif saved == 1:", "elif saved == 2:"),
    python(
        "S and S^-1 change places",
        "backends/torch_solve.py",
        "S = c_col * _symmetric(La_inv.mT @ Q.mT @ Lb.mT)",
        "S = 1 / c_col * _symmetric(La_inv.mT @ Q.mT @ Lb.mT)",
        STEPS,
        "torch",
    ),
    python(
        "the guard on S looks at S alone",
        "backends/torch_solve.py",
        " & (S_inv.abs().amax((1, 2)) <= huge)",
        "",
        "tests/test_adversarial.py tests/test_functional.py",
        "torch",
    ),
    python(
        "a loaded S is rounded to the type of its factors",
        "optim/state.py",
        "MASTER, PHASE, STEPS, SAVED):\n        if",
        "MASTER, PHASE, STEPS):\n        if",
        "tests/test_adamw_loading.py tests/test_adamw_storage.py",
    ),
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
    triton("shrunk Grams of another trace", "mean.py", "((1.0 - weight) / r)", "(1.0 - weight)", START),
    triton(
        "S of the start has its scale",
        "settle.py",
        "used = tl.where(useful & (start == 0), c, 1.0)",
        "used = tl.where(useful, c, 1.0)",
        START,
    ),
    triton(
        "RefLoRA-S forgets that it has begun",
        "adamw_scalar.py",
        "tl.where(phase == col.REFACTORED_UNITS, 0.0, phase)",
        "0.0 * phase",
        START,
    ),
    triton(
        "an idle expert's start goes on",
        "settle.py",
        "taken = tl.where((start != 0) & ((norm_a == 0) | (norm_b == 0)), 0, steps)",
        "taken = steps",
        COUNTS,
    ),
    python(
        "a sharded pair that is singular is not finite",
        "optim/sharded.py",
        "values.clamp(min=0).sqrt()",
        "values.sqrt() / (values > 0)",
        "tests/test_sharded_ops.py",
    ),
    python(
        "the start counts as a number of plain steps",
        "backends/torch_groups.py",
        "return square / (square + start**2)",
        "return (square >= start**2).double()",
        START,
        "torch",
    ),
    python(
        "a wrapper's start stands still",
        "optim/wrapper.py",
        "torch._foreach_add_(counts, 1)",
        "torch._foreach_add_(counts, 0)",
        START,
    ),
    python(
        "a wrapper leaves moments in units of c S",
        "optim/units.py",
        "move.apply([1 / unit for unit in units])",
        "move.apply([unit / unit for unit in units])",
        START,
    ),
    python(
        "hooks count no steps",
        "integrations/hooks.py",
        "counts = self.counts + 1",
        "counts = self.counts + 0",
        HOOKS,
    ),
    python("a wrapper steps over NaN", "optim/wrapper.py", "if not finite:", "if False:", "tests/test_wrapper.py"),
    python(
        "hooks use S on the wrong side",
        "integrations/hooks.py",
        "for side, factor in ((1, pair.A), (0, pair.B))",
        "for side, factor in ((0, pair.A), (1, pair.B))",
        "tests/test_hooks.py",
    ),
)
