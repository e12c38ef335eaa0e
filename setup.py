"""Builds reflora._C with CMake and ninja. Sources and flags stand in CMakeLists.txt; REFLORA_NO_CPP=1 leaves it out."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
PURE = "set REFLORA_NO_CPP=1 for the pure-Python package"


def tool(name: str) -> str:
    """Full path of a program beside this Python or on the PATH."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    found = shutil.which(name, path=places)
    if found is None:
        raise CompileError(f"reflora: expected {name}, found none; run `pip install {name}`, or {PURE}.")
    return found


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name))
        build = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}"
        cmake, ninja = tool("cmake"), tool("ninja")
        configure = [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
        done = subprocess.run(configure, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode and ("CMAKE_CXX_COMPILER" in done.stdout or "variable CXX" in done.stdout):
            found = f"CXX={os.environ['CXX']}" if "CXX" in os.environ else "none on the PATH"
            raise CompileError(f"reflora: expected a C++20 compiler, found {found}; install g++ or clang++, or {PURE}.")
        if done.returncode:
            raise CompileError(f"{done.stdout}\nreflora: CMake could not configure the C++ core, see above, or {PURE}.")
        if subprocess.run([cmake, "--build", str(build)]).returncode:
            raise CompileError(f"reflora: the C++ core did not compile, see above, or {PURE}.")
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(build / target.name), str(target))


pure = os.environ.get("REFLORA_NO_CPP", "0") not in ("", "0")
setup(ext_modules=[] if pure else [Extension("reflora._C", [])], cmdclass={"build_ext": CMakeBuild})
