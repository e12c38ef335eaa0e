"""The examples run as they are and do what they say."""

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


def test_shampoo():
    run = [sys.executable, str(ROOT / "examples/shampoo_inverse_root.py")]
    done = subprocess.run(run, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    loss = {name: float(value) for name, value in re.findall(r"(\w+): loss (\S+) after", done.stdout)}
    assert loss["Shampoo"] < 0.8 * loss["SGD"]
