"""Pairs with their optimizer state on a backend, each step of every row held to reflora.reference's."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import astuple, replace
from typing import Any

import torch
from conftest import device_of, spectrum_pair
from torch import Tensor

from reflora import columns as col
from reflora import reference
from reflora.backends import AdamWStep, InvariantStep, Step
from reflora.columns import DEGENERATE, PLAIN, REFACTORED, SKIPPED
from reflora.optim.adamw_engine import AdamWEngine
from reflora.optim.state import GRAM, MASTER, PHASE, SAVED, STEPS, Storage
from reflora.pairs import LoRAPair
from reflora.reference import AdamWState, Hypers, InvariantState, Schedule

LARGEST = "max_exp_avg_sq"

DOUBLE, FLOAT, BF16, HALF = torch.float64, torch.float32, torch.bfloat16, torch.float16
HYPERS = (Hypers(lr=1e-2, beta2=0.99), Hypers(lr=3e-2, beta1=0.8, beta2=0.99, weight_decay=0.1))
WIDE, WITH_MASTER = Storage(moments=True), Storage(moments=True, master=True)
PLAIN_ADAMW = {"warmup_steps": 10**9}
OTHERS = (Hypers(lr=1e-2, amsgrad=True), Hypers(lr=2e-2, maximize=True, amsgrad=True))
STORED = {
    "float64": (DOUBLE, Storage()),
    "float32": (FLOAT, Storage()),
    "bfloat16": (BF16, Storage()),
    "float16": (HALF, Storage()),
    "bfloat16, wide moments": (BF16, WIDE),
    "float16, wide moments": (HALF, WIDE),
    "bfloat16, master": (BF16, WITH_MASTER),
    "float16, master": (HALF, WITH_MASTER),
}
STATUS = {"refactored": REFACTORED, "degenerate": DEGENERATE, "skipped": SKIPPED, "plain": PLAIN}
SCHEDULE = ("scalar", "warmup_steps", "start", "interval", "reg")
# relative, of one step from the same state, by the type that it is computed in
TOLERANCE = {DOUBLE: 1e-9, FLOAT: 3e-5}
# the part of the elements that may be further off, beside one: quotients of what has cancelled; and where a sum falls
# close to the middle of two numbers of 16 bits it may be rounded either way
EXCEPTIONS = {DOUBLE: 2e-3, FLOAT: 2e-3, BF16: 0.03, HALF: 0.03}

Grads = Sequence[tuple[Tensor | None, Tensor | None]]


def pair(r: int = 4, n_in: int = 70, n_out: int = 51, dtype: torch.dtype = DOUBLE, k: float = 20.0) -> LoRAPair:
    """Of conditions 3 and k."""
    A, B = spectrum_pair(r, n_in, n_out, 3.0, k)
    return LoRAPair(f"{r} of {n_out} x {n_in}", (3 * A).to(dtype), B.to(dtype))


def layers(r: int, dtype: torch.dtype) -> list[LoRAPair]:
    """Every layout and stride, two rows of one shape, and degenerate ones."""
    draw = lambda *shape: torch.randn(*shape, dtype=DOUBLE).to(dtype)  # noqa: E731
    A, B = spectrum_pair(r, max(61, r + 40), max(53, r + 30), 3.0, 20.0, dtype)
    zero, padded = 0 * draw(23, r), draw(r + 2, 21)
    padded[r:] = 0
    return [
        LoRAPair("rows", A.clone(), B.clone()),
        LoRAPair("more rows", B.mT.contiguous() * 3, A.mT.contiguous()),
        LoRAPair("columns", A.mT.contiguous().mT, B.mT.contiguous().mT),
        LoRAPair("spread out", A.repeat_interleave(2, 1)[:, ::2], B.repeat_interleave(3, 1)[:, ::3]),
        LoRAPair("convolution", draw(r, 4, 3, 3), draw(19, r, 1, 1), "conv"),
        LoRAPair("experts", draw(3 * r, 33), draw(29, r * 3), "experts(3)"),
        LoRAPair("zero B", draw(r, 40), zero),
        LoRAPair("rank 1", draw(r, 20), draw(23, 1) @ draw(1, r)),
        LoRAPair("n < r", draw(r, r), draw(max(r - 1, 1), r)),
        LoRAPair("padded", padded, torch.cat([draw(20, r), 0 * draw(20, 2)], 1)),
    ]


def grads_like(pairs: Sequence[LoRAPair], scale: float = 1.0) -> list[tuple[Tensor, Tensor]]:
    return [tuple((scale * torch.randn(t.shape, dtype=DOUBLE)).to(t) for t in (p.A, p.B)) for p in pairs]  # type: ignore[misc]


def like(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy with the very strides, of which clone() makes dense ones."""
    room = torch.zeros(1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride())), dtype=tensor.dtype)
    return room.to(device).as_strided(tensor.shape, tensor.stride()).copy_(tensor)


