"""Refactoring and preconditioning over lists of pairs, in place and without autograd.

Under torch.compile each is one operator, `torch.ops.reflora.refactor_` and `torch.ops.reflora.precondition_`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix, ops
from .ambient import independent
from .backends import resolve
from .checks import (
    check_backend,
    check_disjoint,
    check_flags,
    check_memory,
    check_plain,
    check_precision,
    check_shaped,
    check_writable,
    fail,
)
from .diagnostics import Diagnostics, diagnose, row_names
from .pairs import LoRAPair, PairLike, as_pairs, check_unhooked, named_pairs
from .plan import REPORTED, Plan, by_device

# a table of addresses is no use to a graph that inductor captures by itself
OP_TAGS = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()

Grads = Sequence[tuple[Tensor | None, Tensor | None]]


def refactor_(
    pairs: Iterable[PairLike], scalar: bool = False, backend: str | None = None, precision: str = "float64"
) -> Diagnostics:
    """Refactor every pair: `A <- P^T A`, `B <- B P^-T`, then `A A^T = B^T B` and `B A` is as before.

    Degenerate pairs get the scalar refactoring, pairs with a zero or non-finite factor are left alone. Optimizer state
    is not moved: inside training use RefLoRAAdamW. Paper, section 3.

    Args:
        pairs: LoRAPairs, or tuples `(A [r, n_in], B [n_out, r])`; float32, float64, bfloat16 or float16.
        scalar: RefLoRA-S, `A <- sqrt(s) A`, `B <- B / sqrt(s)` with `s = ||B||_F / ||A||_F`.
        backend: None (the fastest that can serve the device), "triton", "cpp" or "torch".
        precision: "float64" or, faster on GPUs with slow float64, "float32": of Grams and solve.

    Returns:
        What was done, layer by layer; condition and balance are those before.

    Raises:
        TypeError: no tensors, an unsupported dtype.
        ValueError: shapes that do not match, factors that overlap, two devices or dtypes in a pair.
        RuntimeError: the backend cannot serve the device, with the reason; factors made in inference mode, outside it.
    """
    _check_options(scalar, backend, precision)
    if torch.compiler.is_compiling():
        named = named_pairs(pairs)
        if not named:
            return _reported(named, None)
        factors, layouts = _flat(named)
        checked = ops.checked(factors, [], None, layouts)
        return _reported(named, ops.refactor_(factors, layouts, scalar, backend or "", precision, checked))
    return _refactor(_writable_pairs(pairs), scalar, backend, precision)


def _writable_pairs(pairs: Iterable[PairLike]) -> list[LoRAPair]:
    checked = as_pairs(pairs)
    for pair in checked:
        check_writable(f"{pair.name}, A", pair.A)
        check_writable(f"{pair.name}, B", pair.B)
    return checked


def _refactor(pairs: list[LoRAPair], scalar: bool, backend: str | None, precision: str) -> Diagnostics:
    """Of pairs that have been checked."""

    def run(plan: Plan) -> Tensor:
        results = resolve(backend, plan.device).refactor(plan, scalar, precision)
        mark_written([t for pair in plan.pairs for t in (pair.A, pair.B)])
        return results

    return over_devices(pairs, run)


def precondition_(
    pairs: Iterable[PairLike],
    grads: Grads | None = None,
    scalar: bool = False,
    backend: str | None = None,
    precision: str = "float64",
) -> Diagnostics:
    """Precondition every pair's gradients in place: `gA <- S^-1 gA`, `gB <- gB S`, `S = (A A^T)^-1 # (B^T B)`.

    Pairs with a non-finite factor or gradient are left alone; degenerate pairs use `S = c I`, `c = ||B||_F / ||A||_F`
    (S = I where a norm is zero). Products past the storage range saturate. Paper, section 3.3.

    Args:
        pairs: as in `refactor_`.
        grads: one `(gA, gB)` a pair, shaped like the factors; default their `.grad`. Pairs where either is None are
            left alone. As they are written, they share memory neither with one another nor with a factor.
        scalar: `S = c I` for every pair.
        backend: as in `refactor_`.
        precision: as in `refactor_`.

    Returns:
        What was done, layer by layer.

    Raises:
        TypeError: gradients that are not pairs of tensors, or None; and as `refactor_`.
        ValueError: gradients that do not match their factors, or share memory; `.grad` that GradientHooks precondition;
            and as `refactor_`.
    """
    _check_options(scalar, backend, precision)
    if torch.compiler.is_compiling():
        named = named_pairs(pairs)
        sides = grads_of(named, grads)
        both = [index for index, (a, b) in enumerate(sides) if a is not None and b is not None]
        flat = [g.detach() for index in both for g in sides[index] if g is not None]
        if not named:
            return _reported(named, None)
        factors, layouts = _flat(named)
        done = ops.checked(factors, flat, both, layouts)
        results = ops.precondition_(factors, flat, both, layouts, scalar, backend or "", precision, done)
        return _reported(named, results)
    checked = as_pairs(pairs)
    given = grads_of(checked, grads)
    if grads is None:
        check_unhooked(checked)
    check_grads_apart(checked, given)
    return _precondition(checked, given, scalar, backend, precision)


def _precondition(
    pairs: list[LoRAPair], grads: Grads, scalar: bool, backend: str | None, precision: str
) -> Diagnostics:
    """Of pairs and gradients that have been checked."""
    by_id = {id(pair): pair_grads for pair, pair_grads in zip(pairs, grads)}

    def run(plan: Plan) -> Tensor:
        plan.bind_grads([by_id[id(pair)] for pair in plan.pairs])
        results = resolve(backend, plan.device).precondition(plan, scalar, precision)
        mark_written([g for pair in plan.pairs for g in by_id[id(pair)] if g is not None])
        return results

    return over_devices(pairs, run)


def _check_options(scalar: bool, backend: str | None, precision: str) -> None:
    check_flags({"scalar": scalar})
    check_backend(backend)
    check_precision(precision)


def grads_of(pairs: Sequence[LoRAPair], grads: Grads | None) -> list[tuple[Tensor | None, Tensor | None]]:
    """One `(gA, gB)` a pair, tensors that match their factors, or None."""
    if grads is None:
        given = [(pair.A.grad, pair.B.grad) for pair in pairs]
    elif isinstance(grads, (Tensor, Mapping, str)) or not isinstance(grads, Iterable):
        remedy = "Pass one (gA, gB) a pair, in their order."
        fail("grads", "a list of (gA, gB)", type(grads).__name__, remedy, TypeError)
    else:
        given = list(grads)
    check_grads(pairs, given)
    return given


def check_grads(pairs: Sequence[LoRAPair], grads: Grads) -> None:
    """Gradients match their factors in number, shape, dtype and device."""
    if len(grads) != len(pairs):
        remedy = "Use (None, None) for a pair without gradients."
        fail("grads", f"one (gA, gB) for each of {len(pairs)} pairs", len(grads), remedy)
    for pair, sides in zip(pairs, grads):
        if not isinstance(sides, (tuple, list)) or len(sides) != 2:
            got = f"{len(sides)} things" if isinstance(sides, (tuple, list)) else type(sides).__name__
            fail(f"{pair.name}, gradients", "(gA, gB)", got, "Use (None, None) for a pair without.", TypeError)
        for factor, grad, side in zip((pair.A, pair.B), sides, "AB"):
            if grad is not None:
                check_grad(f"{pair.name}, gradient of {side}", factor, grad)


def check_grad(what: str, factor: Tensor, grad: Tensor) -> None:
    if not isinstance(grad, Tensor):
        fail(what, "a torch.Tensor or None", type(grad).__name__, "Pass the gradients themselves.", TypeError)
    check_shaped(what, grad)
    if grad.layout != torch.strided or grad.is_nested:
        fail(what, "a dense tensor", f"{type(grad).__name__} ({grad.layout})", "Call .to_dense() first.")
    want, got = (factor.shape, factor.dtype, factor.device), (grad.shape, grad.dtype, grad.device)
    if want != got:
        wanted, found = (f"{tuple(shape)} {dtype} on {device}" for shape, dtype, device in (want, got))
        fail(what, wanted, found, "Gradients are shaped like their factors.")
    if not torch.compiler.is_compiling():  # in a graph it is the operator that knows
        check_plain(what, grad)


def check_grads_apart(pairs: Sequence[LoRAPair], grads: Grads) -> None:
    """What is written has memory, which is neither another gradient's nor a factor's."""
    named: list[tuple[str, Tensor]] = []
    for pair, (gA, gB) in zip(pairs, grads):
        named += [(f"{pair.name}, A", pair.A), (f"{pair.name}, B", pair.B)]
        if gA is not None and gB is not None:
            given = [(f"{pair.name}, gradient of A", gA), (f"{pair.name}, gradient of B", gB)]
            for what, grad in given:
                check_memory(what, grad)
                check_writable(what, grad)
            named += given
    check_disjoint(named)


@independent()
def over_devices(pairs: list[LoRAPair], run: Callable[[Plan], Tensor]) -> Diagnostics:
    """`run(plan)` once a device; the results in the order of `pairs`."""
    groups = by_device(pairs)
    plans = [Plan([pairs[i] for i in indices]) for indices in groups.values()]
    return diagnose(pairs, list(groups.values()), plans, [run(plan) for plan in plans])


def mark_written(tensors: Sequence[Tensor]) -> None:
    """Writes through raw pointers bypass autograd's version counters."""
    torch.autograd.graph.increment_version(tensors)


