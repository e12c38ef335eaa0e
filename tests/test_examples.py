"""The example trains, saves an adapter that plain PEFT merges, and says so."""

import os
import re
import subprocess
import sys
from pathlib import Path

import reflora

ROOT = Path(__file__).parents[1]


def test_finetune(tmp_path):
    paths = [str(Path(reflora.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples/finetune.py"), "3", str(tmp_path / "out")],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = map(float, re.search(r"loss: ([\d.]+) before, ([\d.]+) after 3 steps", done.stdout).groups())
    assert after < before
    assert float(re.search(r"adapted model: (\S+)", done.stdout)[1]) < 1e-4
    assert (tmp_path / "out/adapter_model.safetensors").exists()
