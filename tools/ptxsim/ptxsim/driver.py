"""A driver for Triton whose device is the emulator: `kernel[grid](cpu tensors)` compiles for NVIDIA and runs here."""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import compiler
from triton.runtime import driver

from .build import cache_folder
from .module import Module, PtxSimError, track_torch

# most shared memory that a block can opt in to, bytes
SHARED = {
    80: 166912,
    86: 101376,
    87: 166912,
    89: 101376,
    90: 232448,
    100: 232448,
    103: 232448,
    110: 232448,
    120: 101376,
    121: 101376,
}
PACK = {
    "i1": "b",
    "i8": "b",
    "i16": "h",
    "i32": "i",
    "i64": "q",
    "u1": "B",
    "u8": "B",
    "u16": "H",
    "u32": "I",
    "u64": "Q",
    "fp32": "f",
    "f32": "f",
    "fp64": "d",
}
ORDERS = ("forward", "reverse", "random")  # of warps and blocks, by number

Report = dict[str, Any]

MODULES: dict[str, Module] = {}
REPORTS: dict[tuple[Any, ...], Report] = {}  # of all launches, alike ones as one
LAUNCHES: dict[str, list[float]] = {}  # by name of a kernel: launches, seconds
OPTIONS: dict[str, int] = {}  # of all launches
CONTEXT: dict[str, Any] = {"test": ""}
# on_launch(name, module, metadata), after each launch
CALLBACKS: list[Callable[[str, Module, Any], None]] = []
_fresh: list[Report] = []


def report_key(report: Report) -> tuple[Any, ...]:
    """What makes two reports one: kernel, kind, source lines, instructions."""
    names = ("kernel", "kind", "level", "space", "loc1", "loc2")
    return (*(report[name] for name in names), report["text1"].split()[0], report["text2"].split()[0])


def merge_report(report: Report) -> None:
    """Adds to REPORTS; the example shown is one with differing values where there is any."""
    key = report_key(report)
    kept = REPORTS.get(key)
    if kept is None:
        REPORTS[key] = dict(report)
        return
    count, differing = kept["count"] + report["count"], kept["differing"] + report["differing"]
    if report["differing"] and not kept["differing"]:
        kept.update(report)
    kept.update(count=count, differing=differing)


def collect(module: Module, name: str) -> None:
    """Takes the reports of a module's last launch."""
    for report in module.reports():
        report.update(kernel=name, test=CONTEXT["test"])
        merge_report(report)
        if report["differing"]:
            _fresh.append(report)


def harmful() -> list[Report]:
    """Races with differing values, and uninitialised reads, of all launches."""
    return [report for report in REPORTS.values() if report["differing"]]


def take_harmful() -> list[Report]:
    """Those of the launches since this was last asked, alike ones once."""
    found = {report_key(report): report for report in _fresh}
    _fresh.clear()
    return list(found.values())


def describe(report: Report) -> str:
    """A report in words, of several lines."""
    r = report
    worst = f"{r['differing']} of {r['count']} with other values" if r["differing"] else "same values"
    lines = [f"{r['kernel']}: {r['space']} {r['kind']} {r['level']}, {r['count']} times ({worst})"]
    lines.append(f"    {r['loc1']}  [line {r['line1']}: {r['text1']}]")
    if r["kind"] != "uninitialised read":
        lines.append(f"    {r['loc2']}  [line {r['line2']}: {r['text2']}]")
    one, two = (f"block {r[f'block{n}']} thread {r[f'thread{n}']}" for n in (1, 2))
    spread = f" (other values at {r['low']:#x} to {r['high']:#x})" if r["differing"] else ""
    lines.append(f"    e.g. {one}, {two}, address {r['addr']:#x}{spread}; {r['test']}")
    return "\n".join(lines)


