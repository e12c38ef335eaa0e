"""Figure 2's orderings, on the numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bench_cases import rows_of

from benchmarks.paper import matrix_factorization as mf


def losses(problem: mf.Problem, method: str, lr: float, steps: int = 100) -> list[float]:
    return [float(row[3]) for row in mf.run(problem, method, lr, steps)]  # type: ignore[arg-type]


def reached(values: list[float], level: float = 1e-3) -> int:
    return next((step for step, value in enumerate(values) if value < level), len(values))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_papers_orderings(seed: int) -> None:
    """Section 4.1: LoRA crawls at 0.01 and diverges at 0.03; RefLoRA is fastest at both, and ahead of ScaledGD."""
    problem = mf.Problem.draw(128, 100, 10, seed)
    found = {(method, lr): losses(problem, method, lr) for method in mf.METHODS for lr in mf.RATES}
    assert found["LoRA", 0.01][-1] > 0.05 * found["LoRA", 0.01][0]
    assert found["LoRA", 0.03][-1] > 1e6 * found["LoRA", 0.03][0]
    # about 38 and 11 steps in the paper
    assert 30 <= reached(found["RefLoRA", 0.01]) <= 50 and 8 <= reached(found["RefLoRA", 0.03]) <= 16
    for lr in mf.RATES:
        assert reached(found["RefLoRA", lr]) < reached(found["RefLoRA-S", lr]) < 100
        assert found["ScaledGD", lr][-1] > 1e6 * found["RefLoRA", lr][-1]
    # about 1e2 and 3 in the paper
    assert 50 < found["ScaledGD", 0.01][-1] < 200 and 1 < found["ScaledGD", 0.03][-1] < 6


def test_refactored_factors_stay_balanced_and_loras_do_not() -> None:
    problem = mf.Problem.draw(128, 100, 10, 0)
    for row in mf.run(problem, "RefLoRA", 0.01, 60)[3:]:
        assert row[4] == pytest.approx(row[5], rel=0.1)
    last = mf.run(problem, "LoRA", 0.01, 60)[-1]
    assert last[4] > 3 * last[5]  # type: ignore[operator]


def test_all_start_with_the_same_plain_step() -> None:
    problem = mf.Problem.draw(20, 12, 3, 0)
    rows = [mf.run(problem, method, 0.01, 1) for method in mf.METHODS]
    assert all(other == [[method, *row[1:]] for row in rows[0]] for other, method in zip(rows, mf.METHODS))
    assert torch.linalg.matrix_rank(problem.M) == 3


def test_program_writes_its_rows_and_figures(tmp_path: Path) -> None:
    mf.main(["--size", "12", "10", "2", "--steps", "5", "--out", str(tmp_path)])
    rows = rows_of(tmp_path / "matrix_factorization.csv")
    assert len(rows) == 8 * 6 and {row["method"] for row in rows} == set(mf.METHODS)
    assert (tmp_path / "matrix_factorization.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "matrix_factorization.svg").read_text()
