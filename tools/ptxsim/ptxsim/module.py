"""The emulator's C interface: kernels of PTX text, and which memory they may touch."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from . import build

MESSAGE = 8192  # bytes


class PtxSimError(RuntimeError):
    """A fault of the kernel, or an instruction that the emulator does not know."""


class Options(ctypes.Structure):
    """How to run a launch, as csrc/program.h says."""

    NAMES = ("race", "counters", "order", "seed", "quantum", "resident", "poison", "timing", "near")
    _fields_ = [*((name, ctypes.c_uint32) for name in NAMES), ("max_instructions", ctypes.c_uint64)]


DEFAULTS = {"race": 1, "counters": 1, "resident": 1, "poison": 1}


@cache
def library() -> ctypes.CDLL:
    """The emulator, built where it is not yet."""
    lib = ctypes.CDLL(str(build.emulator()), mode=ctypes.RTLD_GLOBAL)
    u32, u64, size, flag = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_int
    pointer, text = ctypes.c_void_p, ctypes.c_char_p
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "ps_compile": (pointer, [text, text, size]),
        "ps_free": (None, [pointer]),
        "ps_set_threads": (None, [pointer, u32]),
        "ps_undefined": (u32, [pointer]),
        "ps_parameters": (text, [pointer]),
        "ps_launch": (flag, [pointer, u32, u32, u32, text, u32, ctypes.POINTER(Options), text, size]),
        "ps_reports": (text, [pointer, flag]),
        "ps_stats": (text, [pointer, flag]),
        "ps_block_counts": (ctypes.POINTER(u64), [pointer]),
        "ps_times": (ctypes.POINTER(ctypes.c_double), [pointer]),
        "ps_trace": (text, [pointer]),
        "ps_classes": (text, []),
        "ps_barriers": (text, [pointer]),
        "ps_disable": (None, [pointer, u32, flag]),
        "ps_register": (None, [u64, u64]),
        "ps_unregister": (None, [u64]),
        "ps_set_unknown_hook": (None, [pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


@cache
def classes() -> list[str]:
    """Names of the classes of instructions, in the order of `Module.block_counts`."""
    return json.loads(library().ps_classes())


class Module:
    """A kernel of PTX text."""

    def __init__(self, ptx: str, threads: int | None = None):
        self.lib = library()
        self.ptx = ptx
        self.blocks = 0
        error = ctypes.create_string_buffer(MESSAGE)
        self.handle = self.lib.ps_compile(ptx.encode(), error, MESSAGE)
        if not self.handle:
            raise PtxSimError(error.value.decode())
        if threads is not None:
            self.lib.ps_set_threads(self.handle, threads)
        self.undefined: int = self.lib.ps_undefined(self.handle)  # registers that some path reads unwritten
        self.params: list[list[int]] = json.loads(self.lib.ps_parameters(self.handle))  # offset, bytes

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self.lib.ps_free(self.handle)

    def launch(self, grid: Sequence[int], params: bytes, shared: int = 0, **options: int) -> None:
        """Runs a grid; raises PtxSimError where an instruction cannot be done."""
        x, y, z = (*grid, 1, 1, 1)[:3]
        self.blocks = math.prod((x, y, z))
        chosen = Options(**{**DEFAULTS, **options})
        error = ctypes.create_string_buffer(MESSAGE)
        if self.lib.ps_launch(self.handle, x, y, z, params, shared, ctypes.byref(chosen), error, MESSAGE):
            raise PtxSimError(error.value.decode())

    def reports(self, clear: bool = True) -> list[dict[str, Any]]:
        """Races and uninitialised reads of all launches since they were last cleared."""
        return json.loads(self.lib.ps_reports(self.handle, int(clear)))

    def harmful(self, clear: bool = True) -> list[dict[str, Any]]:
        """Those where a value differs by which access comes first."""
        return [report for report in self.reports(clear) if report["differing"]]

    def stats(self, clear: bool = False) -> list[list[Any]]:
        """By instruction: PTX line, class, opcode, times, lanes, got, least, bytes, source line, text."""
        return json.loads(self.lib.ps_stats(self.handle, int(clear)))

    def barriers(self) -> list[list[Any]]:
        """By block barrier: pc, PTX line, times, source line."""
        return json.loads(self.lib.ps_barriers(self.handle))

    def disable(self, pc: int, off: bool = True) -> None:
        """Takes a block barrier out, or puts it back."""
        self.lib.ps_disable(self.handle, pc, int(off))

    def times(self) -> list[tuple[float, float]]:
        """Cycles of every block of the last launch, which had timing on: longest chain, in order."""
        flat = self.lib.ps_times(self.handle)
        if not flat:
            return []
        return [(flat[2 * b], flat[2 * b + 1]) for b in range(self.blocks)]

    def trace(self) -> list[list[Any]]:
        """By block barrier of that launch's last block: PTX line, both times, source line."""
        return json.loads(self.lib.ps_trace(self.handle))

    def block_counts(self) -> list[list[int]]:
        """Warp instructions by class of every block of the last launch."""
        flat, n = self.lib.ps_block_counts(self.handle), len(classes())
        return [flat[b * n : (b + 1) * n] for b in range(self.blocks)]


@cache
def _unknown_hook() -> Any:
    """Looks among live tensors for memory that is older than the allocator."""
    import torch

    def find(address: int) -> None:
        for thing in gc.get_objects():
            # whatever is alive is asked, also what is half made
            with contextlib.suppress(Exception):
                if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
                    storage = thing.untyped_storage()
                    begin, size = storage.data_ptr(), storage.nbytes()
                    if begin <= address < begin + size:
                        library().ps_register(begin, size)

    return ctypes.CFUNCTYPE(None, ctypes.c_uint64)(find)


def track_torch(poison: bool = True) -> None:
    """Every torch CPU tensor from here on is known, with red zones, and (poison) NaN until it is written."""
    import torch

    library().ps_set_unknown_hook(_unknown_hook())
    tracker = ctypes.CDLL(str(build.allocator(Path(torch.__file__).parent, torch.__version__)))
    tracker.ps_track_torch(int(poison))
