"""The package as pip sees it: sdist, pure-Python wheel, the error without a compiler, and what reflora._C links."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from processes import ROOT, printed, run

PARTS = ["reflora", "csrc", "setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in"]
PARTS += ["LICENSE", "README.md", "CHANGELOG.md"]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist of a copy of the tree that has never been built."""
    copy = tmp_path_factory.mktemp("tree")
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, copy / part, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(source, copy / part)
    printed([sys.executable, "setup.py", "-q", "sdist"], copy)
    (archive,) = (copy / "dist").iterdir()
    with tarfile.open(archive) as tar:
        tar.extractall(copy / "unpacked")
    (folder,) = (copy / "unpacked").iterdir()
    return folder


def test_sdist_holds_what_a_build_needs(sdist: Path) -> None:
    wanted = {p.relative_to(ROOT) for p in (ROOT / "csrc").iterdir() if p.suffix in (".cpp", ".h")}
    wanted |= {Path(part) for part in PARTS if (ROOT / part).is_file() and part != "MANIFEST.in"}
    assert {str(p) for p in wanted if not (sdist / p).is_file()} == set()


def test_pure_python_wheel(sdist: Path, tmp_path: Path) -> None:
    options = ["--no-build-isolation", "--no-deps", "-w", str(tmp_path)]
    printed([sys.executable, "-m", "pip", "wheel", *options, str(sdist)], tmp_path, REFLORA_NO_CPP="1")
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = next(name for name in names if name.endswith("/METADATA"))
        needs = message_from_bytes(archive.read(metadata)).get_all("Requires-Dist") or []
        archive.extractall(tmp_path / "site")
    assert [name for name in names if "/_C" in name or not name.startswith("reflora")] == []
    # the package and its metadata: no tests, benchmarks, sources or caches
    own = {p.relative_to(ROOT).as_posix() for p in (ROOT / "reflora").rglob("*.py")} | {"reflora/py.typed"}
    assert {name for name in names if ".dist-info/" not in name} == own
    assert "reflora/py.typed" in names
    assert [need for need in needs if "extra ==" not in need] == ["torch>=2.9"]

    # an editable install of this tree would lend its _C
    program = """
import json, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
import torch, reflora
from reflora.backends import load, resolve
cpu = torch.device("cpu")
print(json.dumps([reflora.__file__, resolve(None, cpu).NAME, load("cpp").unavailable(cpu)]))
"""
    python = [sys.executable, "-c", program]
    file, backend, reason = json.loads(printed(python, tmp_path, PYTHONPATH=str(tmp_path / "site")))
    assert file.startswith(str(tmp_path)) and backend == "torch" and "REFLORA_NO_CPP" in reason

    # in the source tree, which a program in its folder imports before what is installed
    _, backend, reason = json.loads(printed(python, sdist, PYTHONPATH=str(sdist)))
    assert backend == "torch" and "source tree" in reason and "pip install -e ." in reason
    assert "_C" in reason  # what the import said: a core may be there and not load


@pytest.mark.parametrize("found", ["CXX=/nonexistent/c++", "none on the PATH"])
def test_one_clear_line_without_a_compiler(sdist: Path, tmp_path: Path, found: str) -> None:
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for name in ("cmake", "ninja"):
        program = shutil.which(name, path=places)
        assert program is not None, f"{name} is needed to build"
        (tmp_path / name).symlink_to(program)
    env = {"CXX": "/nonexistent/c++"} if "CXX" in found else {"CXX": None, "PATH": str(tmp_path)}
    shutil.rmtree(sdist / "build", ignore_errors=True)
    done = run([sys.executable, "setup.py", "-q", "build_ext"], sdist, **env)
    assert done.returncode != 0
    (line,) = [line for line in (done.stdout + done.stderr).splitlines() if "warning" not in line.lower()]
    assert line.startswith(f"error: reflora: expected a C++20 compiler, found {found}; install ")
    assert "set REFLORA_NO_CPP=1" in line


# the shared libraries a process has loaded, by words in their names; systems without /proc show none
MAPPED = """
import json, pathlib, sys
def mapped(*words):
    maps = pathlib.Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    files = {line.split()[-1] for line in lines if "/" in line}
    return sorted(f for f in files if any(word in f.rpartition("/")[2] for word in words))
"""


def test_core_loads_without_torch() -> None:
    program = f"{MAPPED}import reflora._C\nprint(mapped('torch', 'libc10'), 'torch' in sys.modules)"
    done = run([sys.executable, "-c", program])
    assert (done.stdout.strip(), done.stderr) == ("[] False", "")


def test_core_shares_the_openmp_runtime_of_torch() -> None:
    report = "print(json.dumps(mapped('gomp', 'iomp', 'libomp')))"
    program = f"{MAPPED}import torch\n{report}\nimport reflora._C\n{report}"
    before, after = map(json.loads, printed([sys.executable, "-c", program]).splitlines())
    assert after == before
    assert before or not Path("/proc/self/maps").exists()
