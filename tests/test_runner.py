"""What the tests themselves run on: groups of tests that share a worker."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

GROUPED = """
import pytest

@pytest.mark.xdist_group("a group")
@pytest.mark.parametrize("number", range(8))
def test_where(number, worker_id):
    print(f"<{worker_id}>")
"""


def test_a_group_stays_on_one_worker(tmp_path: Path) -> None:
    (tmp_path / "test_grouped.py").write_text(GROUPED)
    command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadgroup", "-rP", "--rootdir", "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("<gw") == 8, done.stdout
    assert not {"<gw0>", "<gw1>"} <= set(done.stdout.split())
