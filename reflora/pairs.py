"""What a LoRA pair is: two factors, and how a layout reads them as matrices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import check_disjoint, check_memory, check_shaped, fail
from .constants import STORAGE_DTYPES


class Layout:
    """How the tensors of a pair are read as matrices; `"linear"` and `"embedding"`: they are matrices already."""

    experts = 1
    expected = "A [r, n_in] and B [n_out, r]"
    # whether a gradient must have the strides of its factor: rows in storage order are read together
    storage_order = False

    def fits(self, A: Tensor, B: Tensor) -> bool:
        """Whether the shapes make a pair."""
        return A.dim() == 2 and B.dim() == 2 and A.shape[0] == B.shape[1]

    def views_A(self, tensor: Tensor) -> list[Tensor]:
        """One `[r, n_in]` view per expert."""
        return [tensor]

    def views_B(self, tensor: Tensor) -> list[Tensor]:
        """One `[n_out, r]` view per expert."""
        return [tensor]


class Conv(Layout):
    """A `[r, in, *kernel]`, B `[n_out, r, 1, ...]`."""

    expected = "A [r, in, *kernel] and B [n_out, r, 1, ...]"
    storage_order = True

    def fits(self, A: Tensor, B: Tensor) -> bool:
        return A.dim() > 2 and B.dim() > 2 and A.shape[0] == B.shape[1] and B.shape[2:].numel() == 1

    def views_A(self, tensor: Tensor) -> list[Tensor]:
        """As `[r, in * kernel]` in storage order: rows are mixed whole, so any order works."""
        strides = tensor.stride()
        order = sorted(range(1, tensor.dim()), key=lambda d: -strides[d])
        return [tensor.permute(0, *order).view(tensor.shape[0], tensor.shape[1:].numel())]

    views_B = views_A


class Experts(Layout):
    """A `[E * r, n_in]` or `[E, r, n_in]`, B `[n_out, r * E]` or `[n_out, r, E]`, E innermost."""

    def __init__(self, experts: int):
        self.experts = experts

    @property
    def expected(self) -> str:  # type: ignore[override]
        E = self.experts
        return f"A [{E} * r, n_in] or [{E}, r, n_in] and B [n_out, r * {E}] or [n_out, r, {E}]"

    def fits(self, A: Tensor, B: Tensor) -> bool:
        E = self.experts
        ok = A.dim() in (2, 3) and B.dim() in (2, 3) and (A.shape[0] == E if A.dim() == 3 else A.shape[0] % E == 0)
        r = A.shape[1] if A.dim() == 3 else A.shape[0] // E
        return ok and (tuple(B.shape[1:]) == (r, E) if B.dim() == 3 else B.shape[1] == r * E)

    def views_A(self, tensor: Tensor) -> list[Tensor]:
        stack = tensor if tensor.dim() == 3 else tensor.unflatten(0, (self.experts, -1))
        return list(stack.unbind(0))

    def views_B(self, tensor: Tensor) -> list[Tensor]:
        stack = tensor if tensor.dim() == 3 else tensor.unflatten(1, (-1, self.experts))
        return list(stack.unbind(2))


LAYOUTS = {"linear": Layout(), "embedding": Layout(), "conv": Conv()}


def layout_of(name: str) -> Layout | None:
    """The layout of that name, or None. Written so that torch.compile can trace it."""
    if name in LAYOUTS:
        return LAYOUTS[name]
    number = name.removeprefix("experts(").removesuffix(")")
    counts = number.isdecimal() and number.isascii() and number[0] != "0" and len(number) < 10
    return Experts(int(number)) if counts and name == f"experts({number})" else None


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
    def read(self) -> Layout:
        """The layout itself; the plain one for a name that `check_pair` would refuse."""
        return layout_of(self.layout) or LAYOUTS["linear"]

    @property
    def experts(self) -> int:
        return self.read.experts

    @property
    def sharded(self) -> bool:
        """Whether a process holds only part of either factor; tensor parallelism cuts one of the two."""
        return is_sharded(self.A) or is_sharded(self.B)

    @property
    def rank(self) -> int:
        return self.views_A(self.A)[0].shape[0]

    @property
    def row_names(self) -> list[str]:
        """One name per row of the table: the pair's, with a number for experts."""
        several = isinstance(self.read, Experts)
        return [f"{self.name}[{expert}]" for expert in range(self.experts)] if several else [self.name]

    def views_A(self, tensor: Tensor) -> list[Tensor]:
        """`tensor`, shaped and laid out like A, as one `[r, n_in]` view per expert (no copy)."""
        return self.read.views_A(tensor)

    def views_B(self, tensor: Tensor) -> list[Tensor]:
        """`tensor`, shaped and laid out like B, as one `[n_out, r]` view per expert (no copy)."""
        return self.read.views_B(tensor)

    @property
    def factors(self) -> list[tuple[Tensor, Tensor]]:
        """`(A [r, n_in], B [n_out, r])` of each expert, as views (no copy)."""
        return list(zip(self.views_A(self.A), self.views_B(self.B)))


