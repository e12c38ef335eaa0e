"""Deliberate faults, one at a time in a copy of the checkout: each must make a test fail. `make mutants`.

Prints a table of the faults and of the test that caught each; leaves with 1 where one was not caught.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from faults import FAULTS, Fault

ROOT = Path(__file__).parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", help="faults whose file or text has this in it")
    parser.add_argument("--out", type=Path, help="CSV of what caught them")
    options = parser.parse_args()
    chosen = [fault for fault in FAULTS if options.only in f"{fault.file} {fault.what}"]
    tree = ROOT / "build" / "mutants"
    configure(tree)
    lines, missed = [], 0
    for number, fault in enumerate(chosen, 1):
        began = time.perf_counter()
        caught = tried(tree, fault)
        missed += not caught
        lines.append((fault.file, fault.what, caught or "NOT CAUGHT"))
        took = time.perf_counter() - began
        print(f"{number}/{len(chosen)}  {fault.file}: {fault.what}\n      {lines[-1][2]}  ({took:.0f} s)", flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([("file", "fault", "caught by"), *lines])
    print(f"{len(chosen) - missed} of {len(chosen)} faults are caught")
    return int(missed > 0)


def configure(tree: Path) -> None:
    """A copy of the tracked files with a build of its own."""
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    import pybind11

    # one instruction set of three: a third of the time
    options = [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", "-DREFLORA_X86=0"]
    quiet(["cmake", "-S", ".", "-B", "build", "-G", "Ninja", *options], tree)
    build(tree)


def build(tree: Path) -> None:
    quiet(["cmake", "--build", "build"], tree)
    for core in (tree / "build").glob("_C*.so"):
        shutil.copy(core, tree / "reflora" / core.name)


def quiet(command: list[str], folder: Path) -> None:
    # cmake and ninja are beside the interpreter
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(command, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed\n{done.stdout[-3000:]}{done.stderr[-3000:]}")


def tried(tree: Path, fault: Fault) -> str:
    """The first test that fails with the fault in place; "" for none."""
    path = tree / fault.file
    sound = path.read_text()
    if sound.count(fault.before) != 1:
        raise SystemExit(f"{fault.file}: expected one {fault.before!r}, found {sound.count(fault.before)}")
    path.write_text(sound.replace(fault.before, fault.after))
    try:
        build(tree)  # whatever the fault is: the core may still have the last one in it
        return first_failure(tree, fault)
    finally:
        path.write_text(sound)


def first_failure(tree: Path, fault: Fault) -> str:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "--tb=no",
        "-rfE",
    ]
    only = ["-k", fault.only] if fault.only else []
    paths = [tree]
    if fault.compiled:
        only += ["-p", "ptxsim.plugin", "-m", "kernels and not thorough"]  # as `make kernels`
        paths += [tree / "tools" / "ptxsim", tree / "tests"]
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    env.update(PYTHONPATH=os.pathsep.join(map(str, paths)), PTXSIM_CACHE=str(ROOT / "build" / "ptxsim"))
    done = subprocess.run([*command, *only, *fault.tests.split()], cwd=tree, env=env, capture_output=True, text=True)
    if done.returncode < 0:
        return f"killed by signal {-done.returncode}"
    found = re.search(r"^(?:FAILED|ERROR) (.+?::.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if found is None and done.returncode:
        raise SystemExit(f"{fault.what}: no test ran\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return found[1].removeprefix("tests/") if found else ""


if __name__ == "__main__":
    sys.exit(main())
