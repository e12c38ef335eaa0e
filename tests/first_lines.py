"""What a newcomer sees first of a program: a line of its own, and no other library's warning before the results."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# said by torchao, bitsandbytes, the hub's client and deepspeed at import, and by whoever calls what is deprecated
FOREIGN = re.compile(r"Failed to load|_pytree|gemm_4bit|publisher trust|Warning: |\[WARNING\]|unauthenticated", re.I)


def printed(*arguments: object) -> list[str]:
    """stdout and stderr of `python ARGUMENTS` in the clone, offline: lines in order, none of them a foreign warning."""
    command = [sys.executable, *map(str, arguments)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    assert done.returncode == 0, done.stdout[-3000:]
    lines = done.stdout.splitlines()
    assert not [line for line in lines if FOREIGN.search(line)]
    return lines