PairLike = LoRAPair | tuple[Tensor, Tensor]


def is_sharded(tensor: Tensor) -> bool:
    """Whether a process holds only part of it: a DTensor of torch.distributed, or a parameter that Megatron splits."""
    return is_dtensor(tensor) or is_split(tensor)


def is_dtensor(tensor: Tensor) -> bool:
    return type(tensor).__name__ == "DTensor"


def is_split(tensor: Tensor) -> bool:
    """Whether Megatron has marked it as its process's part, a plain tensor; gradients and state bear no mark."""
    return bool(getattr(tensor, "tensor_model_parallel", False))


def local(tensor: Tensor) -> Tensor:
    """The part that this process holds; the same memory."""
    return tensor.detach().to_local() if is_dtensor(tensor) else tensor.detach()  # type: ignore[attr-defined]


def form_of(tensor: Tensor) -> str:
    """What a sharded tensor is, for messages."""
    return "a part that Megatron split off" if is_split(tensor) else type(tensor).__name__


def as_pairs(pairs: Iterable[PairLike], sharded: bool = False) -> list[LoRAPair]:
    """`(A, B)` tuples become LoRAPairs; every pair is checked. sharded: sharded factors are accepted.

    Raises ValueError or TypeError naming the pair: shapes that do not match, a dtype outside
    float32/float64/bfloat16/float16, two devices or dtypes in a pair, overlapping storage.
    """
    checked = named_pairs(pairs)
    for pair in checked:
        check_pair(pair, sharded)
    plain = [pair for pair in checked if not (is_dtensor(pair.A) or is_dtensor(pair.B))]
    check_disjoint([(f"{pair.name}, {side}", t) for pair in plain for side, t in (("A", pair.A), ("B", pair.B))])
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
        if not sharded:
            check_held(what, tensor)
        if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta:
            remedy = "Sparse, nested and meta tensors cannot be refactored: materialise the factors first."
            got = f"{type(tensor).__name__} ({'nested' if tensor.is_nested else tensor.layout})"
            fail(what, "a dense tensor on a device", got, remedy)
        if not is_dtensor(tensor):
            check_memory(what, tensor)
    if pair.A.device != pair.B.device:
        remedy = "Move both factors of a pair to one device; different pairs may be on different devices."
        fail(pair.name, f"B on {pair.A.device} like A", pair.B.device, remedy)
    if pair.A.dtype != pair.B.dtype:
        fail(pair.name, f"B of {pair.A.dtype} like A", pair.B.dtype, "Cast both factors of a pair to one dtype.")
    _check_shapes(pair)


def check_held(what: str, tensor: Tensor) -> None:
    """This process holds it whole."""
    if is_sharded(tensor):
        remedy = "Use reflora.create_reflora_optimizer or reflora.Refactorer (FSDP2, tensor parallelism)."
        fail(what, "a tensor held whole by this process", form_of(tensor), remedy)


