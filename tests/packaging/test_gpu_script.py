"""`.ci/gpu` without a GPU: its parts run, report and go on after a failure, and their commands are ones that parse."""

from __future__ import annotations

import os
import shlex
import shutil
from importlib import import_module
from pathlib import Path

import processes
import pytest

from benchmarks import kernels

PARTS = "build compile smoke pytest memcheck racecheck step profile throughput eigh compare memory llama ncu glue"
STUB = """#!/usr/bin/env bash
name=${0##*/}
line=$(printf '%q ' "$name" "$@")
echo "$line" >>"$COMMANDS"
[[ "$*" != *"${BROKEN:-no such argument}"* ]] || exit 3
"""


def run(folder: Path, without: str = "", **settings: str) -> tuple[int, list[list[str]], str]:
    """(exit code, commands, summary) of the script, every tool of which writes down how it was called and does nothing.

    But for `timeout`, which goes on to what it is to run.
    """
    tools = folder / "tools"
    tools.mkdir(parents=True)
    for name in {"python", "ncu", "compute-sanitizer", "nvidia-smi", "timeout"} - set(without.split()):
        (tools / name).write_text(STUB + 'shift 5; "$@"\n' * (name == "timeout"))
        (tools / name).chmod(0o755)
    out, called = folder / "out", folder / "commands"
    env = {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": str(tools / "python"), "COMMANDS": str(called)}
    done = processes.run([".ci/gpu", str(out)], DATA=str(folder), **env, **settings)
    return done.returncode, list(map(shlex.split, called.open())), (out / "summary.txt").read_text()


def test_every_part_runs_a_command_that_parses_and_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, commands, summary = run(tmp_path, PARTS=PARTS)
    assert code == 0, summary
    for part in [*PARTS.split(), "glue-table"]:
        assert f"==== {part}: ok in " in summary
    for program in kernels.PROGRAMS:
        monkeypatch.setattr(program, "run", lambda parser, options: None)
    modules = []
    for name, *arguments in commands:
        if "-m" in arguments and name != "timeout":
            module, *options = arguments[arguments.index("-m") + 1 :]
            modules.append((name, module))
            if module == "pytest":
                assert all((processes.ROOT / option).is_file() for option in options if option.startswith("tests/"))
            else:  # leaves with SystemExit where the module would not take these options
                loaded = import_module(module)
                (loaded.main if loaded is kernels else loaded.parse)(options)
    assert modules.count(("python", "benchmarks.paper.glue")) == 5 * 3 + 1
    assert modules.count(("ncu", "benchmarks.kernels")) == modules.count(("compute-sanitizer", "pytest")) == 2
    # so that pytest and the benchmarks report what they have; but what runs in the background ignores an interrupt
    limits = [command for command in commands if command[0] == "timeout"]
    for command in limits:
        assert command[1:5] == ["-s", "TERM" if "bash" in command else "INT", "-k", "10"]
    assert len(limits) > 10


@pytest.mark.skipif(bool(shutil.which("ncu", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")), reason="ncu is there")
def test_a_tool_that_is_missing_is_said(tmp_path: Path) -> None:
    code, commands, summary = run(tmp_path, PARTS="ncu racecheck step", without="ncu compute-sanitizer")
    assert code == 0 and "==== ncu: not on this machine" in summary and "==== compute-sanitizer: not on" in summary
    assert "==== step: ok in " in summary
    assert [command[0] for command in commands] == ["nvidia-smi", "python", "timeout", "python"]


def test_a_part_that_fails_is_reported_and_the_others_run(tmp_path: Path) -> None:
    # the first of 15 in the background: long gone when the last one starts
    code, commands, summary = run(tmp_path, PARTS="step eigh glue", BROKEN="--tasks cola --seeds 0")
    assert code == 1
    assert "==== glue: failed (1) in " in summary and "==== glue-table: ok in " in summary
    assert [command[0] for command in commands].count("python") == 1 + 2 + 16
    assert "==== step: failed (3) in " in run(tmp_path / "first", PARTS="step eigh", BROKEN="kernels step")[2]
    assert "==== eigh: out of time in " in run(tmp_path / "second", PARTS="step eigh", DEADLINE="-1")[2]
