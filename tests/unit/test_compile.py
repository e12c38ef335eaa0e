"""What a step launches compiles for sm_80 and sm_90 without a GPU, within its register and memory budget."""

import pytest

from benchmarks import compile_table
from reflora.kernels.options import launch_options
from reflora.kernels.variants import variant

# sm_86 and sm_89 have the least, 99 KiB a program
SHARED_LIMIT = 99 * 1024


@pytest.fixture
def compiled(monkeypatch):
    """Rows of benchmarks/compile_table.py, without processes of its own: to import triton takes longer than most."""
    monkeypatch.setattr(compile_table, "in_processes", lambda work, cases, _: [work(case) for case in cases])
    return lambda *arguments: compile_table.main(["--json", *arguments])


# (kernels, classes, capability) of what a step launches; benchmarks/results/compile_table.md has all
BUDGET = ("gram,update,foresee,turn", "16", 90), ("gram,settle,update", "32", 90), ("gram,update", "32", 80)


@pytest.mark.parametrize("kernels, classes, capability", BUDGET)
def test_kernels_compile_within_budget(kernels, classes, capability, compiled):
    words = ("--kernels", kernels, "--classes", classes, "--capabilities", str(capability))
    rows = compiled(*words, "--precisions", "float64")
    assert len(rows) == len(kernels.split(",")) * len(classes.split(","))
    for row in rows:
        assert row.shared <= SHARED_LIMIT and row.spills == 0, row


def test_products_are_fused_whatever_tritons_default_is(monkeypatch):
    """Triton 3.9 warns where a launch does not say, and from 3.10 on nothing is fused then."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend

    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    backend = CUDABackend(GPUTarget("cuda", 90, 32))
    assert not backend.parse_options({}).enable_fp_fusion
    assert backend.parse_options(launch_options(4)).enable_fp_fusion


def test_other_variants_of_the_step_compile(compiled):
    """Other storage types, a saved S, AMSGrad, gradient scaling, carried Grams."""
    rows = compiled("--variants", "--kernels", "gram,update", "--classes", "16", "--capabilities", "80")
    assert len(rows) == 4
    for row in rows:
        assert row.shared <= SHARED_LIMIT and row.spills == 0, row


def test_what_sums_both_grams_spills_little(compiled):
    """With float64 tensor cores fewer warps read less from shared memory: class 32 pays with a few spills a block."""
    rows = compiled("--variants", "--kernels", "grams,move", "--classes", "16,32", "--capabilities", "89,90")
    assert len(rows) == 12
    for row in rows:
        few = row.rank_class == 32 and row.num_warps < 4
        assert row.shared <= SHARED_LIMIT and row.spills <= (160 if few else 0), row


@pytest.mark.parametrize("name", compile_table.kernel_names())
def test_every_argument_of_a_kernel_has_a_type_or_a_value(name):
    """Ahead of a launch, as the compile table and `make gpu` build them."""
    kernel, signature, constants, _ = variant(name, 16, "float64", "float32")
    assert list(signature) == kernel.arg_names
    assert {argument for argument, kind in signature.items() if kind == "constexpr"} == set(constants)