def _reported(pairs: list[LoRAPair], results: Tensor | None) -> Diagnostics:
    names = row_names(pairs)
    return Diagnostics(names, [] if results is None else [results], list(range(len(names))))


def _flat(pairs: list[LoRAPair]) -> tuple[list[Tensor], str]:
    """(A and B in turns, layouts) as an operator takes them, which does the rest of the checking.

    Detached, not under no_grad: an error that the operator raises in a graph would leave gradients off.
    """
    return [t.detach() for pair in pairs for t in (pair.A, pair.B)], ";".join([pair.layout for pair in pairs])


def _unflat(factors: list[Tensor], layouts: str) -> list[LoRAPair]:
    named = layouts.split(";") if layouts else []
    if len(factors) != 2 * len(named):
        remedy = "Pass A and B of each pair in turns, and the layouts of the pairs with ; in between."
        fail("factors", f"two for each of {len(named)} layouts", len(factors), remedy)
    sides = zip(factors[::2], factors[1::2], named)
    return [LoRAPair(f"pair {i}", A, B, layout) for i, (A, B, layout) in enumerate(sides)]


def _ordered(found: Diagnostics, device: torch.device) -> Tensor:
    """Results in the order of the pairs, on one device; a table of their own, which an operator must return."""
    tables = [table[:, :REPORTED].to(device) for table in found.tables]
    if not tables:
        return torch.empty(0, REPORTED, dtype=torch.float64, device=device)
    if len(tables) == 1:
        return tables[0].contiguous()
    rows = [row for table in tables for row in table.unbind()]
    return torch.stack([rows[number] for number in found.order])


