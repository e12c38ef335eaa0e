"""`torch.ops.reflora.refactor_` and `precondition_`: what torch.compile puts into a graph."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix, ops
from .checks import check_disjoint, fail
from .columns import REPORTED
from .diagnostics import Diagnostics, row_names
from .direct import (
    Grads,
    check_grads,
    check_grads_apart,
    grads_of,
    precondition,
    precondition_checked,
    refactor,
    refactor_checked,
    writable_pairs,
)
from .pairs import LoRAPair, PairLike, as_pairs, check_held, named_pairs

# a table of addresses is useless in a CUDA graph that inductor captures by itself
OP_TAGS = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()


def refactor_traced(pairs: Iterable[PairLike], scalar: bool, backend: str | None, precision: str) -> Diagnostics:
    named = named_pairs(pairs)
    if not named:
        return _reported(named, None)
    factors, layouts = _flat(named)
    checked = ops.checked(factors, [], None, layouts)
    return _reported(named, ops.refactor_(factors, layouts, scalar, backend or "", precision, checked))


def precondition_traced(
    pairs: Iterable[PairLike], grads: Grads | None, scalar: bool, backend: str | None, precision: str
) -> Diagnostics:
    named = named_pairs(pairs)
    sides = grads_of(named, grads)
    both = [index for index, (a, b) in enumerate(sides) if a is not None and b is not None]
    flat = [g.detach() for index in both for g in sides[index] if g is not None]
    if not named:
        return _reported(named, None)
    factors, layouts = _flat(named)
    checked = ops.checked(factors, flat, both, layouts)
    found = ops.precondition_(factors, flat, both, layouts, scalar, backend or "", precision, checked)
    return _reported(named, found)


def _reported(pairs: list[LoRAPair], results: Tensor | None) -> Diagnostics:
    names = row_names(pairs)
    return Diagnostics(names, [] if results is None else [results], list(range(len(names))))


def _flat(pairs: list[LoRAPair]) -> tuple[list[Tensor], str]:
    """(A and B alternately, layouts) as an operator takes them; it does the rest of the checking.

    Detached, not under no_grad: an error that the operator raises in a graph would leave gradients off. This loses
    Megatron's marks, so they are looked for here.
    """
    for pair in pairs:
        check_held(f"{pair.name}, A", pair.A)
        check_held(f"{pair.name}, B", pair.B)
    return [t.detach() for pair in pairs for t in (pair.A, pair.B)], ";".join([pair.layout for pair in pairs])


def _unflat(factors: list[Tensor], layouts: str) -> list[LoRAPair]:
    named = layouts.split(";") if layouts else []
    if len(factors) != 2 * len(named):
        remedy = "Pass A and B of each pair alternately, and the layouts of the pairs separated by ;."
        fail("factors", f"two for each of {len(named)} layouts", len(factors), remedy)
    sides = zip(factors[::2], factors[1::2], named)
    return [LoRAPair(f"pair {i}", A, B, layout) for i, (A, B, layout) in enumerate(sides)]


def _ordered(found: Diagnostics, device: torch.device) -> Tensor:
    """Results in the order of the pairs, on one device; a new table, as an operator must return."""
    tables = [table[:, :REPORTED].to(device) for table in found.tables]
    if not tables:
        return torch.empty(0, REPORTED, dtype=torch.float64, device=device)
    if len(tables) == 1:
        return tables[0].contiguous()
    rows = [row for table in tables for row in table.unbind()]
    return torch.stack([rows[number] for number in found.order])


def _given(pairs: list[LoRAPair], grads: list[Tensor], both: list[int]) -> Grads:
    """Gradients of the pairs numbered `both`, alternately of A and B, as one `(gA, gB)` per pair."""
    given: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * len(pairs)
    if len(grads) != 2 * len(both) or sorted({*both} & {*range(len(pairs))}) != sorted(both):
        expected = f"gA and gB for each of {len(both)} pairs, numbered below {len(pairs)}"
        fail("grads", expected, f"{len(grads)} for {both}", "Number each pair with gradients once.")
    for place, index in enumerate(both):
        given[index] = (grads[2 * place], grads[2 * place + 1])
    return given


@torch.library.custom_op(add_op_namespace_prefix("checked"), mutates_args=(), tags=OP_TAGS)
def _checked_op(factors: list[Tensor], grads: list[Tensor], both: list[int] | None, layouts: str) -> Tensor:
    """The checks of the operators below: a graph may hand those copies, which share no memory.

    both: None where the factors are written. The result is empty; the operators take it, so that a graph keeps this
    call and runs it first.
    """
    if both is None:
        writable_pairs(_unflat(factors, layouts))
    else:
        pairs = as_pairs(_unflat(factors, layouts))
        given = _given(pairs, grads, both)
        check_grads(pairs, given)
        check_grads_apart(pairs, given)
    return torch.empty(0, dtype=torch.float32, device=_device(factors))


@torch.library.custom_op(add_op_namespace_prefix("refactor_"), mutates_args=("factors",), tags=OP_TAGS)
def _refactor_op(
    factors: list[Tensor], layouts: str, scalar: bool, backend: str, precision: str, checked: Tensor | None = None
) -> Tensor:
    """factors: A and B of each pair alternately. Returns float64 `[rows, REPORTED]` (reflora/columns.py).

    checked: the result of the operator of that name; None: not checked yet.
    """
    pairs = _unflat(factors, layouts)
    run = refactor if checked is None else refactor_checked
    return _ordered(run(pairs, scalar, backend or None, precision), _device(factors))


@torch.library.custom_op(add_op_namespace_prefix("precondition_"), mutates_args=("grads",), tags=OP_TAGS)
def _precondition_op(
    factors: list[Tensor],
    grads: list[Tensor],
    both: list[int],
    layouts: str,
    scalar: bool,
    backend: str,
    precision: str,
    checked: Tensor | None = None,
) -> Tensor:
    """grads: of A and B alternately, of the pairs numbered `both`. Returns as `reflora::refactor_`."""
    pairs = _unflat(factors, layouts)
    run = precondition if checked is None else precondition_checked
    return _ordered(run(pairs, _given(pairs, grads, both), scalar, backend or None, precision), _device(factors))


def _device(factors: list[Tensor]) -> torch.device:
    return factors[0].device if factors else torch.device("cpu")


@_checked_op.register_fake
def _(factors: list[Tensor], grads: list[Tensor], both: list[int] | None, layouts: str) -> Tensor:
    _break_where_shared(factors, grads)
    return torch.empty(0, dtype=torch.float32, device=_device(factors))


@_refactor_op.register_fake
def _(factors: list[Tensor], layouts: str, *_: object) -> Tensor:
    _break_where_shared(factors, [])
    return _table(factors, layouts)


@_precondition_op.register_fake
def _(factors: list[Tensor], grads: list[Tensor], both: list[int], layouts: str, *_: object) -> Tensor:
    _break_where_shared(factors, grads)
    return _table(factors, layouts)


def _break_where_shared(factors: list[Tensor], grads: list[Tensor]) -> None:
    """NotImplementedError in a fake implementation breaks the graph, so the error comes as in eager mode."""
    named = [(f"pair {place // 2}, {'AB'[place % 2]}", t) for place, t in enumerate(factors)]
    check_disjoint([*named, *((f"gradient {place}", t) for place, t in enumerate(grads))], NotImplementedError)


def _table(factors: list[Tensor], layouts: str) -> Tensor:
    rows = sum(pair.experts for pair in _unflat(factors, layouts))
    return torch.empty(rows, REPORTED, dtype=torch.float64, device=_device(factors))
