"""The model of time on an H100: its units one by one, and a step that it predicts from compiled code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import prediction
from benchmarks.prediction import H100, Launch, Program

ROOT = Path(__file__).parents[2]
SECOND = H100.clock


def test_programs_take_what_bounds_them() -> None:
    """A chain, a unit of the multiprocessor, or the memory; one program alone has all of its multiprocessor."""
    assert Launch("k", 1, [Program(SECOND, 1, 1)]).seconds() == pytest.approx(1)
    assert Launch("k", 1, [Program(1, SECOND, 1)]).seconds() == pytest.approx(1)
    assert Launch("k", 1, [Program(1, 1, H100.most_of_memory)]).seconds() == pytest.approx(1)
    everywhere = [Program(1, 1, H100.machine.copy / H100.multiprocessors)] * H100.multiprocessors
    assert Launch("k", 1, everywhere).seconds() == pytest.approx(1)


def test_programs_that_share_a_multiprocessor_wait_together_and_work_in_turns() -> None:
    twice = 2 * H100.multiprocessors
    assert Launch("k", 2, [Program(SECOND, 1, 1)] * twice).seconds() == pytest.approx(1)
    assert Launch("k", 2, [Program(1, SECOND, 1)] * twice).seconds() == pytest.approx(2)
    # one place: one after the other
    assert Launch("k", 1, [Program(SECOND, 1, 1)] * twice).seconds() == pytest.approx(2)


def test_the_last_programs_are_alone() -> None:
    """Who is left has what the others no longer take."""
    long, short = Program(1, 2 * SECOND, 1), Program(1, SECOND, 1)
    assert Launch("k", 2, [long, *[short] * (2 * H100.multiprocessors - 1)]).seconds() == pytest.approx(3)


def test_places() -> None:
    assert H100.places(warps=4, registers=128, shared=0) == 4
    assert H100.places(warps=4, registers=129, shared=0) == 3
    assert H100.places(warps=4, registers=32, shared=100_000) == 2
    assert H100.places(warps=16, registers=128, shared=0) == 1


@pytest.mark.kernels
def test_a_step_is_predicted_from_compiled_code(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.prediction", "--cases", "minilm:8", "--out", str(tmp_path)]
    asked = [name for name in prediction.METHODS if "," not in name]
    command += ["--methods", *asked]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    text = (tmp_path / "prediction_h100.md").read_text()
    assert "nothing here is measured" in text and done.stdout.strip() in text
    for line, method in zip(text.splitlines()[-len(asked) :], asked):
        case, name, launches, together, step, adamw, ratio = (cell.strip() for cell in line.split("|")[1:-1])
        times = [float(time) for time in launches.split(" + ")]
        assert (case, name) == ("minilm r=8", method)
        assert all(1 < time < 100 for time in times) and all(int(n) >= 1 for n in together.split(", "))
        assert float(step) == pytest.approx(sum(times) + 1.5 * len(times), abs=1)
        assert float(ratio) == pytest.approx(float(step) / float(adamw), rel=0.2)
