"""Checks of what a caller passes in, except pairs (pairs.py). Inner code trusts what has passed here.

An error names what was expected, what was given, and the remedy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .constants import BACKENDS, METRICS, MOMENTS, PRECISIONS
from .overlap import extent, overlaps_itself, shared


def fail(what: str, expected: object, got: object, remedy: str, error: type[Exception] = ValueError) -> NoReturn:
    """Raise `error` in the form that every error of this package has, in under 300 characters.

    A long `what`, such as a layer's path, keeps its end, and a long `got` its beginning.
    """
    what = what if len(what) <= 80 else f"...{what[-77:]}"
    shown = str(got)
    room = min(120, 299 - len(f"{what}: expected {expected}, got . {remedy}"))
    raise error(
        f"{what}: expected {expected}, got {shown if len(shown) <= room else f'{shown[: room - 20]}...'}. {remedy}"
    )


def check_shaped(what: str, tensor: Tensor) -> None:
    """A parameter of a lazy module has neither shape nor values before its first call."""
    if isinstance(tensor, (torch.nn.UninitializedParameter, torch.nn.UninitializedBuffer)):
        fail(what, "a tensor with a shape", type(tensor).__name__, "Call the model once: its modules are lazy.")


def check_memory(what: str, tensor: Tensor) -> None:
    """A tensor read and written by address has memory for each of its elements, which holds their values."""
    check_plain(what, tensor)
    check_there(what, tensor)


def check_there(what: str, tensor: Tensor) -> None:
    """There is memory at the address of every element."""
    try:
        storage = tensor.untyped_storage()
        # a fake tensor claims a device that its storage does not
        first, end = extent(tensor) if storage.device == tensor.device else (0, 0)
        room = storage.nbytes() - tensor.storage_offset() * tensor.element_size()
        there = tensor.numel() == 0 or (first != 0 and end - first <= room)
    except (RuntimeError, NotImplementedError):  # no storage at all: inside torch.func, and in wrapper subclasses
        there = False
    if not there:
        remedy = "Fake tensors, those inside torch.func and those whose storage was freed have none."
        fail(what, "a tensor with memory of its own", f"a {type(tensor).__name__} without", remedy)


def check_held(what: str, tensor: Tensor) -> None:
    """The storage has not been freed. Unlike `check_there` also for a DTensor, which has no address."""
    if tensor.numel() and tensor.untyped_storage().nbytes() == 0:
        fail(what, "a tensor with memory", "one whose storage was freed", "Load or compute it again.")


def check_gradient(what: str, grad: Tensor, param: Tensor) -> None:
    """Its shape is the parameter's, unless `.data` of either was replaced, and it has memory."""
    if grad.shape != param.shape:
        fail(what, tuple(param.shape), tuple(grad.shape), "Gradients are shaped like their parameters.")
    check_held(what, grad)


def check_real() -> None:
    """Tensors made here have memory: tables and results are read and written by address."""
    probe = torch.empty(1, dtype=torch.uint8, device="cpu")
    try:
        real = not isinstance(probe, FakeTensor) and probe.data_ptr() != 0
    except RuntimeError:
        real = False
    if not real:
        modes = "FakeTensorMode, functionalize or another mode without memory"
        fail("tensors made in a step", "real ones", f"those of {modes}", "Call it outside.", RuntimeError)


def check_plain(what: str, tensor: Tensor) -> None:
    """Memory holds the values themselves, each in a place of its own."""
    if tensor.is_neg():
        fail(what, "the values themselves in memory", "their negatives (is_neg)", "Call .resolve_neg() first.")
    check_places(what, tensor)


def check_places(what: str, tensor: Tensor) -> None:
    """Each element has a place of its own."""
    if overlaps_itself(tensor):
        fail(what, "a tensor whose elements do not share memory", f"strides {tensor.stride()}", "Call .clone().")


def check_writable(what: str, tensor: Tensor) -> None:
    """torch writes a tensor made in inference mode only in inference mode."""
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        remedy = "Call under torch.inference_mode(), or pass a clone() made outside it."
        fail(what, "a tensor that can be written here", "one made in inference mode", remedy, RuntimeError)


def check_disjoint(named: Sequence[tuple[str, Tensor]], error: type[Exception] = ValueError) -> None:
    """No two of these may share memory: each is written once per step."""
    found = shared([tensor for _, tensor in named])
    if found:
        (first, _), (second, _) = named[found[0]], named[found[1]]
        remedy = "Pass a tied or shared adapter once, and gradients of their own."
        fail(second, "memory of its own", f"memory shared with {first}", remedy, error)


def check_backend(backend: str | None) -> None:
    if backend is not None and not (isinstance(backend, str) and backend in BACKENDS):
        names = f"None or one of {', '.join(BACKENDS)}"
        fail("backend", names, told(backend, str), "None picks the fastest that can serve.")


