"""The C++ core is written without what compilers warn of."""

import os
import shutil
import sys

from conftest import needs_compiler
from processes import printed

# of CMakeLists.txt
FLAGS = ("-std=c++20", "-Wall", "-Wextra", "-Wno-psabi", "-Werror", "-fsyntax-only", "-DREFLORA_ISA=base")


@needs_compiler
def test_kernels_compile_without_a_warning(tmp_path):
    (tmp_path / "columns.h").write_text(printed([sys.executable, "reflora/columns.py"]))
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))))
    printed([compiler, *FLAGS, f"-I{tmp_path}", "csrc/kernels.cpp"])
