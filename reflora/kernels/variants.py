"""The kernels as they are launched, for compiling them ahead of a launch: signature, constants and options."""

from __future__ import annotations

from typing import Any

import torch

from ..contract import STORAGE_DTYPES
from .adamw import adamw_kernel
from .dtypes import MIXED
from .geometric_mean import geometric_mean_kernel
from .launch import Group, launch_options, solve_constants
from .matrices import constants as matrix_constants
from .polar import polar_kernel
from .precondition import precondition_kernel
from .refactor import refactor_kernel
from .sqrtm import sqrtm_kernel
from .table import FRESH

Variant = tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]

PAIR = {"table": "*i64", "rows": "*i32", "results": "*fp64", "work": "*fp64"}
PAIR_KERNELS = {"precondition": precondition_kernel, "refactor": refactor_kernel, "adamw": adamw_kernel}
PAIR_CONSTANTS: dict[str, dict[str, Any]] = {
    "precondition": {"SCALAR": False},
    "refactor": {"SCALAR": False},
    "adamw": {
        "SOURCE": FRESH.value, "KEEP": False, "BEFORE": False, "AFTER": False, "AMSGRAD": False, "grad_scale": None,
        "found_inf": None,
    },
}  # fmt: skip
MATRIX_KERNELS = {"polar": polar_kernel, "geometric_mean": geometric_mean_kernel, "sqrtm": sqrtm_kernel}


def variant(name: str, rank_class: int, precision: str, storage: str, **changed: Any) -> Variant:
    """(kernel, signature, constants, options) of kernel `name` for tensors stored as `storage` (pairs: or "mixed").

    changed: constants in place of PAIR_CONSTANTS; a type ("*fp32") makes a signature entry of one.
    """
    if name in MATRIX_KERNELS:
        return _matrix_variant(name, rank_class, precision, storage)
    wide = torch.float64 if storage in ("mixed", "float64") else torch.float32
    code = MIXED.value if storage == "mixed" else STORAGE_DTYPES.index(getattr(torch, storage))
    group = Group(rank_class, torch.zeros(1, dtype=torch.int32), code, wide)
    constants = {**group.constants, **solve_constants(group, precision), **PAIR_CONSTANTS[name], **changed}
    pointers = {key: value for key, value in constants.items() if isinstance(value, str)}
    constants = {key: value for key, value in constants.items() if key not in pointers}
    signature = {**PAIR, "hypers": "*fp64", **pointers}
    return _complete(PAIR_KERNELS[name], signature, constants, group.options)


def _matrix_variant(name: str, rank_class: int, precision: str, storage: str) -> Variant:
    kernel = MATRIX_KERNELS[name]
    stored = {"float32": "*fp32", "float64": "*fp64"}
    signature = {p: stored[storage] for p in ("p_X", "p_Y", "p_Q", "p_H", "p_mean", "p_root")}
    signature.update(work=stored[precision], n="i32")
    constants = matrix_constants(rank_class, precision)
    if name == "sqrtm":
        constants["INVERSE"] = False
    return _complete(kernel, signature, constants, launch_options(rank_class))


def _complete(kernel: Any, signature: dict[str, str], constants: dict[str, Any], options: dict[str, int]) -> Variant:
    names = kernel.arg_names
    return kernel, {name: signature.get(name, "constexpr") for name in names}, constants, options
