"""New factors for every layer of a saved adapter, at another rank."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .. import lowrank
from ..adapters import Adapter, Copied, Stored, shown
from ..adapters.ranks import with_ranks
from ..checks import check_count, fail
from ..report import progress

# starts whose base weights PEFT makes from r when it loads the adapter
BASE_FROM_RANK = ("pissa", "olora", "corda", "loftq")
NOT_FINITE = "not finite"


@dataclass(frozen=True)
class Choice:
    """rank: That of every layer, or with an energy the highest. energy: the share of `||B A||_F^2` that each layer
    keeps, at the least rank that does.

    Raises ValueError or TypeError unless one is given: a rank of 1 or more, an energy in (0, 1].
    """

    rank: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        if self.rank is None and self.energy is None:
            fail("rank", "--rank N or --energy SHARE", "neither", "Pass --rank 16, or --energy 0.99.")
        if self.rank is not None:
            check_count("--rank", self.rank, 1)
        if self.energy is not None and not 0 < self.energy <= 1:
            fail("--energy", "a share of ||B A||^2 in (0, 1]", self.energy, "Pass 0.99 to keep 99 % of it.")

    def of(self, spectra: Iterable[Tensor]) -> int:
        """The rank of layers that must have the same one."""
        if self.energy is None:
            return self.rank or 0
        needed = max(lowrank.rank_for(s, self.energy) for s in spectra)
        return min(needed, self.rank or needed)


@dataclass(frozen=True)
class Cut:
    """A layer, or an expert of one.

    s: The singular values of the old B A. error: `||B A - B' A'||_F / ||B A||_F`, of B' A' as it is stored.
    scale: s of `W + s B A`.
    """

    name: str
    old_rank: int
    rank: int
    s: Tensor
    error: float
    scale: float

    @property
    def norm(self) -> float:
        """`||B A||_F`."""
        return float(self.s.norm())


@dataclass(frozen=True)
class Resized:
    """kept: why -> names of the layers that were copied as they are. old_numbers, numbers: how many numbers the factors
    had and have.
    """

    layers: list[Cut]
    kept: Mapping[str, list[str]]
    copied: Copied
    old_numbers: int
    numbers: int

    @property
    def error(self) -> float:
        """Of all layers together, `(sum ||s (B A - B' A')||_F^2 / sum ||s B A||_F^2)^(1/2)`."""
        whole = sum((one.scale * one.norm) ** 2 for one in self.layers)
        lost = sum((one.scale * one.norm * one.error) ** 2 for one in self.layers)
        return (lost / whole) ** 0.5 if whole else 0.0


def resize(adapter: Adapter, out: Path, choice: Choice) -> Resized:
    """Write the adapter again with the ranks of `choice`, balanced (`A A^T = B^T B`), each layer at its old scale.

    Raises FileExistsError if `out` exists, and ValueError, with nothing written, where the base weights depend on the
    rank (PiSSA, OLoRA, CorDA, LoftQ), where the file cannot say which layer has which rank, and what `Adapter.write`
    does.
    """
    adapter.check_out(out, "OUT")
    _check_base(adapter)
    sound, kept = list[Stored](), defaultdict[str, list[str]](list)
    for one in adapter.stored:
        if one.pair and all(bool(factor.isfinite().all()) for factor in (one.pair.A, one.pair.B)):
            sound.append(one)
        else:
            kept[one.reason or NOT_FINITE].append(one.name)
    if not sound:
        reason, names = next(iter(kept.items()))
        fail(
            shown(adapter.path),
            "a layer that can be cut",
            f"none ({shown(names[0], 40)}: {reason})",
            "Leave it as it is.",
        )
    tensors, cuts = dict(adapter.tensors), dict[str, list[Cut]]()
    for one, A, B, rows in progress(_cut_all(_alike(sound), choice), len(sound), "layers"):
        tensors.update({one.key_A: A, one.key_B: B})
        cuts[one.name] = rows
    ranks = {
        one.name: cuts[one.name][0].rank if one.name in cuts else one.pair.rank for one in adapter.stored if one.pair
    }
    beside = with_ranks(adapter, ranks)
    tensors.update(beside.alphas)
    beside.check(tensors, adapter, ranks)
    factors = [key for one in adapter.stored for key in (one.key_A, one.key_B) if one.name in cuts]
    old_numbers, numbers = (sum(held[key].numel() for key in factors) for held in (adapter.tensors, tensors))
    copied = adapter.write(out, tensors, "OUT", beside.config, beside.metadata)
    rows = [row for one in adapter.stored for row in cuts.get(one.name, [])]
    return Resized(rows, dict(kept), copied, old_numbers, numbers)


def _check_base(adapter: Adapter) -> None:
    start = (adapter.config or {}).get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(BASE_FROM_RANK):
        remedy = "save_pretrained(..., path_initial_model_for_weight_conversion=START) makes it plain LoRA."
        fail(f"{shown(adapter.path, 40)}, init_lora_weights", "a start that leaves the base as it is", start, remedy)


def _alike(layers: Sequence[Stored]) -> list[list[Stored]]:
    """Layers that must have the same rank, as one name may stand for both: those of a list."""
    groups: list[tuple[set[str], list[Stored]]] = []
    for one in layers:
        keys = set(one.rank_keys)
        joined = [group for group in groups if group[0] & keys]
        groups = [group for group in groups if not group[0] & keys]
        groups.append((keys.union(*(own for own, _ in joined)), [*sum((own for _, own in joined), []), one]))
    return [own for _, own in groups]


def _cut_all(alike: Sequence[list[Stored]], choice: Choice) -> Iterator[tuple[Stored, Tensor, Tensor, list[Cut]]]:
    """Each list of layers is one thread's."""
    threads = torch.get_num_threads()
    try:
        # LAPACK gains little from threads of its own on matrices this narrow
        torch.set_num_threads(1)
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for done in pool.map(lambda layers: _cut(layers, choice), alike):
                yield from done
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def _cut(layers: Sequence[Stored], choice: Choice) -> list[tuple[Stored, Tensor, Tensor, list[Cut]]]:
    pairs = [one.pair for one in layers if one.pair]
    parts = [[lowrank.svd(A, B) for A, B in pair.factors] for pair in pairs]
    rank = choice.of(part.s for own in parts for part in own)
    done = []
    for one, pair, own in zip(layers, pairs, parts):
        shape_A, shape_B = _shapes(pair.A, pair.B, pair.experts, rank)
        A, B = pair.A.new_zeros(shape_A), pair.B.new_zeros(shape_B)
        new = type(pair)(pair.name, A, B, pair.layout)
        generator = torch.Generator("cpu").manual_seed(0)
        rows = []
        for name, old, (a, b), part in zip(pair.row_names, pair.factors, new.factors, own):
            for factor, found in zip((a, b), part.cut(rank, generator)):
                factor.copy_(found)
            norm = float(part.s.norm())
            error = lowrank.distance(old, (a, b), norm) if norm else 0.0
            rows.append(Cut(name, pair.rank, rank, part.s, error, one.scale))
        done.append((one, A, B, rows))
    return done


def _shapes(A: Tensor, B: Tensor, experts: int, rank: int) -> tuple[list[int], list[int]]:
    """Of factors of another rank: A is `[experts * r, ...]`, B `[n_out, r * experts, ...]`."""
    return [experts * rank, *A.shape[1:]], [B.shape[0], rank * experts, *B.shape[2:]]
