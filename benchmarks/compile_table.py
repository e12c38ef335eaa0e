"""Compiles every Triton kernel without a GPU and tables its registers, spills and shared memory, by architecture.

    python -m benchmarks.compile_table [--classes 16,32] [--capabilities 80,86,89,90,100] [--kernels update]

Writes benchmarks/results/compile_table.csv and .md.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from reflora.kernels.routes import ROUTES

CLASSES = tuple(ROUTES)
# by capability: most shared memory a block can opt in to, KiB (CUDA C++ Programming Guide, technical specifications)
SHARED_LIMITS = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227}
CAPABILITIES = tuple(SHARED_LIMITS)
PRECISIONS = ("float64", "float32")
RESULTS = Path(__file__).parent / "results"
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Case:
    """One compilation. storage: the type of the factors, or "mixed"; changed: constants other than the usual ones."""

    kernel: str
    rank_class: int
    precision: str
    storage: str
    capability: int
    changed: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Figures:
    """registers a thread; spills: bytes of local memory a thread; shared: bytes a program.

    limit: KiB of shared memory that the architecture grants a block; fits: whether shared is within.
    """

    kernel: str
    rank_class: int
    precision: str
    storage: str
    capability: int
    num_warps: int
    registers: int
    spills: int
    shared: int
    limit: int
    fits: str


def kernel_names() -> list[str]:
    """All kernels, as `reflora.kernels.variants` names them."""
    from reflora.kernels.variants import MATRIX_KERNELS, PAIR_KERNELS

    return [*PAIR_KERNELS, *MATRIX_KERNELS]


def cases(
    classes: Iterable[int],
    capabilities: Iterable[int],
    kernels: Iterable[str],
    storages: Iterable[str] = ("float32",),
    precisions: Iterable[str] = PRECISIONS,
) -> Iterator[Case]:
    """The main variants: float32 storage at both precisions."""
    for kernel in kernels:
        for rank_class in classes:
            for precision in precisions:
                for storage in storages:
                    for capability in capabilities:
                        yield Case(kernel, rank_class, precision, storage, capability)


def variants(classes: Iterable[int], capabilities: Iterable[int]) -> Iterator[Case]:
    """What the table leaves out: other storage types and the kernels' other modes."""
    amp = {"AMSGRAD": True, "grad_scale": "*fp32", "found_inf": "*fp32"}
    kept = {"SCHEDULED": True}
    others: list[tuple[str, str, str, dict[str, Any]]] = [
        ("solve", "float64", "mixed", {"SAVE": True}),
        ("apply", "float64", "mixed", {}),
        ("apply", "float32", "bfloat16", {"VECTOR": False}),
        ("squares", "float64", "float64", {}),
        ("refactor", "float32", "float64", {}),
        ("refactor", "float64", "float16", {}),
        ("gram", "float64", "bfloat16", kept),
        ("gram", "float64", "float64", {"CARRY": True, "CHECK": False, **amp}),
        ("update", "float64", "bfloat16", {"state": "float32", "seed": "i64"}),
        ("update", "float64", "float64", {"CARRY": True, **amp}),
        ("row", "float64", "mixed", {**kept, **amp}),
        ("row", "float64", "bfloat16", {"state": "float32", "MASTER": True}),
        ("foresee", "float64", "bfloat16", {"state": "float32", "seed": "i64"}),
        ("foresee", "float64", "float64", amp),
        ("grams", "float64", "float32", {"MOMENTUM": True}),
        ("move", "float64", "float32", {"CARRY": True}),
        ("move", "float64", "float32", {"CARRY": True, "MOMENTUM": True}),
        ("turn", "float64", "mixed", {"MASTER": True}),
        ("turn", "float64", "float64", amp),
        ("sqrtm", "float64", "float32", {"INVERSE": True}),
        ("eigh", "float64", "float64", {"WARM": True}),
        ("eigh", "float32", "float32", {"WARM": True, "VECTORS": False}),
    ]
    for kernel, precision, storage, changed in others:
        for rank_class in classes:
            for capability in capabilities:
                yield Case(kernel, rank_class, precision, storage, capability, tuple(changed.items()))


