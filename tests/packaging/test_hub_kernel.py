"""The package as a kernel of the Hugging Face hub: its layout loads, computes, and lives beside the installed one."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import pytest
from processes import ROOT, printed

# two optimizers of the same state, one of each copy, compiled: an operator of one must not be the other's
PROGRAM = """
import sys
from pathlib import Path
import torch
from kernels import get_local_kernel
import reflora

hub = get_local_kernel(Path(sys.argv[1]), backend="cpu")
assert hub.__name__.startswith("_reflora_cpu_") and hub.__file__.startswith(sys.argv[1])
assert set(hub.__all__) == set(reflora.__all__)

def train(package, compiled, scalar):
    torch.manual_seed(0)
    pair = torch.randn(4, 24, requires_grad=True), torch.zeros(16, 4, requires_grad=True)
    optimizer = package.RefLoRAAdamW([pair], lr=1e-2, backend="torch", scalar=scalar)
    step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
    for _ in range(4):
        optimizer.zero_grad()
        (pair[1] @ pair[0] - 1).square().sum().backward()
        step()
    return [factor.detach() for factor in pair], optimizer

kept = []
for compiled in (False, True):
    for scalar in (False, True):
        found = []
        for package in (reflora, hub, reflora):
            factors, optimizer = train(package, compiled, scalar)
            found.append(factors)
            kept.append(optimizer)
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other)), (compiled, scalar)
w = hub.linalg.eigh(torch.diag(torch.tensor([3.0, 1.0, 2.0])), backend="torch").eigenvalues
assert torch.allclose(w, torch.tensor([1.0, 2.0, 3.0]))
assert isinstance(hub.find_pairs, type(reflora.find_pairs))
print("ok")
"""


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "kernel"
    printed([sys.executable, ".ci/hub_kernel.py", str(out)])
    return out


def test_layout(staged: Path) -> None:
    for backend in ("cpu", "cuda"):
        folder = staged / f"build/torch-{backend}"
        metadata = json.loads((folder / "metadata.json").read_text())
        assert metadata["backend"] == {"type": backend} and metadata["id"] in (folder / "_ops.py").read_text()
        assert (folder / "kernels/step/adamw.py").is_file() and not list(folder.rglob("*.so"))
    assert not (staged / "torch-ext/reflora/_ops.py").exists()


def test_a_copy_never_names_the_installed_package(staged: Path) -> None:
    """It is imported under another name: its own imports are relative, and operators are named through _ops."""
    for path in (staged / "build/torch-cuda").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not [name for name in names if name.split(".")[0] == "reflora"], path
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("custom_op"):
                assert "add_op_namespace_prefix" in ast.unparse(node.args[0]), path


def test_it_loads_and_computes_beside_the_installed_package(staged: Path, tmp_path: Path) -> None:
    kernels = pytest.importorskip("kernels")
    assert kernels._rust.Build.open(staged)  # raises for what kernel-builder would not take
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), str(staged)]
    assert printed(command, PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1").strip() == "ok"