def _given(pairs: list[LoRAPair], grads: list[Tensor], both: list[int]) -> Grads:
    """Gradients of the pairs numbered `both`, in turns, as one `(gA, gB)` a pair."""
    given: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * len(pairs)
    if len(grads) != 2 * len(both) or sorted({*both} & {*range(len(pairs))}) != sorted(both):
        expected = f"gA and gB for each of {len(both)} pairs, numbered below {len(pairs)}"
        fail("grads", expected, f"{len(grads)} for {both}", "Number each pair with gradients once.")
    for place, index in enumerate(both):
        given[index] = (grads[2 * place], grads[2 * place + 1])
    return given


@torch.library.custom_op(add_op_namespace_prefix("checked"), mutates_args=(), tags=OP_TAGS)
def _checked_op(factors: list[Tensor], grads: list[Tensor], both: list[int] | None, layouts: str) -> Tensor:
    """What the operators below would check: a graph may hand them copies, which share no memory.

    both: None where it is the factors that are written. The result is empty. They take it, so that a graph keeps this
    call and has it come first.
    """
    if both is None:
        _writable_pairs(_unflat(factors, layouts))
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
    """factors: A and B of each pair in turns. Returns float64 `[rows, REPORTED]` (reflora/plan.py).

    checked: of the operator of that name; None: not yet.
    """
    pairs = _unflat(factors, layouts)
    run = refactor_ if checked is None else _refactor
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
    """grads: of A and B in turns, of the pairs numbered `both`. Returns as `reflora::refactor_`."""
    pairs = _unflat(factors, layouts)
    run = precondition_ if checked is None else _precondition
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
    """NotImplementedError of a fake implementation breaks the graph, and the error comes as it does eagerly."""
    named = [(f"pair {place // 2}, {'AB'[place % 2]}", t) for place, t in enumerate(factors)]
    check_disjoint([*named, *((f"gradient {place}", t) for place, t in enumerate(grads))], NotImplementedError)


def _table(factors: list[Tensor], layouts: str) -> Tensor:
    rows = sum(pair.experts for pair in _unflat(factors, layouts))
    return torch.empty(rows, REPORTED, dtype=torch.float64, device=_device(factors))
