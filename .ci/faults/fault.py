"""What a deliberate fault is, and the tests that are asked."""

from __future__ import annotations

from dataclasses import dataclass

LINALG = "tests/test_linalg.py tests/test_eigh.py tests/test_adversarial_linalg.py"
STEPS = "tests/test_step.py tests/test_step_stored.py tests/test_functional.py tests/test_adamw.py"
START = "tests/test_start.py tests/test_start_states.py"
COUNTS, HOOKS = "tests/test_start_counts.py", "tests/test_hooks.py"
ABSENT, MEMBERS, OPTIONS = "tests/test_absent_ranks.py", "tests/test_membership.py", "tests/test_options.py"
TRITON = "tests/test_step.py tests/test_kernels.py tests/test_kernels_linalg.py tests/test_kernels_storages.py"
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
