"""`.ci/versions` with a stub in the place of every Python: what is skipped, what fails, what is written down."""

from __future__ import annotations

import csv
import re
import runpy
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import releases

ROWS = runpy.run_path(str(processes.ROOT / ".ci" / "versions"))["ROWS"]
# BROKEN: a word of a command that fails
STUB = f"""#!{sys.executable}
import os, pathlib, shutil, sys
words = " ".join(sys.argv[1:])
with open(os.environ["COMMANDS"], "a") as file:
    file.write(words.replace(chr(10), " ") + chr(10))
if words.startswith("-m venv"):
    target = pathlib.Path(sys.argv[-1], "bin")
    target.mkdir(parents=True)
    shutil.copy(__file__, target / "python")
elif "importlib.metadata" in words:
    print("python 3.11.9", "torch 2.15.0", "trl -", sep=chr(10))
elif "pip check" in words:
    print("transformers 5.25.0 requires kernels, which is not installed.")
failing = "--no-deps" not in sys.argv and os.environ.get("BROKEN") in sys.argv
if "pytest" in sys.argv:
    print("FAILED tests/a.py::test_b - AssertionError\\n1 failed, " if failing else "", "20 passed, 3 skipped in 4.00s")
elif failing:
    print("ERROR: could not find kernels (from transformers)\\nERROR: No matching distribution found for kernels")
sys.exit(failing)
"""


def run(
    folder: Path, *arguments: str, **env: str
) -> tuple[subprocess.CompletedProcess[str], str, list[dict[str, str]]]:
    """What the script says, what it has called, and the table; only Python 3.11 is there."""
    tools = folder / "tools"
    tools.mkdir()
    (tools / "python3.11").write_text(STUB)
    (tools / "python3.11").chmod(0o755)
    called, out = folder / "commands", folder / "out"
    called.touch()
    command = [sys.executable, ".ci/versions", "--out", str(out), *arguments]
    done = processes.run(command, PATH=str(tools), HOME=str(folder), COMMANDS=str(called), **env)
    with (out / "results.csv").open(newline="") as file:
        return done, called.read_text(), list(csv.DictReader(file))


def test_a_row_that_passes(tmp_path: Path) -> None:
    done, called, [row, kernels] = run(tmp_path, "torch-2.15", "--kernels")
    assert done.returncode == 0, done.stderr
    for pin in ("torch==2.15.0", "triton==3.9.0", "peft==0.21.2", "pytest=="):
        assert pin in called
    assert (row["python"], row["torch"], row["trl"]) == ("3.11.9", "2.15.0", "-")
    assert (row["tests"], row["passed"], row["failed"], row["skipped"]) == ("tests", "20", "0", "3")
    assert kernels["tests"] == "kernels" and "-p ptxsim.plugin" in called
    assert "kernels, which is not installed" in row["said"] and "20 passed" in done.stdout
    assert not (tmp_path / "out" / "torch-2.15").exists()


def test_a_row_that_fails(tmp_path: Path) -> None:
    done, _, [row] = run(tmp_path, "torch-2.15", BROKEN="pytest")
    assert done.returncode == 1
    assert row["failed"] == "1" and "tests/a.py::test_b" in row["said"] and "1 failed" in done.stdout


def test_a_core_that_does_not_compile_fails(tmp_path: Path) -> None:
    done, called, [row] = run(tmp_path, "torch-2.15", BROKEN="setup.py")
    assert done.returncode == 1 and "did not compile" in row["said"] and "pytest -q" not in called


@pytest.mark.parametrize(
    "row,broken,word", [("python-3.14", "", "no Python 3.14"), ("torch-2.15", "torch==2.15.0", "pip cannot")]
)
@pytest.mark.parametrize("must", [(), ("--must",)])
def test_a_row_that_cannot_run_is_skipped_with_a_word(
    tmp_path: Path, row: str, broken: str, word: str, must: tuple[str, ...]
) -> None:
    done, called, [result] = run(tmp_path, row, *must, BROKEN=broken)
    assert done.returncode == len(must) and "pytest -q" not in called
    assert result["said"].startswith(f"skipped: {word}") and result["said"] in done.stdout


def test_transformers_goes_in_alone_where_what_it_needs_is_not_to_be_had(tmp_path: Path) -> None:
    done, called, [row] = run(tmp_path, "torch-2.15", BROKEN="transformers==5.25.0")
    assert done.returncode == 0 and row["passed"] == "20"
    assert re.search(r"--no-deps transformers==5.25.0$", called, re.M)


def test_a_row_that_is_none_is_refused(tmp_path: Path) -> None:
    done = processes.run([sys.executable, ".ci/versions", "--out", str(tmp_path), "newest"])
    assert done.returncode == 2 and "expected rows of torch-2.15" in done.stderr and "got newest" in done.stderr


@pytest.mark.parametrize("name", [name for names in releases.LACKING.values() for name in names])
def test_what_old_releases_lack_names_tests(name: str) -> None:
    file, function = name.split("::")
    source = next((processes.ROOT / "tests").rglob(file)).read_text()
    assert f"\ndef {function.partition('[')[0]}" in source


def test_what_old_releases_lack_is_skipped_there(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "test_layers.py::test_a_layer_trains[conv1d]"
    for found, want in {(0, 16): "needs peft 0.17, found 0.16", (0, 17): None, (1, 0): None, None: None}.items():
        monkeypatch.setitem(releases.FOUND, "peft", found)
        assert releases.lacking(name) == want
    monkeypatch.setitem(releases.FOUND, "peft", (0, 16))
    assert releases.lacking("test_layers.py::test_a_layer_trains[linear]") is None


def test_ci_runs_every_row() -> None:
    workflow = (processes.ROOT / ".github" / "workflows" / "ci.yml").read_text()
    found = dict(re.findall(r'\{row: (\S+), python: "(\S+)"', workflow))
    assert found == {name: python for name, (python, _) in ROWS.items()}