class Rows:
    """Copies of pairs on a backend's device, bound as RefLoRAAdamW binds them.

    hypers: of all A and of all B. copied: False for the pairs themselves.
    """

    STEP: type[Step] = AdamWStep

    def __init__(
        self, pairs: Sequence[LoRAPair], backend: str, hypers: Sequence[Hypers] = HYPERS,
        storage: Storage | None = None, copied: bool = True,
    ):  # fmt: skip
        device = device_of(backend)
        copies = [LoRAPair(p.name, like(p.A, device), like(p.B, device), p.layout) for p in pairs if copied]
        self.pairs = copies or list(pairs)
        self.backend, self.hypers, self.storage = backend, tuple(hypers), storage or Storage()
        self.table = torch.zeros(2, col.HYPERS, dtype=DOUBLE)
        self.table[:, : col.LR_AT] = torch.tensor([[*map(float, astuple(h))] for h in hypers], dtype=DOUBLE)
        self.state: dict[Tensor, dict[str, Any]] = {t: {} for p in self.pairs for t in (p.A, p.B)}
        first, tags = 0, []
        for p in self.pairs:
            tags.append(first)
            first += p.experts
        self.engine = AdamWEngine(self.pairs, range(len(pairs)), tags, backend, self.storage, set())
        self.rows = self.engine.plan.rows
        self.bind([(p.A, p.B) for p in self.pairs], 2)

    def bind(self, grads: Grads, interval: int = 1) -> None:
        """interval > 1: S is kept in the state."""
        flat = [g for sides in grads for g in sides]
        if self.engine.plan.moved():
            self.engine.refresh()
        amsgrad = any(h.amsgrad for h in self.hypers)
        self.engine.bind_state(self.state, [(0, 1)] * len(self.pairs), flat, amsgrad, interval > 1)
        self.engine.bind_grads(flat)

    def step(self, grads: Grads, **fields: Any) -> Tensor:
        """fields: of AdamWStep. Returns the result table, on the CPU."""
        device = device_of(self.backend)
        grads = [tuple(g if g is None else g.to(device) for g in sides) for sides in grads]  # type: ignore[misc]
        self.bind(grads, 1 if fields.get("scalar") else fields.get("interval", 1))
        self.engine.step(self.STEP(self.table, **fields))
        assert self.engine.results is not None
        return self.engine.results.cpu()

    def own(self, name: str, column: str) -> list[Tensor]:
        """An entry of the state, pair by pair; name: A or B."""
        return [self.state[getattr(p, name)][column] for p in self.pairs]

    def tensors(self, number: int | None = None) -> list[Tensor]:
        """Factors and state, of all pairs or of one."""
        chosen = self.pairs if number is None else [self.pairs[number]]
        factors = [t for p in chosen for t in (p.A, p.B)]
        return [*factors, *(value for t in factors for value in self.state[t].values())]

    def snapshot(self, number: int | None = None) -> list[Tensor]:
        return [t.clone() for t in self.tensors(number)]

    def read(self, number: int) -> tuple[Tensor, Tensor, AdamWState]:
        """A row's factors and state, in float64."""
        row = self.rows[number]
        p = self.pairs[row.pair]
        both = functools.partial(self._both, number)
        amsgrad, own = LARGEST in self.state[p.A], self.state[p.A]
        S = wide(own[SAVED][row.expert]) if SAVED in own else torch.zeros(2, 1, 1)
        return wide(row.A), wide(row.B), AdamWState(
            both("exp_avg"), both("exp_avg_sq"), both(LARGEST) if amsgrad else both("exp_avg_sq"), self._steps(number),
            float(own[PHASE][row.expert]), float(own[STEPS][row.expert]),
            (S[0], S[1]) if S[0, 0, 0] != 0 else None, both(MASTER) if MASTER in own else None,
        )  # fmt: skip

    def _both(self, number: int, column: str) -> tuple[Tensor, Tensor]:
        """An entry of a row's A and B, shaped like these."""
        row = self.rows[number]
        p = self.pairs[row.pair]
        of_A, of_B = self.state[p.A][column], self.state[p.B][column]
        return wide(p.views_A(of_A)[row.expert]), wide(p.views_B(of_B)[row.expert])

    def _steps(self, number: int) -> tuple[float, float]:
        row = self.rows[number]
        p = self.pairs[row.pair]
        of_A, of_B = (float(self.state[t]["step"].view(-1)[row.expert]) for t in (p.A, p.B))
        return of_A, of_B

    def expected(self, number: int, old: Any, grads: tuple[Tensor, Tensor], fields: dict[str, Any]) -> tuple[Any, ...]:
        """What the reference makes of a row that `read` has given: (A, B, state, why)."""
        schedule = Schedule(**{name: fields[name] for name in SCHEDULE if name in fields})
        dtype = self.rows[number].A.dtype
        return reference.adamw_step(*old[:2], *grads, old[2], self.hypers, schedule, dtype)  # type: ignore[arg-type]

    def compared(self, number: int, got: Any, wanted: Any) -> list[tuple[str, torch.dtype]]:
        """Entries of the state to compare, and their dtypes; counts are equal."""
        p = self.pairs[self.rows[number].pair]
        assert (got.step, got.phase, got.count) == (wanted.step, wanted.phase, wanted.count), p.name
        of_moments, computed = self.storage.dtype(p.A), DOUBLE if p.A.dtype == DOUBLE else FLOAT
        kept = [("exp_avg", of_moments), ("exp_avg_sq", of_moments)]
        kept += [(LARGEST, of_moments)] * (LARGEST in self.state[p.A])
        kept += [("S", computed)] * (SAVED in self.state[p.A] and wanted.S is not None)
        return kept + [("master", FLOAT)] * self.storage.master


