"""Loops are found and counted in machine code, and the tables of compiled kernels have what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import compile_table, sass
from reflora.kernels import solve

ROOT = Path(__file__).parents[2]
LISTING = """
	code for sm_90
		Function : small_kernel
        /*0000*/                   MOV R1, c[0x0][0x28] ;               /* 0x00000a00ff017624 */
                                                                        /* 0x000fe400078e00ff */
        /*0010*/                   DADD R2, R2, R4 ;
        /*0020*/                   LDG.E.64 R2, [R4.64] ;
        /*0030*/                   DFMA R8, R2, R4, R6 ;
        /*0040*/                   MUFU.RCP64H R9, R8 ;
        /*0050*/               @P1 BRA 0x70 ;
        /*0060*/                   CALL.REL.NOINC 0xc0 ;
        /*0070*/                   SHFL.BFLY PT, R3, R2, 0x8, 0x1f ;
        /*0080*/              @!P0 BRA 0x30 ;
        /*0090*/               @P2 BRA P3, 0x10 ;
        /*00a0*/                   STS.64 [R4], R8 ;
        /*00b0*/                   EXIT ;
        /*00c0*/                   DFMA R8, R2, R4, R6 ;
        /*00d0*/                   MUFU.RCP R9, R8 ;
        /*00e0*/                   BRA 0xc0 ;
"""


def labelled() -> str:
    """The same in the form of nvdisasm: labels for targets, and source lines."""
    text = LISTING.replace("\t\tFunction : small_kernel", ".text.small_kernel:").replace("0x30 ;", "`(.L_x_1) ;")
    mark = f'\t//## File "{Path(__file__)}", line {labelled.__code__.co_firstlineno}\n'
    return text.replace("        /*0030*/", f".L_x_1:\n{mark}        /*0030*/")


@pytest.mark.parametrize("text", [lambda: LISTING, labelled], ids=["cuobjdump", "nvdisasm"])
def test_innermost_loop_is_counted(text: Callable[[], str]) -> None:
    """The outer loop is not innermost, the one behind EXIT is a subroutine, the forward branch is none."""
    (loop,) = sass.elimination_loops(text())
    assert (loop.body[0].address, loop.body[-1].address, loop.rounds) == (0x30, 0x80, 1)
    assert {kind: number for kind, number in loop.counts().items() if number} == {"DFMA": 1, "SHFL": 1, "total": 6}
    assert loop.function() == ("?" if text() == LISTING else "test_sass.labelled")


def test_a_kernel_from_the_cache_of_a_copy_that_is_gone() -> None:
    mark = f'"{Path(__file__)}", line {labelled.__code__.co_firstlineno}'
    gone = f'"/gone/reflora/kernels/solve.py", line {solve.polar_factor.fn.__code__.co_firstlineno + 1}'
    (loop,) = sass.elimination_loops(labelled().replace(mark, gone))
    assert loop.function() == "solve.polar_factor"


def test_unrolled_loop_counts_its_pivots() -> None:
    (loop,) = sass.elimination_loops(LISTING.replace("SHFL.BFLY PT, R3, R2, 0x8, 0x1f ;", "MUFU.RCP R3, R2 ;"))
    assert loop.rounds == 2


def loops_of(kernel: str, rank_class: int) -> list[sass.Row]:
    cases = compile_table.cases([rank_class], [90], [kernel], precisions=("float64",))
    return [row for case in cases for row in sass.measure(case)]


def test_loops_of_a_real_kernel_are_found() -> None:
    """The elimination has no products of matrices in it, the Newton-Schulz step has them on the tensor cores."""
    rows = loops_of("polar", 16)
    assert {row.loop for row in rows} == {"solve.invert_transposed", "solve.orthogonalised"}
    for row in rows:
        assert row.rounds == 1 and row.counts["DFMA"] > 0 and 50 < row.counts["total"] < 2000, row
        assert (row.counts["DMMA"] > 0) == (row.loop == "solve.orthogonalised"), row


def test_a_pivot_of_the_step_is_short() -> None:
    """Shuffles alone, in every version of Triton: no shared memory and no barrier, whatever the class."""
    (counts,) = [row.counts for row in loops_of("settle", 32) if row.loop == "cholesky.eliminate"]
    assert counts["SHFL"] > 0 and counts["total"] < 160, counts
    assert counts["BAR"] == counts["LDS"] == counts["local"] == 0, counts


def test_table_has_every_architecture_and_its_limit() -> None:
    """As the program prints it, in a process of its own."""
    capabilities = ",".join(map(str, compile_table.CAPABILITIES))
    chosen = f"--json --kernels apply --classes 16 --precisions float32 --capabilities {capabilities}"
    command = [sys.executable, "-m", "benchmarks.compile_table", *chosen.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["capability"], row["limit"]) for row in rows] == list(compile_table.SHARED_LIMITS.items())
    assert all(row["fits"] == "yes" and row["registers"] > 0 for row in rows)


def test_table_names_the_kernels_of_the_package() -> None:
    from reflora.kernels.variants import MATRIX_KERNELS, PAIR_KERNELS

    assert compile_table.kernel_names() == [*PAIR_KERNELS, *MATRIX_KERNELS]
