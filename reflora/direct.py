"""Refactoring and preconditioning of pairs outside graphs, and the checks of gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from .ambient import independent
from .checks import check_disjoint, check_memory, check_plain, check_shaped, check_writable, fail
from .diagnostics import Diagnostics
from .engine import Engine, Engines
from .pairs import LoRAPair, PairLike, as_pairs, check_unhooked

# one (gA, gB) per pair
Grads = Sequence[tuple[Tensor | None, Tensor | None]]


def refactor(pairs: Iterable[PairLike], scalar: bool, backend: str | None, precision: str) -> Diagnostics:
    return refactor_checked(writable_pairs(pairs), scalar, backend, precision)


def precondition(
    pairs: Iterable[PairLike], grads: Grads | None, scalar: bool, backend: str | None, precision: str
) -> Diagnostics:
    checked = as_pairs(pairs)
    given = grads_of(checked, grads)
    if grads is None:
        check_unhooked(checked)
    check_grads_apart(checked, given)
    return precondition_checked(checked, given, scalar, backend, precision)


@independent()
def refactor_checked(pairs: list[LoRAPair], scalar: bool, backend: str | None, precision: str) -> Diagnostics:
    """For pairs already checked."""
    engines = Engines(pairs, backend, Engine)
    for engine in engines.ready():
        engine.refactor(scalar, precision)
    return engines.diagnostics()


@independent()
def precondition_checked(
    pairs: list[LoRAPair], grads: Grads, scalar: bool, backend: str | None, precision: str
) -> Diagnostics:
    """For pairs and gradients already checked."""
    engines = Engines(pairs, backend, Engine)
    for engine in engines.ready():
        engine.precondition([grads[index] for index in engine.chosen], scalar, precision)
    return engines.diagnostics()


def writable_pairs(pairs: Iterable[PairLike]) -> list[LoRAPair]:
    checked = as_pairs(pairs)
    for pair in checked:
        check_writable(f"{pair.name}, A", pair.A)
        check_writable(f"{pair.name}, B", pair.B)
    return checked


def grads_of(pairs: Sequence[LoRAPair], grads: Grads | None) -> list[tuple[Tensor | None, Tensor | None]]:
    """One `(gA, gB)` per pair, tensors that match their factors, or None."""
    if grads is None:
        given = [(pair.A.grad, pair.B.grad) for pair in pairs]
    elif isinstance(grads, (Tensor, Mapping, str)) or not isinstance(grads, Iterable):
        remedy = "Pass one (gA, gB) per pair, in the same order."
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
    if not torch.compiler.is_compiling():  # in a graph only the operator can tell
        check_plain(what, grad)


def check_grads_apart(pairs: Sequence[LoRAPair], grads: Grads) -> None:
    """Gradients to be written have memory, shared with no other gradient and no factor."""
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