def check_precision(precision: str) -> None:
    if not (isinstance(precision, str) and precision in PRECISIONS):
        names = " or ".join(map(repr, PRECISIONS))
        fail("precision", names, told(precision, str), "float64 is the accurate default.")


def told(value: Any, *expected: type) -> str:
    """How an error shows a value, with its type unless that is one of these."""
    if value is None or isinstance(value, expected):
        return repr(value)
    module, kind = type(value).__module__, type(value).__name__
    kind = kind if module == "builtins" else f"{module}.{kind}"
    return f"a {kind}" if isinstance(value, Tensor) else f"{str(value)[:60]!r}, of type {kind}"


def check_count(what: str, value: Any, minimum: int, or_none: str = "") -> None:
    """or_none: what None, which the caller lets through, stands for."""
    expected, remedy = f"an integer >= {minimum}", "It is a count."
    if or_none:
        expected, remedy = f"None or {expected}", f"None, the default, {or_none}."
    if not isinstance(value, int) or isinstance(value, bool):
        # numpy's integers too: they do not go into a kernel, nor come out of a checkpoint
        fail(what, expected, told(value), f"{remedy} Pass an int." if hasattr(value, "__index__") else remedy)
    if value < minimum:
        fail(what, expected, repr(value), remedy)
    if value >= 2**31:
        fail(what, f"{expected}, less than 2^31", f"one of {value.bit_length()} bits", "10**9 means never.")


def check_flags(flags: dict[str, Any], or_none: bool = False) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool) and not (or_none and value is None):
            expected = "True, False or None" if or_none else "True or False"
            fail(name, expected, typed(value), "Text and numbers are not flags.", TypeError)


def check_number(name: str, value: Any) -> None:
    """A number, or a tensor of one; text from a YAML file is neither."""
    if type(value) is float or (isinstance(value, Real) and not isinstance(value, bool)):
        return
    if not (isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point()):
        remedy = "YAML reads 1e-4 as text and 1.0e-4 as a number." if isinstance(value, str) else "Pass a float."
        fail(name, "a number", typed(value), remedy, TypeError)


def typed(value: object) -> str:
    """How an error shows a value of the wrong type."""
    return f"{str(value)[:60]!r}, of type {type(value).__name__}"


def check_hypers(lr: Any, betas: Any, eps: Any, weight_decay: Any) -> None:
    """Called at construction and before every step, since schedulers write param_groups; nan fails too."""
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        check_number(name, value)
    if not (0 <= lr < math.inf and 0 <= eps < math.inf and 0 <= weight_decay < math.inf):
        fail("lr, eps, weight_decay", "finite numbers >= 0", (lr, eps, weight_decay), "Use maximize=True for ascent.")
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        fail("betas", "two numbers in [0, 1)", typed(betas), "The defaults are (0.9, 0.999).", TypeError)
    for beta in betas:
        check_number("betas", beta)
    if not all(0 <= float(beta) < 1 for beta in betas):
        fail("betas", "two numbers in [0, 1)", betas, "The defaults are (0.9, 0.999).")


def check_whitening(metric: Any, moments: Any, damping: Any) -> None:
    for name, value, known in (("metric", metric, METRICS), ("moments", moments, MOMENTS)):
        if not (isinstance(value, str) and value in known):
            fail(name, f"one of {', '.join(known)}", told(value, str), f"{known[0]!r} is the default.")
    check_number("damping", damping)
    if not 0 < damping <= 1:
        fail("damping", "a number in (0, 1]", repr(damping), "It is relative to the mean eigenvalue.")


def check_reg(reg: Any) -> None:
    check_number("reg", reg)
    if not 1e-30 <= reg <= 1e30:
        fail("reg", "a number from 1e-30 to 1e30", repr(reg), "It is added to the diagonal of A A^T and of B^T B.")


def check_schedule(interval: int, warmup_steps: int | None) -> None:
    check_count("interval", interval, 1)
    if warmup_steps is not None:
        check_count("warmup_steps", warmup_steps, 0, "phases S in gradually")


def check_storage(state_dtype: torch.dtype | None, master_weights: bool, stochastic_rounding: bool) -> None:
    if state_dtype not in (None, torch.float32):
        fail(
            "state_dtype", "None or torch.float32", typed(state_dtype), "None keeps the moments in the factors' dtype."
        )
    if master_weights and stochastic_rounding:
        fail("stochastic_rounding", "False with master_weights=True", True, "Master weights lose nothing to rounding.")


def check_carry(carry_grams: bool, scalar: bool) -> None:
    if carry_grams and scalar:
        fail("carry_grams", "False with scalar=True", True, "RefLoRA-S needs no Grams.")
