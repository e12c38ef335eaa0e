"""What a LoRA pair is, and every check of what a caller passes in.

Inner code trusts what has passed here. Errors name what was expected, what came, and the remedy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from .overlap import extent as extent
from .overlap import overlaps_itself, shared

BACKENDS = ("triton", "cpp", "torch")
PRECISIONS = ("float64", "float32")
STORAGE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
RANK_CLASSES = (16, 32, 64, 128)

# a factor is degenerate past this Frobenius condition estimate ||L||_F ||L^-1||_F of the Cholesky
# factor of its Gram (at least k, at most r k / 2 + 1), and past the second times sqrt(r): the rounding of a singular
# Gram in float32 read as 830 sqrt(r) and more in 11 000 draws, n up to 32768. On every backend
KAPPA_MAX = {"float64": 1e6, "float32": 1e4}
KAPPA_OF_RANK = {"float64": math.inf, "float32": 800.0}

# steps after which a Gram counts half in S by default, see reference.shrink_weight; chosen in benchmarks/NOTES.md
START_STEPS = 400

# values of the `status` column of Diagnostics
REFACTORED, DEGENERATE, SKIPPED, PLAIN = 0, 1, 2, 3


NO_GRADIENT = (
    "no LoRA pair of the optimizer has a gradient in this step: none is trained. Is another adapter active? Was the "
    "model sharded, or its parameters replaced, after the optimizer was made? Does a checkpointed block get inputs "
    "without one (enable_input_require_grads)?"
)


def fail(what: str, expected: object, got: object, remedy: str, error: type[Exception] = ValueError) -> NoReturn:
    """Raise `error` with the one wording every error of this package has, in under 300 characters.

    Of a long `what`, the path of a layer, the end is shown, and of a long `got` the beginning.
    """
    what = what if len(what) <= 80 else f"...{what[-77:]}"
    shown = str(got)
    room = min(120, 299 - len(f"{what}: expected {expected}, got . {remedy}"))
    raise error(
        f"{what}: expected {expected}, got {shown if len(shown) <= room else f'{shown[: room - 20]}...'}. {remedy}"
    )


@dataclass(frozen=True, eq=False)
class LoRAPair:
    """One LoRA adapter of one layer: leaf tensors A and B with `dW = scaling * B @ A`.

    `layout` says how the storage is read as `A [r, n_in]` and `B [n_out, r]`:

    - `"linear"`, `"embedding"`: A `[r, n_in]`, B `[n_out, r]`
    - `"conv"`: A `[r, in, *kernel]`, B `[n_out, r, 1, ...]`
    - `"experts(E)"`: A `[E * r, n_in]` or `[E, r, n_in]`, B `[n_out, r * E]` or `[n_out, r, E]`, E innermost
    """

    name: str
    A: Tensor
    B: Tensor
    layout: str = "linear"

    @property
    def experts(self) -> int:
        number = self.layout.removeprefix("experts(").removesuffix(")")
        return int(number) if number.isdecimal() and len(number) < 10 else 1

    @property
    def sharded(self) -> bool:
        """Whether a process holds either factor in part; tensor parallelism cuts one of the two."""
        return is_sharded(self.A) or is_sharded(self.B)

    @property
    def rank(self) -> int:
        return self.views_A(self.A)[0].shape[0]

    def views_A(self, tensor: Tensor) -> list[Tensor]:
        """`tensor`, shaped and laid out like A, as one `[r, n_in]` view for each expert (no copy)."""
        if self.layout.startswith("experts"):
            stack = tensor if tensor.dim() == 3 else tensor.unflatten(0, (self.experts, -1))
            return list(stack.unbind(0))
        return [_rows(tensor) if self.layout == "conv" else tensor]

    def views_B(self, tensor: Tensor) -> list[Tensor]:
        """`tensor`, shaped and laid out like B, as one `[n_out, r]` view for each expert (no copy)."""
        if self.layout.startswith("experts"):
            stack = tensor if tensor.dim() == 3 else tensor.unflatten(1, (-1, self.experts))
            return list(stack.unbind(2))
        return [_rows(tensor) if self.layout == "conv" else tensor]


def _rows(tensor: Tensor) -> Tensor:
    """`[r, in, *kernel]` as `[r, in * kernel]` in storage order: rows are mixed as wholes, any order will do."""
    strides = tensor.stride()
    order = sorted(range(1, tensor.dim()), key=lambda d: -strides[d])
    return tensor.permute(0, *order).view(tensor.shape[0], tensor.shape[1:].numel())


PairLike = LoRAPair | tuple[Tensor, Tensor]


def is_sharded(tensor: Tensor) -> bool:
    """Whether a process holds it in part: a DTensor of torch.distributed."""
    return type(tensor).__name__ == "DTensor"


def local(tensor: Tensor) -> Tensor:
    """What this process holds of it; the same memory."""
    return tensor.detach().to_local() if is_sharded(tensor) else tensor.detach()  # type: ignore[attr-defined]


def as_pairs(pairs: Iterable[PairLike], sharded: bool = False) -> list[LoRAPair]:
    """`(A, B)` tuples become LoRAPairs; every pair is checked. sharded: DTensors will do.

    Raises ValueError or TypeError naming the pair: shapes that do not match, a dtype outside
    float32/float64/bfloat16/float16, two devices or dtypes in a pair, overlapping storage.
    """
    checked = named_pairs(pairs)
    for pair in checked:
        check_pair(pair, sharded)
    whole = [pair for pair in checked if not pair.sharded]
    check_disjoint([(f"{pair.name}, {side}", t) for pair in whole for side, t in (("A", pair.A), ("B", pair.B))])
    return checked


def named_pairs(pairs: Iterable[PairLike]) -> list[LoRAPair]:
    """`(A, B)` tuples become LoRAPairs; each is made of two tensors, a name and a layout."""
    if isinstance(pairs, (LoRAPair, Tensor, Mapping, str)) or not isinstance(pairs, Iterable):
        fail("pairs", "a list of (A, B) pairs", type(pairs).__name__, "Wrap a single pair in a list.", TypeError)
    named = []
    for index, pair in enumerate(pairs):
        if not isinstance(pair, LoRAPair):
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                got = f"{len(pair)} things" if isinstance(pair, (tuple, list)) else type(pair).__name__
                fail(f"pair {index}", "LoRAPair or (A, B)", got, "See reflora.find_pairs.", TypeError)
            pair = LoRAPair(f"pair {index}", *pair)
        for what, word in (("name", pair.name), ("layout", pair.layout)):
            if not isinstance(word, str):
                fail(f"pair {index}, {what}", "text", type(word).__name__, "See LoRAPair.", TypeError)
        for side, tensor in (("A", pair.A), ("B", pair.B)):
            if not isinstance(tensor, Tensor):
                got = type(tensor).__name__
                fail(f"{pair.name}, {side}", "a torch.Tensor", got, "Pass the weights themselves.", TypeError)
            check_shaped(f"{pair.name}, {side}", tensor)
        named.append(pair)
    return named


def check_pair(pair: LoRAPair, sharded: bool = False) -> None:
    """Shapes, dtypes, devices and storage of one pair."""
    for side, tensor in (("A", pair.A), ("B", pair.B)):
        what = f"{pair.name}, {side}"
        if tensor.dtype not in STORAGE_DTYPES:
            remedy = "Quantised base weights are fine, the LoRA factors themselves must be floating point."
            fail(what, "float32, float64, bfloat16 or float16", tensor.dtype, remedy, TypeError)
        if is_sharded(tensor) and not sharded:
            remedy = "Use reflora.create_reflora_optimizer or reflora.Refactorer (FSDP2, tensor parallelism)."
            fail(what, "a tensor held whole by this process", type(tensor).__name__, remedy)
        if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta:
            remedy = "Sparse, nested and meta tensors cannot be refactored: materialise the factors first."
            got = f"{type(tensor).__name__} ({'nested' if tensor.is_nested else tensor.layout})"
            fail(what, "a dense tensor on a device", got, remedy)
        if not is_sharded(tensor):
            check_memory(what, tensor)
    if pair.A.device != pair.B.device:
        remedy = "Move both factors of a pair to one device; different pairs may be on different devices."
        fail(pair.name, f"B on {pair.A.device} like A", pair.B.device, remedy)
    if pair.A.dtype != pair.B.dtype:
        fail(pair.name, f"B of {pair.A.dtype} like A", pair.B.dtype, "Cast both factors of a pair to one dtype.")
    _check_shapes(pair)


def check_shaped(what: str, tensor: Tensor) -> None:
    """A parameter of a lazy module has neither shape nor values before its first call."""
    if isinstance(tensor, (torch.nn.UninitializedParameter, torch.nn.UninitializedBuffer)):
        fail(what, "a tensor with a shape", type(tensor).__name__, "Call the model once: its modules are lazy.")


def check_memory(what: str, tensor: Tensor) -> None:
    """What is read and written by its address has memory for each of its elements, which holds their values."""
    check_plain(what, tensor)
    check_there(what, tensor)


def check_there(what: str, tensor: Tensor) -> None:
    """There is memory at every address of its elements."""
    try:
        storage = tensor.untyped_storage()
        # a fake tensor says that it is on a device, its storage that it is not
        first, end = extent(tensor) if storage.device == tensor.device else (0, 0)
        room = storage.nbytes() - tensor.storage_offset() * tensor.element_size()
        there = tensor.numel() == 0 or (first != 0 and end - first <= room)
    except (RuntimeError, NotImplementedError):  # no storage at all: inside torch.func, subclasses that wrap others
        there = False
    if not there:
        remedy = "Fake tensors, those inside torch.func and those whose storage was freed have none."
        fail(what, "a tensor with memory of its own", f"a {type(tensor).__name__} without", remedy)


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
    """torch writes what was made in inference mode nowhere else."""
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        remedy = "Call under torch.inference_mode(), or pass a clone() made outside of it."
        fail(what, "a tensor that can be written here", "one made in inference mode", remedy, RuntimeError)


def _check_shapes(pair: LoRAPair) -> None:
    A, B, layout = pair.A, pair.B, pair.layout
    got = f"A {tuple(A.shape)} and B {tuple(B.shape)}"
    flat = "FSDP1 flattens parameters and ZeRO-3 takes them away: use FSDP2, DDP or ZeRO-2 (reflora.GradientHooks)."
    remedy = flat if 1 in (A.dim(), B.dim()) else "Check the order (A first) and the layout of the pair."
    if layout in ("linear", "embedding"):
        ok = A.dim() == 2 and B.dim() == 2 and A.shape[0] == B.shape[1]
        expected = "A [r, n_in] and B [n_out, r]"
    elif layout == "conv":
        ok = A.dim() > 2 and B.dim() > 2 and A.shape[0] == B.shape[1] and B.shape[2:].numel() == 1
        expected = "A [r, in, *kernel] and B [n_out, r, 1, ...]"
    elif re.fullmatch(r"experts\([1-9]\d{0,8}\)", layout):
        E = pair.experts
        ok = A.dim() in (2, 3) and B.dim() in (2, 3) and (A.shape[0] == E if A.dim() == 3 else A.shape[0] % E == 0)
        r = A.shape[1] if A.dim() == 3 else A.shape[0] // E
        ok = ok and (tuple(B.shape[1:]) == (r, E) if B.dim() == 3 else B.shape[1] == r * E)
        expected = f"A [{E} * r, n_in] or [{E}, r, n_in] and B [n_out, r * {E}] or [n_out, r, {E}]"
    else:
        fail(pair.name, "layout 'linear', 'embedding', 'conv' or 'experts(E)'", repr(layout), "See LoRAPair.")
    if not ok:
        fail(pair.name, expected, got, remedy)
    if min(A.numel(), B.numel()) == 0:
        fail(pair.name, "at least one element in A and B", got, "Leave empty factors out of the list.")
    if layout.startswith("experts") and pair.sharded:
        _check_cut(pair)
    try:
        pair.views_A(A), pair.views_B(B)
    except RuntimeError:
        strides = f"strides {A.stride()} and {B.stride()}"
        fail(pair.name, "factors that can be viewed as matrices", strides, "Call .contiguous() on them first.")


def _check_cut(pair: LoRAPair) -> None:
    """Each process holds a part of every expert."""
    if 3 in (pair.A.dim(), pair.B.dim()):
        got = f"A {tuple(pair.A.shape)} and B {tuple(pair.B.shape)}"
        remedy = "Keep them as A [E * r, n_in] and B [n_out, r * E]."
        fail(pair.name, "sharded expert factors of two dimensions", got, remedy)
    for side, tensor, dim in (("A", pair.A, 0), ("B", pair.B, 1)):
        cut: Any = tensor.placements if is_sharded(tensor) else ()  # type: ignore[attr-defined]
        if pair.experts > 1 and any(placed.is_shard(dim) for placed in cut):
            remedy = (
                "Shard A by columns, fully_shard(..., shard_placement_fn=reflora.shard_placement(model, n)), where n "
                "divides n_in; leave other layers whole (ignored_params=)."
            )
            fail(f"{pair.name}, {side}", "expert factors that are not cut across experts", cut, remedy)


# how many GradientHooks have been made, in a list so that all read the same
HOOKED = [0]


def check_unhooked_since(pairs: Iterable[LoRAPair], seen: int) -> int:
    """As `check_unhooked`, where more of them have been made than were `seen`. Returns how many there are."""
    if HOOKED[0] != seen:
        check_unhooked(pairs)
    return HOOKED[0]


def check_unhooked(pairs: Iterable[LoRAPair]) -> None:
    """Raises ValueError where GradientHooks precondition already: S would be applied twice."""
    for pair in pairs:
        if any(getattr(hook, "preconditions", False) for hook in (pair.A._backward_hooks or {}).values()):
            remedy = "Call their remove() first: S would be applied twice."
            fail(pair.name, "gradients that nothing preconditions yet", "reflora.GradientHooks on the model", remedy)


def check_disjoint(named: Sequence[tuple[str, Tensor]], error: type[Exception] = ValueError) -> None:
    """No two of these may share memory: each is written once a step."""
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


def check_scalar(scalar: bool) -> None:
    if not isinstance(scalar, bool):
        fail("scalar", "True or False", told(scalar, bool), "True is RefLoRA-S.", TypeError)


def told(value: Any, *expected: type) -> str:
    """How an error shows a value, with its type where that is none of these."""
    if value is None or isinstance(value, expected):
        return repr(value)
    module, kind = type(value).__module__, type(value).__name__
    kind = kind if module == "builtins" else f"{module}.{kind}"
    return f"a {kind}" if isinstance(value, Tensor) else f"{str(value)[:60]!r}, of type {kind}"


def start_of(warmup_steps: int | None) -> int:
    """Steps after which a Gram counts half in S: START_STEPS for None, 0 (the exact S at once) for a number."""
    return START_STEPS if warmup_steps is None else 0


def check_count(what: str, value: Any, minimum: int, or_none: str = "") -> None:
    """or_none: what None, which the caller has seen to, stands for."""
    expected, remedy = f"an integer >= {minimum}", "It is a count."
    if or_none:
        expected, remedy = f"None or {expected}", f"None, the default, {or_none}."
    if not isinstance(value, int) or isinstance(value, bool):
        # numpy's integers too: they do not go into a kernel, nor come out of a checkpoint
        fail(what, expected, told(value), f"{remedy} Pass an int." if hasattr(value, "__index__") else remedy)
    if value < minimum:
        fail(what, expected, repr(value), remedy)
    if value >= 2**31:
        fail(what, f"{expected}, less than 2^31", f"one of {value.bit_length()} bits", "10**9 is never.")
