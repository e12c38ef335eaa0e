"""What a deliberate fault is, and the tests that are asked."""

from __future__ import annotations

from dataclasses import dataclass


def files(folder: str, names: str) -> str:
    return " ".join(f"tests/{folder}/test_{name}.py" for name in names.split())


LINALG = f"{files('spec', 'linalg eigh')} {files('property', 'adversarial_linalg')}"
STEPS = files("spec", "step step_stored functional adamw adamw_changes")
START = files("spec", "start start_states")
COUNTS, HOOKS = files("spec", "start_counts"), files("spec", "hooks")
ABSENT, MEMBERS, OPTIONS = files("spec", "absent_ranks"), files("integration", "membership"), files("spec", "options")
TRITON = f"{files('spec', 'step')} {files('unit', 'kernels kernels_linalg kernels_storages')}"
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
    return Fault(what, f"csrc/{file}", before, after, f"{tests} tests/property/test_adversarial.py", "cpp")


def triton(what: str, file: str, before: str, after: str, tests: str = TRITON) -> Fault:
    return Fault(what, f"reflora/kernels/{file}", before, after, tests, "", compiled=True)


def python(what: str, file: str, before: str, after: str, tests: str, only: str = "") -> Fault:
    return Fault(what, f"reflora/{file}", before, after, tests, only)