def _check_shapes(pair: LoRAPair) -> None:
    A, B, layout = pair.A, pair.B, layout_of(pair.layout)
    got = f"A {tuple(A.shape)} and B {tuple(B.shape)}"
    if layout is None:
        expected = "layout 'linear', 'embedding', 'conv' or 'experts(E)'"
        fail(pair.name, expected, repr(pair.layout), "See LoRAPair.")
    if not layout.fits(A, B):
        flat = "FSDP1 flattens parameters and ZeRO-3 takes them away: use FSDP2, DDP or ZeRO-2 (reflora.GradientHooks)."
        remedy = flat if 1 in (A.dim(), B.dim()) else "Check the order (A first) and the layout of the pair."
        fail(pair.name, layout.expected, got, remedy)
    if min(A.numel(), B.numel()) == 0:
        fail(pair.name, "at least one element in A and B", got, "Leave empty factors out of the list.")
    _check_split(pair)
    if isinstance(layout, Experts) and pair.sharded:
        _check_cut(pair)
    try:
        pair.views_A(A), pair.views_B(B)
    except RuntimeError:
        strides = f"strides {A.stride()} and {B.stride()}"
        fail(pair.name, "factors that can be viewed as matrices", strides, "Call .contiguous() on them first.")


def _check_split(pair: LoRAPair) -> None:
    """Megatron splits no factor along r; which of the rows or columns are a process's, its stride, is all the same."""
    for side, tensor, dim in (("A", pair.A, 1), ("B", pair.B, 0)):
        if is_split(tensor) and (found := getattr(tensor, "partition_dim", None)) != dim:
            remedy = "Cut along r it gives no part of a Gram: split the pair's other factor, as PEFT does."
            fail(f"{pair.name}, {side}", f"a factor that Megatron splits along dimension {dim}", found, remedy)
        if is_split(tensor) and getattr(tensor, "allreduce", True) is False:
            remedy = "Their group is another: keep the adapters of expert layers whole."
            fail(f"{pair.name}, {side}", "a split over the tensor-parallel group", "one of expert layers", remedy)


def _check_cut(pair: LoRAPair) -> None:
    """Each process holds a part of every expert."""
    if 3 in (pair.A.dim(), pair.B.dim()):
        got = f"A {tuple(pair.A.shape)} and B {tuple(pair.B.shape)}"
        remedy = "Keep them as A [E * r, n_in] and B [n_out, r * E]."
        fail(pair.name, "sharded expert factors of two dimensions", got, remedy)
    for side, tensor, dim in (("A", pair.A, 0), ("B", pair.B, 1)):
        cut: Any = tensor.placements if is_dtensor(tensor) else ()  # type: ignore[attr-defined]
        if pair.experts > 1 and any(getattr(placed, "dim", None) == dim for placed in cut):
            remedy = (
                "Shard A by columns, fully_shard(..., shard_placement_fn=reflora.shard_placement(model, n)), where n "
                "divides n_in; leave other layers whole (ignored_params=)."
            )
            fail(f"{pair.name}, {side}", "expert factors that are not cut across experts", cut, remedy)


# how many GradientHooks have been made; a list, so that every importer sees the same count
HOOKED = [0]


def check_unhooked_since(pairs: Iterable[LoRAPair], seen: int) -> int:
    """`check_unhooked` if more GradientHooks have been made than were `seen`. Returns how many."""
    if HOOKED[0] != seen:
        check_unhooked(pairs)
    return HOOKED[0]


def check_unhooked(pairs: Iterable[LoRAPair]) -> None:
    """Raises ValueError where GradientHooks already precondition: S would be applied twice."""
    for pair in pairs:
        if any(getattr(hook, "preconditions", False) for hook in (pair.A._backward_hooks or {}).values()):
            remedy = "Call their remove() first: S would be applied twice."
            fail(pair.name, "gradients that nothing preconditions yet", "reflora.GradientHooks on the model", remedy)
