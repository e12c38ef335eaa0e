"""A static count of the instructions of loops, read off SASS (the machine code of NVIDIA GPUs) without a GPU.

    python -m benchmarks.sass [--classes 16,32] [--capabilities 80,90] [--no-write]

Writes benchmarks/results/instructions.md: the loops of the r x r solve, instructions a round, where a round is a pivot
of an elimination or a Newton-Schulz step. Everything but `measure` and the program reads plain text, from cuobjdump
-sass or from nvdisasm, which also names source lines (-g).
"""

from __future__ import annotations

import argparse
import ast
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

from . import compile_table
from .compile_table import Case

CAPABILITIES = (80, 90)
# the kernels that have the loops with least around them: polar for Gauss-Jordan, geometric_mean for Cholesky too, eigh
# for Jacobi rotations
KERNELS = ("polar", "geometric_mean", "eigh")
KINDS = {
    "DFMA": ("DFMA",), "DMUL+DADD": ("DMUL", "DADD"), "DMMA": ("DMMA",), "FFMA": ("FFMA",), "LDS": ("LDS",),
    "STS": ("STS",), "LDG": ("LDG", "LD"), "STG": ("STG", "ST"), "local": ("LDL", "STL"), "SHFL": ("SHFL",),
    "BAR": ("BAR",),
}  # fmt: skip
RECIPROCAL = "MUFU.RCP"
SOURCES = Path(__file__).parents[1] / "reflora/kernels"
FAR = 1 << 40  # address of a label that is not in the function: no branch to it goes back

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"^(\.L\w+):")
_NAMED = re.compile(r"`\((\.L\w+)\)")
_TARGET = re.compile(r"\b(0x[0-9a-f]+)$")
_LINE = re.compile(r'^\s*//## File "([^"]+)", line (\d+)')
_START = re.compile(r"^\s*Function : |^\.text\.")


@dataclass(frozen=True)
class Instruction:
    """address in its function, opcode with modifiers, operands, and (file, line) it was compiled from, if known."""

    address: int
    opcode: str
    operands: str
    source: tuple[str, int] | None = None

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]


@dataclass(frozen=True)
class Loop:
    """The instructions from the target of a backward branch to that branch."""

    body: tuple[Instruction, ...]

    @property
    def rounds(self) -> int:
        """How many pivots a pass eliminates: each is divided by once, and the compiler may have unrolled the loop."""
        return sum(i.opcode.startswith(RECIPROCAL) for i in self.body)

    def counts(self) -> dict[str, int]:
        """Instructions of a pass by KINDS, and in total; a warp issues them all."""
        names = Counter(i.name for i in self.body)
        return {**{kind: sum(names[n] for n in members) for kind, members in KINDS.items()}, "total": len(self.body)}

    def function(self) -> str:
        """Where most of it comes from, library code aside: "solve.invert_transposed"; "?" without source lines."""
        places = Counter(filter(None, (_function(*i.source) for i in self.body if i.source)))
        return places.most_common(1)[0][0] if places else "?"


# ---- reading


def functions(text: str) -> list[list[Instruction]]:
    """The instructions of each function in a listing, in order."""
    found: list[list[Instruction]] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    source: tuple[str, int] | None = None
    for line in text.splitlines():
        if _START.match(line):
            _resolve(found, labels)
            found.append([])
            labels, waiting, source = {}, [], None
        elif not found:
            continue
        elif match := _LABEL.match(line):
            waiting.append(match[1])
        elif match := _LINE.match(line):
            source = (match[1], int(match[2]))
        elif match := _INSTRUCTION.match(line):
            address = int(match[1], 16)
            labels.update(dict.fromkeys(waiting, address))
            waiting = []
            found[-1].append(Instruction(address, match[3], match[4], source))
    _resolve(found, labels)
    return [function for function in found if function]


def _resolve(found: list[list[Instruction]], labels: dict[str, int]) -> None:
    """Put addresses in place of the labels of the function that was read last."""
    if found:
        here = found[-1]
        found[-1] = [replace(i, operands=_NAMED.sub(lambda m: hex(labels.get(m[1], FAR)), i.operands)) for i in here]


def loops(function: Sequence[Instruction]) -> list[Loop]:
    """The innermost loops, in order. Subroutines and slow paths, after the last EXIT, are left out."""
    ends = [number for number, i in enumerate(function) if i.name == "EXIT"]
    main = function[: ends[-1] + 1] if ends else function
    spans: dict[int, int] = {}
    for i in main:
        match = _TARGET.search(i.operands) if i.name == "BRA" and not i.opcode.startswith("BRA.DIV") else None
        target = int(match[1], 16) if match else i.address + 1
        if target <= i.address:
            # branches back to one place are one loop
            spans[target] = max(i.address, spans.get(target, 0))
    pairs = sorted(spans.items())
    inner = [(a, b) for a, b in pairs if not any((a, b) != (c, d) and a <= c and d <= b for c, d in pairs)]
    return [Loop(tuple(i for i in main if a <= i.address <= b)) for a, b in inner]


