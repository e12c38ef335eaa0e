"""Deliberate faults, one at a time in a copy of the checkout: each must make a test fail. `make mutants`.

Prints a table of the faults and of the test that caught each; leaves with 1 where one was not caught.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
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
        "pair.py",
        "(j < r)[:, None] & (k < n)[None, :]",
        "(j < RC)[:, None] & (k < n)[None, :]",
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
        f"tl.store(p_last + o, b.to(TC), mask=mask)\n{SLOT_BARRIER}",
        "tl.store(p_last + o, b.to(TC), mask=mask)\n",
    ),
    triton("arrivals order no memory", "adamw.py", 'sem="acq_rel"', 'sem="relaxed"'),
    triton("RefLoRA-S: arrivals order no memory", "adamw_scalar.py", 'sem="acq_rel"', 'sem="relaxed"'),
    triton("counts are written while others read them", "settle.py", "written\n        tl.debug_barrier()", "written"),
    triton(
        "a Gram's diagonal is overwritten while it is read",
        "chunks.py",
        f"overwritten next\n{SLOT_BARRIER}",
        "overwritten next\n",
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
        "the Gram of side B is of its rows",
        "gram.py",
        "tl.dot(tl.trans(left), x, input_precision",
        "tl.dot(tl.trans(x), left, input_precision",
    ),
    triton(
        "traces are not made 1",
        "gram.py",
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
        "balance.py",
        "acc *= power_of_two(tl.maximum(2 * (exponent - larger), -1000))",
        "acc *= 1.0",
        "tests/test_kernels_routes.py",
    ),
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
        "count + (index in self._went_backward)",
        "count + 0",
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


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", help="faults whose file or text has this in it")
    parser.add_argument("--out", type=Path, help="CSV of what caught them")
    options = parser.parse_args()
    chosen = [fault for fault in FAULTS if options.only in f"{fault.file} {fault.what}"]
    tree = ROOT / "build" / "mutants"
    configure(tree)
    lines, missed = [], 0
    for number, fault in enumerate(chosen, 1):
        began = time.perf_counter()
        caught = tried(tree, fault)
        missed += not caught
        lines.append((fault.file, fault.what, caught or "NOT CAUGHT"))
        took = time.perf_counter() - began
        print(f"{number}/{len(chosen)}  {fault.file}: {fault.what}\n      {lines[-1][2]}  ({took:.0f} s)", flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([("file", "fault", "caught by"), *lines])
    print(f"{len(chosen) - missed} of {len(chosen)} faults are caught")
    return int(missed > 0)


def configure(tree: Path) -> None:
    """A copy of the tracked files with a build of its own."""
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    import pybind11

    # one instruction set of three: a third of the time
    options = [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", "-DREFLORA_X86=0"]
    quiet(["cmake", "-S", ".", "-B", "build", "-G", "Ninja", *options], tree)
    build(tree)


def build(tree: Path) -> None:
    quiet(["cmake", "--build", "build"], tree)
    for core in (tree / "build").glob("_C*.so"):
        shutil.copy(core, tree / "reflora" / core.name)


def quiet(command: list[str], folder: Path) -> None:
    # cmake and ninja are beside the interpreter
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(command, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed\n{done.stdout[-3000:]}{done.stderr[-3000:]}")


def tried(tree: Path, fault: Fault) -> str:
    """The first test that fails with the fault in place; "" for none."""
    path = tree / fault.file
    sound = path.read_text()
    if sound.count(fault.before) != 1:
        raise SystemExit(f"{fault.file}: expected one {fault.before!r}, found {sound.count(fault.before)}")
    path.write_text(sound.replace(fault.before, fault.after))
    try:
        build(tree)  # whatever the fault is: the core may still have the last one in it
        return first_failure(tree, fault)
    finally:
        path.write_text(sound)


def first_failure(tree: Path, fault: Fault) -> str:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "--tb=no",
        "-rfE",
    ]
    only = ["-k", fault.only] if fault.only else []
    paths = [tree]
    if fault.compiled:
        only += ["-p", "ptxsim.plugin", "-m", "kernels"]
        paths += [tree / "tools" / "ptxsim", tree / "tests"]
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    env.update(PYTHONPATH=os.pathsep.join(map(str, paths)), PTXSIM_CACHE=str(tree / "build" / "ptxsim"))
    done = subprocess.run([*command, *only, *fault.tests.split()], cwd=tree, env=env, capture_output=True, text=True)
    if done.returncode < 0:
        return f"killed by signal {-done.returncode}"
    found = re.search(r"^(?:FAILED|ERROR) (.+?::.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if found is None and done.returncode:
        raise SystemExit(f"{fault.what}: no test ran\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return found[1].removeprefix("tests/") if found else ""


if __name__ == "__main__":
    sys.exit(main())
