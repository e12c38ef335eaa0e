"""The pytest plugin and `serve`, in processes of their own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ptxsim import driver

ROOT = Path(__file__).resolve().parents[1]
TESTS = """
import torch, triton, triton.language as tl

@triton.jit
def shift(x, y, N: tl.constexpr, BARRIER: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(x + i, tl.load(y + i))
    if BARRIER:
        tl.debug_barrier()
    tl.store(y + i, tl.load(x + (N - 1 - i)))

@triton.jit
def same_value(x):
    tl.store(x, 1.0)

def test_good():
    x, y = torch.empty(256), torch.arange(256.0)
    shift[(1,)](x, y, 256, True)
    assert y[0] == 255

def test_bad():
    shift[(1,)](torch.empty(256), torch.arange(256.0), 256, False)

def test_same_values():
    same_value[(3,)](torch.empty(1))

def test_bad_again():
    shift[(1,)](torch.empty(256), torch.arange(256.0), 256, False)
"""


def environment(**given):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PTXSIM_ORDER", "PTXSIM_SEED", "TRITON_"))}
    return {**kept, "PYTHONPATH": str(ROOT), **given}


def pytest_run(folder, *arguments, **given):
    (folder / "test_planted.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "ptxsim.plugin", "-p", "no:cacheprovider", "-c", os.devnull]
    command += ["--rootdir", str(folder), "-rA", *arguments, str(folder)]
    return subprocess.run(command, env=environment(**given), capture_output=True, text=True).stdout


def outcomes(text):
    return dict(re.findall(r"^(?:\[gw\d\] )?(PASSED|FAILED) .*::(\w+)", text, re.M)[i][::-1] for i in range(4))


WANT = {"test_good": "PASSED", "test_bad": "FAILED", "test_same_values": "PASSED", "test_bad_again": "FAILED"}


@pytest.mark.parametrize("workers", [0, 2])
def test_the_test_that_shows_a_race_fails(tmp_path, workers):
    file = tmp_path / "reports.json"
    arguments = ["-n", str(workers)] if workers else []
    text = pytest_run(tmp_path, *arguments, PTXSIM_REPORT=str(file), PTXSIM_ORDER="random")
    assert outcomes(text) == WANT, text
    # how to run the same again stands in the header, in the failure and at the end
    seeds = re.findall(r"PTXSIM_ORDER=random PTXSIM_SEED=(\d+)", text)
    assert len(set(seeds)) == 1 and len(seeds) >= 4
    assert re.search(r"shift: global .* with other values", text)
    assert "shift: 3 launches" in text and "same_value: 1 launches" in text
    reports = json.loads(file.read_text())
    assert {(r["kernel"], r["differing"] > 0) for r in reports} == {("shift", True), ("same_value", False)}


def test_races_can_be_allowed(tmp_path):
    text = pytest_run(tmp_path, PTXSIM_ALLOW_RACES="1", PTXSIM_ORDER="reverse", PTXSIM_CAPABILITY="80")
    assert set(outcomes(text).values()) == {"PASSED"}
    assert "ptxsim: PTXSIM_CAPABILITY=80 PTXSIM_ORDER=reverse\n" in text and "with other values" in text


def test_orders():
    assert [driver.order_number(order) for order in (*driver.ORDERS, "0", "1", "2")] == [0, 1, 2] * 2
    with pytest.raises(ValueError, match="order sideways is none of forward, reverse, random"):
        driver.order_number("sideways")


def test_serve(tmp_path):
    script = TESTS + "\nimport ptxsim\nfrom ptxsim import driver\nwith ptxsim.serve(80, order=1):\n"
    script += "    test_good()\n    assert not driver.harmful()\n    test_bad()\n    assert driver.harmful()\n"
    script += "print(driver.describe(driver.harmful()[0]))"
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run(
        # a kernel in the cache has the source lines of the file that it was compiled from first
        [sys.executable, str(tmp_path / "script.py")], env=environment(PTXSIM_CACHE=str(tmp_path / "cache")),
        capture_output=True, text=True,
    )  # fmt: skip
    assert not done.returncode, done.stderr
    assert "shift: global" in done.stdout and "script.py" in done.stdout


def test_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 replaces the compiler"):
        driver.install()


def test_an_unknown_capability_is_refused():
    with pytest.raises(ValueError, match="capability 70 is none of 80, 86"):
        driver.install(70)