class Launcher:
    """Packs the arguments of a kernel and runs it."""

    def __init__(self, src: Any, metadata: Any):
        self.metadata = metadata
        names = list(src.fn.arg_names)
        constants = {key if isinstance(key, str) else names[key[0]] for key in src.constants}
        kinds = [src.signature.get(name, "constexpr") for name in names]
        self.kinds = [None if kind == "constexpr" or n in constants else kind for n, kind in zip(names, kinds)]

    def __call__(self, x: int, y: int, z: int, stream: Any, function: Module, *rest: Any) -> None:
        if getattr(self.metadata, "global_scratch_size", 0) or getattr(self.metadata, "profile_scratch_size", 0):
            raise PtxSimError("scratch memory is not implemented")
        params = self.pack(function, rest[-len(self.kinds) :] if self.kinds else ())
        name = self.metadata.name
        began = time.perf_counter()
        try:
            function.launch((x, y, z), params, self.metadata.shared, **OPTIONS)
        finally:
            entry = LAUNCHES.setdefault(name, [0, 0.0])
            entry[0] += 1
            entry[1] += time.perf_counter() - began
            collect(function, name)
        for callback in CALLBACKS:
            callback(name, function, self.metadata)

    def pack(self, module: Module, arguments: tuple[Any, ...]) -> bytes:
        """The bytes of a kernel's parameters; pointers to scratch memory, which come last, are 0."""
        used = [(kind, argument) for kind, argument in zip(self.kinds, arguments) if kind is not None]
        places = module.params
        if not len(used) <= len(places) <= len(used) + 2:
            raise PtxSimError(f"{len(used)} arguments for {len(places)} parameters")
        packed = bytearray(sum(places[-1]) if places else 0)
        for (kind, argument), (offset, size) in zip(used, places):
            data = pack_argument(kind, argument)
            if len(data) != size:
                raise PtxSimError(f"{kind} for a parameter of {size} bytes")
            packed[offset : offset + size] = data
        return bytes(packed)


def pack_argument(kind: str, argument: Any) -> bytes:
    """The bytes of one argument."""
    if kind.startswith("*"):
        if isinstance(argument, torch.Tensor):
            argument = argument.data_ptr()
        return struct.pack("<Q", argument or 0)
    if kind not in PACK:
        raise PtxSimError(f"an argument of type {kind}")
    return struct.pack("<" + PACK[kind], argument)


class Utils:
    """What Triton asks of a device."""

    def __init__(self, capability: int):
        self.capability = capability

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        """Module, function, registers, spills, most threads."""
        module = MODULES[bytes(kernel).decode()]
        return module, module, 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Of an H100, except for the shared memory."""
        return {
            "max_shared_mem": SHARED[self.capability],
            "multiprocessor_count": 132,
            "max_num_regs": 65536,
            "warpSize": 32,
            "sm_clock_rate": 1700000,
            "mem_clock_rate": 1,
            "mem_bus_width": 1,
        }


class Driver:
    """Triton's active driver."""

    binary_ext = "cubin"
    launcher_cls = Launcher

    def __init__(self, capability: int):
        self.capability = capability
        self.utils = Utils(capability)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(self.capability, 10)

    def get_device_interface(self) -> Any:
        return torch.cuda

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty


def _name_cubin(self: Any, src: str, metadata: Any, opt: Any, capability: int) -> bytes:
    """In the place of ptxas: a name for the PTX."""
    return b"ptxsim:" + hashlib.sha1(src.encode()).hexdigest().encode()


def _hook_compiled_kernels() -> None:
    original = compiler.CompiledKernel.__init__
    if getattr(original, "ptxsim", False):
        return

    def init(self: Any, src: Any, metadata_group: Any, hash: str) -> None:
        original(self, src, metadata_group, hash)
        key = bytes(self.kernel).decode()
        if key not in MODULES:
            MODULES[key] = Module(self.asm["ptx"], self.metadata.num_warps * 32)

    init.ptxsim = True  # type: ignore[attr-defined]
    compiler.CompiledKernel.__init__ = init


def order_number(order: str) -> int:
    """The number of an order of warps and blocks, from its name or that number."""
    if order not in (*ORDERS, "0", "1", "2"):
        raise ValueError(f"order {order} is none of {', '.join(ORDERS)}, 0, 1, 2")
    return int(order) if order.isdigit() else ORDERS.index(order)


def install(capability: int = 90, poison: bool = True, **options: int) -> None:
    """The emulator is Triton's device in this process from here on."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 replaces the compiler")
    if capability not in SHARED:
        raise ValueError(f"capability {capability} is none of {', '.join(map(str, SHARED))}")
    # cubins here are names only: none of them may reach a real device
    triton.knobs.cache.dir = os.environ.get("PTXSIM_CACHE") or str(cache_folder("triton"))
    track_torch(poison)
    OPTIONS.update(options)
    CUDABackend.make_cubin = _name_cubin
    driver.set_active(Driver(capability))
    _hook_compiled_kernels()


@contextlib.contextmanager
def serve(capability: int = 90, reflora: bool = False, poison: bool = True, **options: int) -> Iterator[None]:
    """`install` for a `with` statement. What was compiled for the emulator stays with it afterwards."""
    install(capability, poison, **options)
    if reflora:
        from .reflora_hook import serve_reflora

        serve_reflora()
    yield