def build(case: Case) -> tuple[Any, dict[str, int]]:
    """Compile one case: (what Triton made, launch options). Needs TRITON_INTERPRET unset before triton is imported."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as triton_compile

    from reflora.kernels.variants import variant

    kernel, signature, constants, options = variant(
        case.kernel, case.rank_class, case.precision, case.storage, capability=case.capability, **dict(case.changed)
    )
    # torch's memory begins at multiples of 16 bytes, which a launch finds out
    pointers = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=pointers)
    compiled = triton_compile(source, target=GPUTarget("cuda", case.capability, 32), options=options)
    return compiled, options


def compile_case(case: Case) -> Figures:
    """Compile one case and read its cubin."""
    compiled, options = build(case)
    text = dump(compiled.asm["cubin"], "cuobjdump", "--dump-resource-usage")
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    spills = int(usage["STACK"]) + int(usage["LOCAL"])
    what = (case.kernel, case.rank_class, case.precision, case.storage, case.capability)
    shared, limit = compiled.metadata.shared, SHARED_LIMITS[case.capability]
    fits = "yes" if shared <= limit << 10 else "no"
    return Figures(*what, options["num_warps"], int(usage["REG"]), spills, shared, limit, fits)


def dump(cubin: bytes, tool: str, *arguments: str) -> str:
    """What a tool of the Triton package prints about a cubin."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(path), *arguments, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def in_processes(work: Callable[[Item], Result], items: Iterable[Item], workers: int = 2) -> list[Result]:
    """`work` of each item in fresh processes, without the interpreter, in the order given."""
    os.environ.pop("TRITON_INTERPRET", None)
    items = list(items)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(work, items))


def markdown(rows: list[Figures]) -> str:
    names = [field.name for field in fields(Figures)]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(str(getattr(row, name)) for name in names) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> list[Figures]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", default=",".join(map(str, CLASSES)))
    parser.add_argument("--capabilities", default="80,90", help=f"of {', '.join(map(str, CAPABILITIES))}")
    parser.add_argument("--kernels", help="default: all that reflora.kernels.variants names")
    parser.add_argument("--storages", default="float32")
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    parser.add_argument("--variants", action="store_true", help="the kernels' other modes in place of the table")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print rows as JSON lines and nothing else")
    parser.add_argument("--no-write", action="store_true", help="leave the files in results/ alone")
    options = parser.parse_args(arguments)
    classes = [int(c) for c in options.classes.split(",")]
    capabilities = [int(c) for c in options.capabilities.split(",")]
    unknown = [str(c) for c in capabilities if c not in SHARED_LIMITS]
    if unknown:
        parser.error(f"--capabilities: expected some of {', '.join(map(str, CAPABILITIES))}, got {', '.join(unknown)}")
    kernels = options.kernels.split(",") if options.kernels else kernel_names()
    words = (kernels, options.storages.split(","), options.precisions.split(","))
    chosen = cases(classes, capabilities, *words)
    if options.variants:
        chosen = (case for case in variants(classes, capabilities) if case.kernel in kernels)
    rows = in_processes(compile_case, chosen, options.workers)
    if options.json:
        print("\n".join(json.dumps(asdict(row)) for row in rows))
        return rows
    print(markdown(rows))
    if not (options.no_write or options.variants):
        import triton

        units = "Spills are bytes of stack and local memory a thread, shared memory is bytes a program"
        head = f"Triton {triton.__version__}. {units}; limit: KiB that the architecture grants a block.\n\n"
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "compile_table.md").write_text(head + markdown(rows))
        with open(RESULTS / "compile_table.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Figures)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
    return rows


if __name__ == "__main__":
    main()