def elimination_loops(text: str) -> list[Loop]:
    """The innermost loops of a listing that divide: by a pivot."""
    return [loop for function in functions(text) for loop in loops(function) if loop.rounds]


@cache
def _definitions(path: str) -> list[tuple[int, int, str]]:
    file = Path(path)
    if not file.exists():
        # Triton's cache knows kernels by their text: this one was compiled in another copy of the package, now gone
        file = SOURCES / file.name
    if not file.exists():
        return []
    tree = ast.parse(file.read_text())
    return [(n.lineno, n.end_lineno or n.lineno, n.name) for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]


def _function(path: str, line: int) -> str | None:
    """Which function of ours a line is in."""
    if "triton/language" in path:
        return None
    names = [name for first, last, name in _definitions(path) if first <= line <= last]
    return f"{Path(path).stem}.{names[-1]}" if names else None


# ---- the program


@dataclass(frozen=True)
class Row:
    """One elimination loop: instructions that each of `warps` warps issues a round."""

    kernel: str
    loop: str
    rank_class: int
    precision: str
    capability: int
    warps: int
    rounds: int
    counts: dict[str, float]


def measure(case: Case) -> list[Row]:
    """The elimination loops of a kernel as Triton compiles it."""
    compiled, options = compile_table.build(case)
    text = compile_table.dump(compiled.asm["cubin"], "nvdisasm", "-g")
    what = (case.rank_class, case.precision, case.capability, options["num_warps"])
    return [
        Row(case.kernel, loop.function(), *what, loop.rounds, {k: n / loop.rounds for k, n in loop.counts().items()})
        for loop in elimination_loops(text)
    ]


def markdown(rows: Sequence[Row]) -> str:
    """A table; loops of a kernel that count the same stand once."""
    head = ["loop", "kernel", "class", "sm", "warps", "rounds a pass", *KINDS, "total"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        numbers = [f"{value:g}" for value in row.counts.values()]
        what = [row.rank_class, row.capability, row.warps, row.rounds]
        lines.append("| " + " | ".join([row.loop, row.kernel, *map(str, what), *numbers]) + " |")
    return "\n".join(dict.fromkeys(lines)) + "\n"


_TEXT = """# Instructions a round of the r x r solve

Counted in the machine code that Triton {version} makes for float64, by `python -m benchmarks.sass`, without a GPU;
nothing here is a time. **A round is one pivot** of an elimination, Cholesky with its inverse (`eliminate`; in the step
both Grams of a layer in one round) or Gauss-Jordan (`invert_transposed`, only for `linalg.polar`, whose X comes without
an inverse), **or one Newton-Schulz step** of the polar factor (4 to 13 in all) where X stays in registers (in the step
up to class 64 on tensor cores), **or one round of Jacobi rotations** (`meet`; n rounds are a sweep, 4 to 9 sweeps in
all) or one Householder reflection (`reflect`) of an eigendecomposition (in class 128 two divisions a round: each counts
twice). Loops counted are innermost ones that divide; "loop" is the function that most of the instructions come from; a
kernel that has the loop twice, compiled differently, has two rows.

Each of a program's warps issues the whole row each round. Rounds depend on each other, so the length of a round is the
chain through its reductions (SHFL, then STS, BAR, LDS between warps) and its division, not the sum of the row. "local"
are spills. The slow path of the division (denormal pivots) is a subroutine and not counted.

"""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", default=",".join(map(str, compile_table.CLASSES)))
    parser.add_argument("--capabilities", default=",".join(map(str, CAPABILITIES)))
    parser.add_argument("--kernels", default=",".join(KERNELS))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print rows as JSON lines and nothing else")
    parser.add_argument("--no-write", action="store_true", help="leave the file in results/ alone")
    options = parser.parse_args(arguments)
    classes, capabilities = ([int(n) for n in text.split(",")] for text in (options.classes, options.capabilities))
    chosen = compile_table.cases(classes, capabilities, options.kernels.split(","), precisions=("float64",))
    rows = [row for rows in compile_table.in_processes(measure, chosen, options.workers) for row in rows]
    if options.json:
        print("\n".join(json.dumps(asdict(row)) for row in rows))
        return
    print(markdown(rows))
    if not options.no_write:
        import triton

        path = compile_table.RESULTS / "instructions.md"
        path.write_text(_TEXT.format(version=triton.__version__) + markdown(rows))


if __name__ == "__main__":
    main()