class InvariantRows(Rows):
    """The same bound as InvariantAdamW binds them."""

    STEP = InvariantStep

    def __init__(
        self, pairs: Sequence[LoRAPair], backend: str, hypers: Sequence[Hypers] = HYPERS,
        storage: Storage | None = None, copied: bool = True,
    ):  # fmt: skip
        super().__init__(pairs, backend, hypers, replace(storage or Storage(), grams=GRAM), copied)

    def read(self, number: int) -> tuple[Tensor, Tensor, Any]:
        row = self.rows[number]
        p = self.pairs[row.pair]
        of_A, of_B = (wide(self.state[t][GRAM].view(-1, p.rank, p.rank)[row.expert]) for t in (p.A, p.B))
        master = self._both(number, MASTER) if MASTER in self.state[p.A] else None
        state = InvariantState(self._both(number, "exp_avg"), (of_A, of_B), self._steps(number), master)
        return wide(row.A), wide(row.B), state

    def expected(self, number: int, old: Any, grads: tuple[Tensor, Tensor], fields: dict[str, Any]) -> tuple[Any, ...]:
        options = {name: fields[name] for name in ("metric", "moments", "damping", "late") if name in fields}
        dtype = self.rows[number].A.dtype
        return reference.invariant_step(*old[:2], *grads, old[2], self.hypers, **options, storage=dtype)  # type: ignore[arg-type]

    def compared(self, number: int, got: Any, wanted: Any) -> list[tuple[str, torch.dtype]]:
        p = self.pairs[self.rows[number].pair]
        assert got.step == wanted.step, p.name
        kept = [("exp_avg", self.storage.dtype(p.A)), (GRAM, DOUBLE)]
        return kept + [("master", FLOAT)] * self.storage.master


def wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", DOUBLE).clone()


def same(first: Rows | Sequence[Tensor], second: Rows | Sequence[Tensor]) -> bool:
    """Whether they hold the same bits; NaN is NaN."""
    ones, others = (x.tensors() if isinstance(x, Rows) else x for x in (first, second))
    return all(torch.equal(x.nan_to_num(7.5), y.nan_to_num(7.5)) for x, y in zip(ones, others, strict=True))


def check_step(rows: Rows, grads: Grads, **fields: Any) -> Tensor:
    """One step of every row against the reference's, each from where the row stands. Returns the result table."""
    before = [rows.read(number) for number in range(len(rows.rows))]
    results = rows.step(grads, **fields)
    scale = float(fields.get("grad_scale", 1.0))
    for number, (row, old) in enumerate(zip(rows.rows, before)):
        p, sides = rows.pairs[row.pair], grads[row.pair]
        if sides[0] is None or sides[1] is None:
            continue
        own = wide(p.views_A(sides[0])[row.expert]) / scale, wide(p.views_B(sides[1])[row.expert]) / scale
        *factors, state, why = rows.expected(number, old, own, fields)
        assert results[number, col.STATUS] == STATUS[why], p.name
        check_row(f"{p.name} {row.expert}", rows, number, rows.read(number), (*factors, state))
    return results


def check_row(what: str, rows: Rows, number: int, have: tuple[Any, ...], want: tuple[Any, ...]) -> None:
    (A, B, got), (want_A, want_B, wanted) = have, want
    stored = rows.rows[number].A.dtype
    computed = DOUBLE if stored == DOUBLE else FLOAT
    compared = [("A", stored, A, want_A), ("B", stored, B, want_B)]
    for name, dtype in rows.compared(number, got, wanted):
        compared += [(name, dtype, x, y) for x, y in zip(getattr(got, name), getattr(wanted, name))]
    for name, dtype, x, exact in compared:
        y, tolerance = exact.to(dtype).to(DOUBLE), TOLERANCE[computed]
        error, room = (x - y).abs(), tolerance * (y.abs() + y.abs().mean())
        if dtype in (BF16, HALF):
            info = torch.finfo(dtype)
            most = room + 1.01 * info.eps * y.abs().clamp_min(info.tiny)
            room = room + 1.01 * info.eps * info.tiny
        else:
            most = 300 * room
        others = float((error > room).double().mean()) - 1 / y.numel()
        assert (error <= most).all() and others <= EXCEPTIONS[dtype], (what, name, float((error / room).max()))
