"""The C++ core is written without what compilers warn of."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import needs_compiler

ROOT = Path(__file__).parents[2]
# of CMakeLists.txt
FLAGS = ("-std=c++20", "-Wall", "-Wextra", "-Wno-psabi", "-Werror", "-fsyntax-only", "-DREFLORA_ISA=base")


@needs_compiler
def test_kernels_compile_without_a_warning(tmp_path):
    columns = subprocess.run([sys.executable, str(ROOT / "reflora" / "columns.py")], capture_output=True, check=True)
    (tmp_path / "columns.h").write_bytes(columns.stdout)
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))))
    done = subprocess.run(
        [compiler, *FLAGS, f"-I{tmp_path}", str(ROOT / "csrc" / "kernels.cpp")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[:3000]
