"""Refactoring and preconditioning over lists of pairs, in place and without autograd.

Under torch.compile each is one operator, `torch.ops.reflora.refactor_` and `torch.ops.reflora.precondition_`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix, ops
from .ambient import independent
from .backends import resolve
from .contract import LoRAPair, PairLike, as_pairs, check_backend, check_precision, check_unexpanded, fail
from .diagnostics import Diagnostics, diagnose, row_names
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
        RuntimeError: the backend cannot serve the device, with the reason.
    """
    if torch.compiler.is_compiling():
        named, factors, layouts = _flat(pairs)
        with torch.no_grad():
            results = ops.refactor_(factors, layouts, scalar, backend or "", precision)
        return Diagnostics(row_names(named), [results], list(range(len(row_names(named)))))
    check_backend(backend)
    check_precision(precision)
    checked = as_pairs(pairs)

    def run(plan: Plan) -> Tensor:
        results = resolve(backend, plan.device).refactor(plan, scalar, precision)
        mark_written([t for pair in plan.pairs for t in (pair.A, pair.B)])
        return results

    return over_devices(checked, run)


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
        grads: one `(gA, gB)` a pair, laid out like the factors; default their `.grad`. Pairs where either is None are
            left alone.
        scalar: `S = c I` for every pair.
        backend: as in `refactor_`.
        precision: as in `refactor_`.

    Returns:
        What was done, layer by layer.

    Raises:
        ValueError: gradients that do not match their factors; and as `refactor_`.
    """
    if torch.compiler.is_compiling():
        named, factors, layouts = _flat(pairs)
        sides = [(pair.A.grad, pair.B.grad) for pair in named] if grads is None else list(grads)
        both = [index for index, (a, b) in enumerate(sides) if a is not None and b is not None]
        flat = [g for index in both for g in sides[index]]
        with torch.no_grad():
            results = ops.precondition_(factors, flat, both, layouts, scalar, backend or "", precision)
        return Diagnostics(row_names(named), [results], list(range(len(row_names(named)))))
    check_backend(backend)
    check_precision(precision)
    checked = as_pairs(pairs)
    given = [(pair.A.grad, pair.B.grad) for pair in checked] if grads is None else list(grads)
    check_grads(checked, given)
    by_id = {id(pair): pair_grads for pair, pair_grads in zip(checked, given)}

    def run(plan: Plan) -> Tensor:
        plan.bind_grads([by_id[id(pair)] for pair in plan.pairs])
        results = resolve(backend, plan.device).precondition(plan, scalar, precision)
        mark_written([g for pair in plan.pairs for g in by_id[id(pair)] if g is not None])
        return results

    return over_devices(checked, run)


def check_grads(pairs: Sequence[LoRAPair], grads: Grads) -> None:
    """Gradients match their factors in number, shape, dtype and device."""
    if len(grads) != len(pairs):
        fail("grads", f"one (gA, gB) for each of {len(pairs)} pairs", len(grads), "Use None for a missing gradient.")
    for pair, sides in zip(pairs, grads):
        for factor, grad, side in zip((pair.A, pair.B), sides, "AB"):
            if grad is None:
                continue
            want, got = (factor.shape, factor.dtype, factor.device), (grad.shape, grad.dtype, grad.device)
            if want != got or grad.layout != torch.strided:
                fail(
                    f"{pair.name}, gradient of {side}", str(want), str(got), "Gradients are shaped like their factors."
                )
            check_unexpanded(f"{pair.name}, gradient of {side}", grad)


@independent()
def over_devices(pairs: list[LoRAPair], run: Callable[[Plan], Tensor]) -> Diagnostics:
    """`run(plan)` once a device; the results in the order of `pairs`."""
    groups = by_device(pairs)
    plans = [Plan([pairs[i] for i in indices]) for indices in groups.values()]
    return diagnose(pairs, list(groups.values()), plans, [run(plan) for plan in plans])


def mark_written(tensors: Sequence[Tensor]) -> None:
    """Writes through raw pointers bypass autograd's version counters."""
    torch.autograd.graph.increment_version(tensors)


def _flat(pairs: Iterable[PairLike]) -> tuple[list[LoRAPair], list[Tensor], str]:
    """(pairs, A and B in turns, layouts) as an operator takes them, which does the checking."""
    named = [p if isinstance(p, LoRAPair) else LoRAPair(f"pair {i}", *p) for i, p in enumerate(pairs)]
    return named, [t for pair in named for t in (pair.A, pair.B)], ";".join([pair.layout for pair in named])


def _unflat(factors: list[Tensor], layouts: str) -> list[LoRAPair]:
    sides = zip(factors[::2], factors[1::2], layouts.split(";"))
    return [LoRAPair(f"pair {i}", A, B, layout) for i, (A, B, layout) in enumerate(sides)]


def _ordered(found: Diagnostics, device: torch.device) -> Tensor:
    """Results in the order of the pairs, on one device; a table of their own, which an operator must return."""
    tables = [table[:, :REPORTED].to(device) for table in found.tables]
    if len(tables) == 1:
        return tables[0].contiguous()
    rows = [row for table in tables for row in table.unbind()]
    return torch.stack([rows[number] for number in found.order])


@torch.library.custom_op(add_op_namespace_prefix("refactor_"), mutates_args=("factors",), tags=OP_TAGS)
def _refactor_op(factors: list[Tensor], layouts: str, scalar: bool, backend: str, precision: str) -> Tensor:
    """factors: A and B of each pair in turns. Returns float64 `[rows, REPORTED]` (reflora/plan.py)."""
    found = refactor_(_unflat(factors, layouts), scalar, backend or None, precision)
    return _ordered(found, factors[0].device)


@torch.library.custom_op(add_op_namespace_prefix("precondition_"), mutates_args=("grads",), tags=OP_TAGS)
def _precondition_op(
    factors: list[Tensor],
    grads: list[Tensor],
    both: list[int],
    layouts: str,
    scalar: bool,
    backend: str,
    precision: str,
) -> Tensor:
    """grads: of A and B in turns, of the pairs numbered `both`. Returns as `reflora::refactor_`."""
    pairs = _unflat(factors, layouts)
    given: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * len(pairs)
    for place, index in enumerate(both):
        given[index] = (grads[2 * place], grads[2 * place + 1])
    return _ordered(precondition_(pairs, given, scalar, backend or None, precision), factors[0].device)


@_refactor_op.register_fake
@_precondition_op.register_fake
def _(factors: list[Tensor], *args: object) -> Tensor:
    layouts = next(arg for arg in args if isinstance(arg, str))
    rows = sum(pair.experts for pair in _unflat(factors, layouts))
    return factors[0].new_empty(rows, REPORTED, dtype=torch.float64)
