"""Every Triton kernel compiles for sm_80 and sm_90 without a GPU, within its register and memory budget."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# sm_86 and sm_89 have the least, 99 KiB a program
SHARED_LIMIT = 99 * 1024


def compile_table(*arguments):
    """Rows of benchmarks/compile_table.py, from a process without the interpreter, whose flag changes triton.jit."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.compile_table", "--json", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_kernels_compile_within_budget():
    rows = compile_table("--classes", "16,32", "--precisions", "float64")
    assert len(rows) == 13 * 2 * 2
    step = ("--kernels", "gram,update,precondition", "--capabilities", "90")
    rows += compile_table("--classes", "64", "--precisions", "float64", *step)
    # without the older float64 tensor cores, which takes more registers
    matrices = ("--kernels", "polar,eigh,svd", "--capabilities", "86")
    rows += compile_table("--classes", "32", "--precisions", "float64", *matrices)
    for row in rows:
        assert row["shared"] <= SHARED_LIMIT, row
        assert row["spills"] == 0, row


def test_other_variants_compile():
    """Other storage types, the float32 solve, RefLoRA-S, SAVED and IDENTITY steps, AMSGrad, gradient scaling."""
    rows = compile_table("--variants", "--classes", "16", "--capabilities", "80")
    assert len(rows) == 18
    for row in rows:
        assert row["shared"] <= SHARED_LIMIT and row["spills"] == 0, row
