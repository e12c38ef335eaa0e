"""`python .ci/hub_kernel.py OUT`: the package as a kernel of the Hugging Face hub, for `kernels.get_kernel`.

Python and Triton only, a folder a backend (`build/torch-cuda`, `build/torch-cpu`), which kernels >= 0.17 loads, and
beside it what kernel-builder makes the same from (`build.toml`, `torch-ext/`). To publish: upload OUT to a repository
of the type "kernel", branch v1.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
VERSION = 1  # of the hub's branch: to be raised when the interface changes
BACKENDS = ("cpu", "cuda")
# what the hub makes by itself, or cannot serve: a core compiled for one Python, a program, another package's plugin
LEFT_OUT = ("__pycache__", "*.so", "_ops.py", "__main__.py", "axolotl.py")
OPS = '''"""Under which name this copy registers its operators."""

import torch

NAMESPACE = "{name}"
ops = getattr(torch.ops, NAMESPACE)


def add_op_namespace_prefix(name: str) -> str:
    return f"{{NAMESPACE}}::{{name}}"
'''
BUILD = """[general]
name = "reflora"
version = {version}
edition = 5
license = "Apache-2.0"
backends = ["cpu", "cuda"]

[torch-noarch]
"""


def digest() -> str:
    """Seven digits of what is in the package: two versions can be loaded side by side."""
    files = sorted((ROOT / "reflora").rglob("*.py"))
    return hashlib.sha1(b"".join(path.read_bytes() for path in files)).hexdigest()[:7]


def stage(out: Path) -> None:
    """Write the layout to `out`, which must not exist."""
    ignore = shutil.ignore_patterns(*LEFT_OUT)
    shutil.copytree(ROOT / "reflora", out / "torch-ext" / "reflora", ignore=ignore)
    (out / "build.toml").write_text(BUILD.format(version=VERSION))
    shutil.copy(ROOT / "README.md", out / "CARD.md")
    version = digest()
    for backend in BACKENDS:
        name, folder = f"_reflora_{backend}_{version}", out / "build" / f"torch-{backend}"
        shutil.copytree(ROOT / "reflora", folder, ignore=ignore)
        (folder / "_ops.py").write_text(OPS.format(name=name))
        metadata = {
            "name": "reflora", "id": name, "version": VERSION, "license": "Apache-2.0", "python-depends": [],
            "backend": {"type": backend},
        }  # fmt: skip
        (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2 or Path(sys.argv[1]).exists():
        sys.exit("usage: python .ci/hub_kernel.py OUT, a folder that does not exist yet")
    stage(Path(sys.argv[1]))
    print(f"wrote {sys.argv[1]}: load it with kernels.get_local_kernel(Path({sys.argv[1]!r}))")
