"""Compiles the emulator and the torch allocator, once for each state of sources, flags and processor."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[1] / "csrc"
ALLOCATOR = SOURCES / "allocator.cpp"
# -fwrapv: PTX's integers wrap. Floats are rounded after each operation, except where PTX says fma.
FLAGS = [
    "-std=c++20",
    "-O2",
    "-march=native",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fwrapv",
    "-fPIC",
    "-fvisibility=hidden",
]
WARNINGS = ["-Wall", "-Wextra"]
# read once, not by each source: most of the time of a build
HEADERS = ("immintrin.h", "algorithm", "array", "functional", "map", "memory", "string", "unordered_map", "vector")


class BuildError(RuntimeError):
    """The emulator cannot be built here."""


def cache_folder(name: str) -> Path:
    """A folder below the user's cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "ptxsim" / name


def build_folder() -> Path:
    """Where what is built is kept."""
    return Path(os.environ.get("PTXSIM_BUILD") or cache_folder("build"))


def emulator() -> Path:
    """The emulator's shared library."""
    return _library("ptxsim", sorted(set(SOURCES.glob("*.cpp")) - {ALLOCATOR}), FLAGS, [])


def allocator(torch_folder: Path, torch_version: str) -> Path:
    """The shared library of torch's allocator."""
    libraries = torch_folder / "lib"
    compile_flags = [*FLAGS, f"-isystem{torch_folder / 'include'}"]
    link_flags = [f"-L{libraries}", "-lc10", f"-Wl,-rpath,{libraries}", str(emulator())]
    return _library("allocator", [ALLOCATOR], compile_flags, link_flags, torch_version)


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith("flags")), "")


def _key(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def _compiler() -> str:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        raise BuildError(f"the emulator needs an x86-64 processor with AVX2, this one is {platform.machine()}")
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise BuildError("the emulator needs g++ (or another compiler in CXX)")
    return compiler


def _library(name: str, sources: Sequence[Path], flags: Sequence[str], link: Sequence[str], salt: str = "") -> Path:
    texts = [path.read_bytes() for path in sorted(SOURCES.iterdir()) if path.is_file()]
    key = _key(*texts, " ".join([*flags, *WARNINGS, *link]), salt, os.environ.get("CXX", "g++"), _processor())
    folder = build_folder()
    target = folder / f"lib{name}-{key}.so"
    if target.exists():
        return target
    compiler = _compiler()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                _compile(compiler, sources, flags, link, Path(scratch) / target.name)
                (Path(scratch) / target.name).rename(target)
    return target


def _compile(compiler: str, sources: Sequence[Path], flags: Sequence[str], link: Sequence[str], target: Path) -> None:
    common = target.with_name("common.h")
    common.write_text("".join(f"#include <{header}>\n" for header in HEADERS))
    _run([compiler, *flags, "-x", "c++-header", str(common), "-o", f"{common}.gch"])

    def one(source: Path) -> str:
        made = target.with_name(f"{source.stem}.o")
        _run([compiler, *flags, *WARNINGS, "-include", str(common), "-c", str(source), "-o", str(made)])
        return str(made)

    # the largest first, so that no long one is left for the end
    ordered = sorted(sources, key=lambda source: -source.stat().st_size)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        objects = list(pool.map(one, ordered))
    _run([compiler, "-shared", "-o", str(target), *objects, *link])


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stderr[-4000:]}")
