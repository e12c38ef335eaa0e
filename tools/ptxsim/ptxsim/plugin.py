"""pytest -p ptxsim.plugin: Triton kernels of the tests are compiled for NVIDIA and run in the emulator.

A test in whose run a race with differing values or an uninitialised read is seen fails. Environment:
PTXSIM_CAPABILITY (90), PTXSIM_ORDER (forward, reverse, random), PTXSIM_SEED, PTXSIM_QUANTUM, PTXSIM_RESIDENT,
PTXSIM_RACE (1), PTXSIM_COUNTERS (0), PTXSIM_POISON (1), PTXSIM_ALLOW_RACES (0), PTXSIM_REPORT (a file for all reports,
JSON).
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from typing import Any

import pytest

# before the first kernel is decorated
os.environ["TRITON_INTERPRET"] = "0"

from . import driver, reflora_hook  # noqa: E402


def settings() -> dict[str, int]:
    """Options of all launches, from the environment."""
    names = ("race", "counters", "quantum", "resident")
    given = {name: os.environ.get(f"PTXSIM_{name.upper()}") for name in names}
    order = driver.order_number(os.environ.get("PTXSIM_ORDER", "forward"))
    if driver.ORDERS[order] == "random":
        # kept in the environment: workers of pytest-xdist use the same
        os.environ.setdefault("PTXSIM_SEED", str(random.SystemRandom().randrange(2**32)))
    seed = int(os.environ.get("PTXSIM_SEED", "0"))
    return {"counters": 0, **{n: int(v) for n, v in given.items() if v}, "order": order, "seed": seed}


CAPABILITY = int(os.environ.get("PTXSIM_CAPABILITY", "90"))
ALLOW_RACES = os.environ.get("PTXSIM_ALLOW_RACES", "0") == "1"
driver.install(CAPABILITY, poison=os.environ.get("PTXSIM_POISON", "1") == "1", **settings())
reflora_hook.serve_reflora()


def how() -> str:
    """What is needed to run the same again."""
    chosen = {"CAPABILITY": CAPABILITY, "ORDER": driver.ORDERS[driver.OPTIONS["order"]]}
    if chosen["ORDER"] == "random":
        chosen["SEED"] = driver.OPTIONS["seed"]
    chosen.update({name.upper(): driver.OPTIONS[name] for name in ("quantum", "resident") if name in driver.OPTIONS})
    return " ".join(f"PTXSIM_{name}={value}" for name, value in chosen.items())


def pytest_report_header() -> str:
    return f"ptxsim: {how()}"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    driver.CONTEXT["test"] = item.nodeid


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Iterator[None]:
    """After setup, call and teardown of a test: reports of the launches in it."""
    report: Any = yield
    found = driver.take_harmful()
    if found and not ALLOW_RACES:
        text = "\n".join([f"{len(found)} races or uninitialised reads ({how()}):", *map(driver.describe, found)])
        report.sections.append(("ptxsim", text))
        if report.passed:
            report.outcome, report.longrepr = "failed", text
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist hands on what it has seen."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        seen = {"reports": list(driver.REPORTS.values()), "launches": driver.LAUNCHES, "kernels": list(driver.MODULES)}
        output["ptxsim"] = json.dumps(seen)


_kernels_of_workers: set[str] = set()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: Any) -> None:
    """In the process above the workers."""
    seen = json.loads(getattr(node, "workeroutput", {}).get("ptxsim", "{}"))
    for report in seen.get("reports", []):
        driver.merge_report(report)
    for name, (launches, seconds) in seen.get("launches", {}).items():
        entry = driver.LAUNCHES.setdefault(name, [0, 0.0])
        entry[0] += launches
        entry[1] += seconds
    _kernels_of_workers.update(seen.get("kernels", []))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    def rank(r: driver.Report) -> tuple[Any, ...]:
        return r["differing"] == 0, r["level"] == "in a warp", r["kernel"]

    reports = sorted(driver.REPORTS.values(), key=rank)
    replicated = [
        r for r in reports if not r["differing"] and r["space"] == "shared" and r["kind"] == "write after write"
    ]
    terminalreporter.section("ptxsim")
    for r in reports:
        if r not in replicated:
            terminalreporter.write_line(driver.describe(r))
    if replicated:
        terminalreporter.write_line(f"{len(replicated)} shared stores of one value by several threads not listed")
    for name, (launches, seconds) in sorted(driver.LAUNCHES.items()):
        terminalreporter.write_line(f"{name}: {launches:.0f} launches, {seconds:.1f} s")
    kernels = len(_kernels_of_workers.union(driver.MODULES))
    terminalreporter.write_line(f"{len(reports)} reports, {kernels} compiled kernels ({how()})")
    if "PTXSIM_REPORT" in os.environ:
        with open(os.environ["PTXSIM_REPORT"], "w") as file:
            json.dump(reports, file, indent=1)
