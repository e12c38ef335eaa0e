"""The C++ core is written without what compilers warn of."""

import os
import shutil
import subprocess
from pathlib import Path

from conftest import needs_compiler

CSRC = Path(__file__).parent.parent / "csrc"
# of CMakeLists.txt
FLAGS = ("-std=c++20", "-Wall", "-Wextra", "-Wno-psabi", "-Werror", "-fsyntax-only", "-DREFLORA_ISA=base")


@needs_compiler
def test_kernels_compile_without_a_warning():
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))))
    done = subprocess.run([compiler, *FLAGS, str(CSRC / "kernels.cpp")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:3000]
