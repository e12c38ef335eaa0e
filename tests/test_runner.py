"""What the tests themselves run on: groups of tests that share a worker, and a quicker interpreter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import served

import reflora

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


@pytest.mark.skipif(not served("triton"), reason="needs the interpreter")
def test_the_interpreter_is_patched_once_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import interpreter

    patched = []
    builtin = interpreter._patch_builtin
    monkeypatch.setattr(interpreter, "_patch_builtin", lambda *what: (patched.append(what[0]), builtin(*what)))
    X = torch.randn(3, 4, 4)
    w, V = reflora.linalg.eigh(X + X.mT, backend="triton")
    assert 4 <= len(patched) <= 40  # 2923 at every call of a device function
    torch.testing.assert_close(V * w[:, None] @ V.mT, X + X.mT, rtol=1e-4, atol=1e-4)
