"""Commands in processes of their own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(command: list[str], folder: Path = ROOT, **env: str | None) -> subprocess.CompletedProcess[str]:
    """`command` with `env` on top of the environment; None unsets a variable."""
    merged = {key: value for key, value in {**os.environ, **env}.items() if value is not None}
    return subprocess.run(command, cwd=folder, env=merged, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def printed(command: list[str], folder: Path = ROOT, **env: str | None) -> str:
    """By a command that succeeds."""
    done = run(command, folder, **env)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout
