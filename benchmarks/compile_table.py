"""Compiles every Triton kernel for sm_80 and sm_90 without a GPU and tables its registers, spills and shared memory.

    python -m benchmarks.compile_table [--classes 16,32] [--capabilities 80,90] [--kernels precondition] [--no-write]

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
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

CLASSES = (16, 32, 64, 128)
CAPABILITIES = (80, 90)
PRECISIONS = ("float64", "float32")
PAIR_KERNELS = ("precondition", "refactor", "adamw")
MATRIX_KERNELS = ("polar", "geometric_mean", "sqrtm")
RESULTS = Path(__file__).parent / "results"


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
    """registers a thread; spills: bytes of local memory a thread; shared: bytes a program; seconds of compile time."""

    kernel: str
    rank_class: int
    precision: str
    storage: str
    capability: int
    num_warps: int
    registers: int
    spills: int
    shared: int
    seconds: float


def cases(
    classes: Iterable[int] = CLASSES,
    capabilities: Iterable[int] = CAPABILITIES,
    kernels: Iterable[str] = PAIR_KERNELS + MATRIX_KERNELS,
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
    others: list[tuple[str, str, str, dict[str, Any]]] = [
        ("precondition", "float64", "mixed", {}),
        ("precondition", "float32", "bfloat16", {}),
        ("precondition", "float64", "float16", {"SCALAR": True}),
        ("refactor", "float32", "float64", {}),
        ("refactor", "float64", "float16", {}),
        ("adamw", "float64", "bfloat16", {}),
        ("adamw", "float64", "float64", {"KEEP": True, **amp}),
        ("adamw", "float64", "bfloat16", {"SOURCE": 2, **amp}),
        ("adamw", "float64", "float32", {"SOURCE": 0}),
        ("adamw", "float64", "float32", {"SOURCE": 0, "BEFORE": True, "AFTER": True, **amp}),
    ]
    for kernel, precision, storage, changed in others:
        for rank_class in classes:
            for capability in capabilities:
                yield Case(kernel, rank_class, precision, storage, capability, tuple(changed.items()))


def compile_case(case: Case) -> Figures:
    """Compile one case and read its cubin; needs TRITON_INTERPRET unset before triton is imported."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as triton_compile

    from reflora.kernels.variants import variant

    kernel, signature, constants, options = variant(
        case.kernel, case.rank_class, case.precision, case.storage, **dict(case.changed)
    )
    source = ASTSource(kernel, signature, constexprs=constants)
    start = time.perf_counter()
    compiled = triton_compile(source, target=GPUTarget("cuda", case.capability, 32), options=options)
    seconds = time.perf_counter() - start
    registers, stack = _resources(compiled.asm["cubin"])
    what = (case.kernel, case.rank_class, case.precision, case.storage, case.capability)
    shared = compiled.metadata.shared
    return Figures(*what, options["num_warps"], registers, stack, shared, round(seconds, 1))


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack frame and local memory) of a cubin, read by the cuobjdump in the Triton package."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])


def compile_all(chosen: Iterable[Case], workers: int = 2) -> list[Figures]:
    """Compile in fresh processes, without the interpreter, in the order given."""
    os.environ.pop("TRITON_INTERPRET", None)
    chosen = list(chosen)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(compile_case, chosen))


def markdown(rows: list[Figures]) -> str:
    names = [field.name for field in fields(Figures) if field.name != "seconds"]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(str(getattr(row, name)) for name in names) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> list[Figures]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", default=",".join(map(str, CLASSES)))
    parser.add_argument("--capabilities", default=",".join(map(str, CAPABILITIES)))
    parser.add_argument("--kernels", default=",".join(PAIR_KERNELS + MATRIX_KERNELS))
    parser.add_argument("--storages", default="float32")
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    parser.add_argument("--variants", action="store_true", help="the kernels' other modes in place of the table")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print rows as JSON lines and nothing else")
    parser.add_argument("--no-write", action="store_true", help="leave the files in results/ alone")
    options = parser.parse_args(arguments)
    classes = [int(c) for c in options.classes.split(",")]
    capabilities = [int(c) for c in options.capabilities.split(",")]
    words = (options.kernels.split(","), options.storages.split(","), options.precisions.split(","))
    chosen = variants(classes, capabilities) if options.variants else cases(classes, capabilities, *words)
    rows = compile_all(chosen, options.workers)
    if options.json:
        print("\n".join(json.dumps(asdict(row)) for row in rows))
        return rows
    print(markdown(rows))
    if not (options.no_write or options.variants):
        import triton

        units = "Spills are bytes of stack and local memory a thread, shared memory is bytes a program."
        head = f"Triton {triton.__version__}. {units}\n\n"
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "compile_table.md").write_text(head + markdown(rows))
        with open(RESULTS / "compile_table.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Figures)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
    return rows


if __name__ == "__main__":
    main()
