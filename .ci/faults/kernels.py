"""Faults in the Triton kernels. Compiled code alone shows most: barriers, orders of memory, masks, rounding."""

from __future__ import annotations

from .fault import ABSENT, COUNTS, SLOT_BARRIER, START, triton

FAULTS = (
    triton(
        "AdamW adds its step",
        "step/update.py",
        "tl.fma(-step_size, m / denominator",
        "tl.fma(step_size, m / denominator",
    ),
    triton(
        "no mask at the ragged edge",
        "step/pair.py",
        "m = (i < r)[:, None] & (k < n)[None, :]\n        if VECTOR",
        "m = (i < r)[:, None] & (k < n + 1)[None, :]\n        if VECTOR",
    ),
    triton(
        "inner blocks are read past r",
        "step/apply.py",
        "offsets(start, sr, sn, r - inner, end",
        "offsets(start, sr, sn, RC, end",
        "tests/unit/test_kernels.py",
    ),
    triton(
        "gradients do not saturate",
        "step/update.py",
        "bounded(mixed, limit), m_factor",
        "mixed, m_factor",
    ),
    triton(
        "a Gram is read before it is whole",
        "step/chunks.py",
        f"+ i * RC + j, b.to(TC))\n{SLOT_BARRIER}",
        "+ i * RC + j, b.to(TC))\n",
    ),
    triton("arrivals order no memory", "step/gather.py", 'sem="acq_rel"', 'sem="relaxed"'),
    triton("RefLoRA-S: arrivals order no memory", "step/adamw_scalar.py", 'sem="acq_rel"', 'sem="relaxed"'),
    triton(
        "RefLoRA-S: counts are written while others read them",
        "step/adamw_scalar.py",
        "written\n        tl.debug_barrier()",
        "written",
    ),
    triton(
        "chunk Grams are overwritten while they are read",
        "step/chunks.py",
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
        "masked lanes read what others overwrite",
        "step/chunks.py",
        "o, mask, chunks_a, chunks",
        "o, None, chunks_a, chunks",
    ),
    triton(
        "no mask on wide accesses",
        "step/pair.py",
        "m = tl.max_constancy(m, [1, 4])",
        "m = tl.max_constancy(m | (o >= 0), [1, 4])",
        "tests/unit/test_kernels_storages.py",
    ),
    triton(
        "wide accesses anywhere",
        "step/launch.py",
        "_ADDRESSES] & 15",
        "_ADDRESSES] & 3",
        "tests/unit/test_kernels_storages.py",
    ),
    triton(
        "wide accesses past the last column",
        "step/launch.py",
        "[*_FAR, A_SIDE + N, R]",
        "[*_FAR, R]",
        "tests/unit/test_kernels_storages.py",
    ),
    triton("the next block is the same again", "step/update.py", "offsets(start + BN, sr", "offsets(start, sr"),
    triton("a subnormal v counts as 0", "dtypes.py", "tl.sqrt_rn(x)", "tl.sqrt(x)", "tests/spec/test_step.py"),
    triton(
        "NaN becomes a number",
        "dtypes.py",
        "tl.where(x == x, tl.minimum(tl.maximum(x, -limit), limit), x)",
        "tl.minimum(tl.maximum(x, -limit), limit)",
        "tests/spec/test_step.py",
    ),
    triton("moments move the wrong way", "step/settle.py", "1.0 / used, 1.0)", "used, 1.0)"),
    triton("a NaN is no reason to skip", "step/chunks.py", "if CHECK:\n            bad", "if False:\n            bad"),
    triton(
        "the first block of a chunk is left out of its Gram",
        "step/chunks.py",
        "acc += block_gram(x, SIDE",
        "acc += block_gram(y.to(TC), SIDE",
    ),
    triton(
        "traces are not made 1",
        "step/chunks.py",
        "tl.where(usable, 1.0 / tl.where(usable, trace, 1.0), 0.0), norm",
        "tl.where(usable, 1.0, 0.0), norm",
    ),
    triton(
        "RefLoRA-S forgets what the first update comes to",
        "step/adamw_scalar.py",
        "if (before & after) | returns:",
        "if False:",
    ),
    triton(
        "squares keep an older exponent",
        "step/scalar.py",
        "acc *= power_of_two(tl.maximum(2 * (exponent - larger), -1000))",
        "acc *= 1.0",
    ),
    triton("RefLoRA-S multiplies gradients the wrong way", "step/scalar.py", "= 1.0 / s, s", "= s, 1.0 / s"),
    triton(
        "S of a skipped row is what was there", "step/precondition.py", "if status == col.SKIPPED:", "if status < 0:"
    ),
    triton("P^T and P^-T change places", "step/refactor.py", "p_x, root, largest", "p_y, 1.0 / root, largest"),
    triton("v moves as m does", "step/update.py", "1.0 / turn, 1.0 / (turn * turn)", "1.0 / turn, 1.0 / turn"),
    triton("a saved S is not taken back", "step/settle.py", "elif saved == 1:", "elif saved == 2:"),
    triton("shrunk Grams of another trace", "step/mean.py", "((1.0 - weight) / rank)", "(1.0 - weight)", START),
    triton(
        "S of the start has its scale",
        "step/settle.py",
        "used = tl.where(useful & (start == 0), c, 1.0)",
        "used = tl.where(useful, c, 1.0)",
        START,
    ),
    triton(
        "RefLoRA-S forgets that it has begun",
        "step/adamw_scalar.py",
        "tl.where(phase == col.REFACTORED_UNITS, 0.0, phase)",
        "0.0 * phase",
        START,
    ),
    triton(
        "an idle expert's start goes on",
        "step/settle.py",
        "taken = tl.where((start != 0) & ((norm_a == 0) | (norm_b == 0)), 0, steps)",
        "taken = steps",
        COUNTS,
    ),
    triton(
        "ranks that are 0 count", "step/mean.py", "if rank < r:\n        # read", "if rank < 0:\n        # read", ABSENT
    ),
    triton(
        "absent ranks are filled before all have looked",
        "step/mean.py",
        "overwritten\n        tl.debug_barrier()\n        each",
        "overwritten\n        each",
        ABSENT,
    ),
)
