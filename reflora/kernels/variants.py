"""The kernels as they are launched, for compiling them ahead of a launch: signature, constants and options."""

from __future__ import annotations

from typing import Any

import torch

from ..columns import P
from ..constants import STORAGE_DTYPES
from .dtypes import MIXED
from .linalg import eigh, inv_root, svd
from .linalg.geometric_mean import geometric_mean_kernel
from .linalg.jacobi import constants as eigen_constants
from .linalg.matrices import constants as matrix_constants
from .linalg.matrices import options as matrix_options
from .linalg.polar import polar_kernel
from .linalg.sqrtm import sqrtm_kernel
from .step.adamw import row_kernel, settle_kernel, update_kernel
from .step.adamw_scalar import foresee_kernel, turn_kernel
from .step.apply import apply_kernel, apply_options
from .step.frames import frames_kernel
from .step.gather import gram_kernel
from .step.invariant import grams_kernel, move_kernel
from .step.launch import RankClass, scalar_constants, solve_constants, state_constants
from .step.precondition import solve_kernel
from .step.refactor import factor_type, refactor_kernel
from .step.scalar import balance_kernel, squares_kernel
from .step.second_moments import absorb_kernel
from .step.whiten import whiten_kernel

Variant = tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]

PAIR = {
    "table": "*i64", "rows": "*i32", "results": "*fp64", "work": "*fp64", "hypers": "*fp64", "items": "*i32",
    "headers": "*fp64", "arrivals": "*i32", "warmup": "i32", "start": "i32", "interval": "i32", "damping_bits": "i64",
}  # fmt: skip
PAIR_KERNELS = {
    "gram": gram_kernel, "settle": settle_kernel, "update": update_kernel, "row": row_kernel, "foresee": foresee_kernel,
    "turn": turn_kernel, "solve": solve_kernel, "refactor": refactor_kernel, "apply": apply_kernel,
    "squares": squares_kernel, "balance": balance_kernel, "grams": grams_kernel, "frames": frames_kernel,
    "whiten": whiten_kernel, "move": move_kernel, "absorb": absorb_kernel,
}  # fmt: skip
SCALAR_KERNELS = ("foresee", "turn", "squares", "balance")
ABSENT = {"grad_scale": None, "found_inf": None, "seed": None, "reg_bits": None}
PAIR_CONSTANTS: dict[str, Any] = {
    "SCHEDULED": False, "CARRY": False, "CHECK": True, "AMSGRAD": False, "MASTER": False,
    "SAVE": False, "MATRICES": True, "COLUMN": P, "GRADIENTS": False, "VECTOR": True, "METRIC": 0,
    "MOMENTUM": False, "LATE": False, **ABSENT,
}  # fmt: skip
EIGEN_KERNELS = {"eigh": eigh.eigh_kernel, "svd": svd.svd_kernel, "inv_root": inv_root.inv_root_kernel}
MATRIX_KERNELS = {
    "polar": polar_kernel, "geometric_mean": geometric_mean_kernel, "sqrtm": sqrtm_kernel, **EIGEN_KERNELS,
}  # fmt: skip
MATRIX_CONSTANTS = {"INVERSE": False, "VECTORS": True, "WARM": False}


def variant(
    name: str, rank_class: int, precision: str, storage: str, state: str | None = None, capability: int = 0,
    **changed: Any,
) -> Variant:  # fmt: skip
    """(kernel, signature, constants, options) of kernel `name` for tensors stored as `storage` (pairs: or "mixed").

    state: how moments are stored, default as the factors. capability: what to compile for. changed: constants in place
    of the usual ones; a type ("*fp32", "i64") makes a signature entry of one.
    """
    if name in MATRIX_KERNELS:
        return _matrix_variant(name, rank_class, precision, storage, **changed)
    wide = torch.float64 if storage in ("mixed", "float64") else torch.float32
    code = MIXED.value if storage == "mixed" else STORAGE_DTYPES.index(getattr(torch, storage))
    state = code if state is None else STORAGE_DTYPES.index(getattr(torch, state))
    group = RankClass(rank_class, code, state, wide, torch.device("cpu"))
    kernel = PAIR_KERNELS[name]
    constants = {**PAIR_CONSTANTS, **group.constants, **solve_constants(group, precision, capability)}
    own = scalar_constants(group) if name in SCALAR_KERNELS else state_constants(group, precision)
    constants = {
        **constants,
        "TYPE": factor_type(constants),
        "STORED": factor_type(constants),
        "APART": group.apart,
        "TENSOR": group.tensor_cores(precision, capability),
        **own,
        **changed,
    }
    constants["CARRY"] = constants["CARRY"] and group.carries
    typed = {key: value for key, value in constants.items() if isinstance(value, str)}
    constants = {key: constants[key] for key in kernel.arg_names if key in constants and key not in typed}
    options = group.scalar_options if name in SCALAR_KERNELS else group.options
    if name == "gram":
        options = group.gram_options
    if name in ("frames", "whiten", "absorb"):
        options = group.whiten_options
    if name == "apply":
        blocks, options = apply_options(group, constants)
        constants.update(blocks)
    if name == "grams":
        options = group.both_grams_options(precision, constants["CARRY"], capability)
    if name == "update":
        options = group.update_options(constants["CARRY"], constants["VECTOR"])
    if name == "move":
        options = group.move_options(precision, constants["CARRY"], constants["VECTOR"], capability)
    if name in ("grams", "update", "move"):
        constants["BN"] = options.pop("BN")
    return _complete(kernel, {**PAIR, **typed}, constants, options)


def _matrix_variant(name: str, rank_class: int, precision: str, storage: str, **changed: Any) -> Variant:
    kernel = MATRIX_KERNELS[name]
    stored = {"float32": "*fp32", "float64": "*fp64"}
    signature = {p: stored[storage] for p in kernel.arg_names if p.startswith("p_")}
    signature.update(work=stored[precision], n="i32", p_bits="i64", eps_bits="i64", unit_bits="i64")
    eigen = name in EIGEN_KERNELS
    constants = eigen_constants(rank_class, precision) if eigen else matrix_constants(rank_class, precision)
    constants = {**MATRIX_CONSTANTS, **constants, **changed}
    constants = {key: constants[key] for key in kernel.arg_names if key in constants}
    options = matrix_options(rank_class, precision, name if eigen else "matrices")
    return _complete(kernel, signature, constants, options)


def _complete(kernel: Any, signature: dict[str, str], constants: dict[str, Any], options: dict[str, int]) -> Variant:
    names = kernel.arg_names
    return kernel, {name: signature.get(name, "constexpr") for name in names}, constants, options
