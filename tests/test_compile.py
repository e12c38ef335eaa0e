"""Every Triton kernel compiles for sm_80 and sm_90 without a GPU, within its register and memory budget."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# sm_86 and sm_89 have the least, 99 KiB a program
SHARED_LIMIT = 99 * 1024


def compile_table(*arguments):
    """Rows of benchmarks/compile_table.py, from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.compile_table", "--json", "--workers", "1", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


STEP = "gram,update,foresee,turn"
# (kernels, classes, capability): the step's everywhere, the others where they take most; the table has all
BUDGET = (
    (f"{STEP},solve,refactor,apply,squares,balance", "16,32", 90), ("gram,update", "64", 90), ("update", "128", 90),
    ("gram,update", "32", 80), ("row,polar,geometric_mean,sqrtm,eigh,svd,inv_root", "16", 90),
    # without the older float64 tensor cores, which takes more registers
    ("polar,eigh,svd", "32", 86),
)  # fmt: skip


@pytest.mark.parametrize("kernels, classes, capability", BUDGET)
def test_kernels_compile_within_budget(kernels, classes, capability):
    words = ("--kernels", kernels, "--classes", classes, "--capabilities", str(capability))
    rows = compile_table(*words, "--precisions", "float64")
    assert len(rows) == len(kernels.split(",")) * len(classes.split(","))
    for row in rows:
        assert row["shared"] <= SHARED_LIMIT and row["spills"] == 0, row


def test_other_variants_of_the_step_compile():
    """Other storage types, RefLoRA-S, SAVED and IDENTITY steps, AMSGrad, gradient scaling, carried Grams."""
    rows = compile_table("--variants", "--kernels", STEP, "--classes", "16", "--capabilities", "80")
    assert len(rows) == 8
    for row in rows:
        assert row["shared"] <= SHARED_LIMIT and row["spills"] == 0, row
