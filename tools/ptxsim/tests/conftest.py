"""The emulator is Triton's device for every test here."""

import os
import sys
from pathlib import Path

# before the first kernel is decorated
os.environ["TRITON_INTERPRET"] = "0"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
from ptxsim import driver


@pytest.fixture(autouse=True)
def device():
    """sm_90, with nothing left from the test before."""
    driver.OPTIONS.clear()
    driver.install(90, counters=1)
    driver.REPORTS.clear()
    driver.take_harmful()
