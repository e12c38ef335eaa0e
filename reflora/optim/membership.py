"""Which of an optimizer's parameters make up pairs, and warnings about LoRA that is stepped without RefLoRA."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

from torch import Tensor

from ..checks import fail
from ..pairs import LoRAPair, as_pairs, check_unhooked

PARTED = "ZeroRedundancyOptimizer separates them: use reflora.GradientHooks and a plain optimizer class"
HALVED = f"only one factor of each is among the optimizer's parameters. Pass both; {PARTED}"
NOWHERE = "neither factor is among the optimizer's parameters. Take the pairs from the model that it trains"
REVERSED = "r is larger than both n_in and n_out, so S does not exist. Is B given before A? A is [r, n_in]"
WIDE = "r is larger than both n_in and n_out in LoRA pair(s) {}. Is B given before A? A is [r, n_in]."
LONE = "only one factor of each has a gradient. Train both, or leave these pairs out"
NO_GRADIENT = (
    "no LoRA pair of the optimizer has a gradient in this step: none is trained. Is another adapter active? Was the "
    "model sharded, or its parameters replaced, after the optimizer was made? Does a checkpointed block get inputs "
    "that require no gradient (enable_input_require_grads)?"
)
# PEFT's classes that precondition LoRA's gradients themselves
PRECONDITION = ("RiemannianPreconditionedOptimizer", "LoraFAOptimizer")


class FoundPairs(list[LoRAPair]):
    """The pairs of a model, and how to find them again once it has more; copies and pickles are plain lists."""

    def __init__(self, pairs: Iterable[LoRAPair], again: Callable[[], list[LoRAPair]]):
        super().__init__(pairs)
        self.again = again

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return list, (list(self),)


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first few names, shortened: layers of deep models have long ones."""
    shown = [name if len(name) <= 40 else f"...{name[-37:]}" for name in names[:most]]
    return ", ".join(shown) + (", ..." if len(names) > most else "")


def say_plain(names: Sequence[str], why: str, stacklevel: int) -> None:
    """Warn that these pairs take plain steps."""
    warnings.warn(
        f"{len(names)} LoRA pair(s) are stepped without RefLoRA ({listed(names)}): {why}.", stacklevel=stacklevel
    )


def say_reversed(pairs: Sequence[LoRAPair], by_S: bool, stacklevel: int) -> None:
    """Warn of `reversed_` pairs. by_S: the step needs an S, which these do not have."""
    if not (names := reversed_(pairs)):
        return
    if by_S:
        say_plain(names, REVERSED, stacklevel + 1)
    else:
        warnings.warn(WIDE.format(listed(names)), stacklevel=stacklevel)


def halved(pairs: Sequence[LoRAPair], owned: Container[Tensor]) -> list[str]:
    """Names of the pairs with only one factor among the parameters."""
    return [pair.name for pair in pairs if (pair.A in owned) != (pair.B in owned)]


def nowhere(pairs: Sequence[LoRAPair], owned: Container[Tensor]) -> list[str]:
    """Names of the pairs with neither factor among the parameters."""
    return [pair.name for pair in pairs if pair.A not in owned and pair.B not in owned]


def reversed_(pairs: Sequence[LoRAPair]) -> list[str]:
    """Names of the pairs whose factors seem to be in the wrong order."""

    def suspect(pair: LoRAPair) -> bool:
        A, B = pair.views_A(pair.A)[0], pair.views_B(pair.B)[0]
        return pair.layout == "linear" and A.shape[0] > max(A.shape[1], B.shape[0])

    return [pair.name for pair in pairs if not pair.sharded and suspect(pair)]


def check_whole(halves: Sequence[str]) -> None:
    """Raises RuntimeError for `halved` pairs, in an optimizer without whole ones."""
    if halves:
        remedy = f"Pass both; {PARTED}."
        fail("param_groups", "both factors of each pair", f"one, of {listed(halves)}", remedy, RuntimeError)


def further_pairs(optimizer: Any, given: Iterable[Any] = (), sharded: bool = False) -> list[LoRAPair]:
    """Pairs that the optimizer lacks: those given, and those of its model whose factors it both has."""
    pairs: list[LoRAPair] = optimizer.pairs
    owned = {param for group in optimizer.param_groups for param in group["params"]}
    known = {id(factor) for pair in pairs for factor in (pair.A, pair.B)}
    found = [pair for pair in as_pairs(given or (), sharded) if id(pair.A) not in known]
    if others := [pair.name for pair in found if pair.A not in owned or pair.B not in owned]:
        what = "factors among the optimizer's parameters"
        fail("pairs", what, f"others, of {listed(others)}", "Add the factors with the pairs.")
    known.update(id(pair.A) for pair in found)
    if optimizer._again is not None:
        found += [p for p in optimizer._again() if id(p.A) not in known and p.A in owned and p.B in owned]
    if found:
        as_pairs([*pairs, *found], sharded)
        check_unhooked(found)
    return found


def pairs_of_added(optimizer: Any, given: Iterable[Any], sharded: bool = False) -> list[LoRAPair]:
    """`further_pairs` after a group was added. If they are refused, so is the group."""
    try:
        return further_pairs(optimizer, given, sharded)
    except BaseException:
        optimizer.param_groups.pop()
        raise


def pairs_of_unseen(optimizer: Any, sharded: bool = False) -> list[LoRAPair]:
    """`further_pairs` once a parameter in no pair has its first gradient: it was frozen, or its adapter was idle."""
    seen: set[int] = optimizer._seen
    if not seen:
        seen.update(id(factor) for pair in optimizer.pairs for factor in (pair.A, pair.B))
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if seen.issuperset(map(id, params)):
        return []
    unseen = [param for param in params if id(param) not in seen and param.grad is not None]
    seen.update(map(id, unseen))
    return further_pairs(optimizer, (), sharded) if unseen and optimizer._again is not None else []


class Unserved:
    """Warns once of a model's pairs that GradientHooks or a Refactorer lack; looks in calls 2, 4, 8, ..."""

    def __init__(self, found: Sequence[LoRAPair], remedy: str):
        self.again, self.remedy, self.calls = getattr(found, "again", None), remedy, 0
        self.known = {id(factor) for pair in found for factor in (pair.A, pair.B)}

    def look(self, stacklevel: int) -> None:
        self.calls += 1
        if self.again is None or self.calls < 2 or self.calls & (self.calls - 1):
            return
        if others := [pair.name for pair in self.again() if id(pair.A) not in self.known]:
            self.again = None
            say_plain(others, self.remedy, stacklevel + 1)


def check_single(cls: type) -> None:
    """Raises TypeError for an optimizer class that preconditions LoRA's gradients by itself."""
    for name in (parent.__name__ for parent in cls.__mro__):
        if name in PRECONDITION:
            remedy = "Use one of the two: the gradients would be preconditioned twice."
            fail("optimizer class", "one that leaves LoRA's gradients alone", f"PEFT's {name}", remedy, TypeError)
