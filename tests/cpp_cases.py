"""Pairs with optimizer state bound to a plan for the C++ step, and one step in plain float64."""

from __future__ import annotations

import math

import torch
from conftest import spectrum_pair

from reflora import plan as col
from reflora import reference
from reflora.backends import AdamWStep, cpp_backend
from reflora.contract import PLAIN, REFACTORED, STORAGE_DTYPES, LoRAPair
from reflora.plan import A_SIDE, B_SIDE, HYPERS, Plan

DOUBLE, FLOAT, BF16, HALF = torch.float64, torch.float32, torch.bfloat16, torch.float16
HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "decay": 0.1}
SIDES = (A_SIDE, B_SIDE)
MOMENTS = {"m": col.M, "v": col.V, "x": col.X}
OWN = {"phase": col.PHASE, "n": col.COUNT, "S": col.SAVED}


def applied(dtype):
    """The type that S is kept in."""
    return DOUBLE if dtype == DOUBLE else FLOAT


def pair(r=4, n_in=70, n_out=51, dtype=DOUBLE, name="pair"):
    A, B = spectrum_pair(r, n_in, n_out, 3.0, 20.0)
    return LoRAPair(name, (3 * A).to(dtype), B.to(dtype))


def layouts(r, dtype):
    """The same shapes as row-major, column-major, strided and experts tensors."""
    A, B = (5 * torch.randn(r, 131, dtype=DOUBLE)).to(dtype), torch.randn(77, r, dtype=DOUBLE).to(dtype)
    yield LoRAPair("rows", A.clone(), B.clone())
    yield LoRAPair("columns", A.mT.contiguous().mT, B.mT.contiguous().mT)
    yield LoRAPair("strided", A.repeat_interleave(2, 1)[:, ::2], B.repeat_interleave(3, 1)[:, ::3])
    yield LoRAPair("experts", torch.cat([A, -A, 2 * A]), B.repeat_interleave(3, 1).contiguous(), "experts(3)")


def like(tensor, dtype, value=0.0):
    """Filled, with the very strides of `tensor`."""
    size = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride()))
    return torch.full((size,), value, dtype=dtype).as_strided(tensor.shape, tensor.stride())


class Rows:
    """Pairs with optimizer state bound to a plan."""

    def __init__(self, pairs, state_dtype=None, master=False, amsgrad=False):
        self.pairs = [LoRAPair(p.name, p.A.clone(), p.B.clone(), p.layout) for p in pairs]
        for ours, theirs in zip(self.pairs, pairs):  # clone() makes strided tensors dense
            for t, s in ((ours.A, theirs.A), (ours.B, theirs.B)):
                t.data = like(s, s.dtype).copy_(s)
        self.plan = Plan(self.pairs)
        self.hypers = torch.zeros(1, HYPERS, dtype=DOUBLE)
        self.hypers[0, :6] = torch.tensor([*HYPER.values(), float(amsgrad)], dtype=DOUBLE)
        self.state = {}
        for side, factors in zip(SIDES, ([p.A for p in self.pairs], [p.B for p in self.pairs])):
            for column in MOMENTS.values():
                self.bind(side, column, [like(f, state_dtype or f.dtype) for f in factors])
            if master:
                self.bind(side, col.W, [like(f, FLOAT).copy_(f) for f in factors])
            self.once(side + col.STEP, lambda p: torch.zeros(p.experts))
            self.plan.bind_groups(side, [0] * len(pairs))
        for column in (col.PHASE, col.COUNT):
            self.once(column, lambda p: torch.zeros(p.experts))
        self.once(col.SAVED, lambda p: torch.zeros(p.experts, 2, p.rank, p.rank, dtype=applied(p.A.dtype)))
        if state_dtype is not None:
            self.plan.table[:, col.STATE] = STORAGE_DTYPES.index(state_dtype)

    def bind(self, side, column, tensors):
        self.state[side + column] = tensors
        self.plan.bind(side, column, tensors)

    def once(self, column, make):
        self.state[column] = [make(p) for p in self.pairs]
        self.plan.bind_once(column, self.state[column])

    def step(self, grads, kept=1, **fields):
        self.plan.bind_grads(grads)
        self.plan.table[:, col.KEPT] = torch.as_tensor(kept)
        return cpp_backend.adamw(self.plan, AdamWStep(self.hypers, **fields))

    def tensors(self):
        return [t for p in self.pairs for t in (p.A, p.B)] + [t for ts in self.state.values() for t in ts]

    def snapshot(self):
        return [t.clone() for t in self.tensors()]

    def unchanged(self, before):
        return all(torch.equal(t, old) for t, old in zip(self.tensors(), before))

    def read(self, number):
        """What row `number` points at, in float64 and `[r, n]`: one dict a side, and the row's own numbers."""
        row = self.plan.rows[number]
        p, sides = self.pairs[row.pair], []
        for side, factor in zip(SIDES, (row.A, row.B.mT)):
            entry = {"p": factor.double().clone(), "steps": float(self.state[side + col.STEP][row.pair][row.expert])}
            for name, column in {**MOMENTS, "w": col.W}.items():
                if side + column in self.state:
                    tensor = self.state[side + column][row.pair]
                    view = (p.views_B(tensor)[row.expert].mT) if side else p.views_A(tensor)[row.expert]
                    entry[name] = view.double().clone()
            sides.append(entry)
        own = {name: self.state[column][row.pair][row.expert].double().clone() for name, column in OWN.items()}
        own["half"] = p.A.element_size() == 2
        return sides, own


def grads_of(pairs, scale=1.0):
    return [tuple((scale * torch.randn(t.shape, dtype=DOUBLE)).to(t.dtype) for t in (p.A, p.B)) for p in pairs]


def plain_step(sides, own, grads, scalar=False, warmup_steps=0, interval=1, amsgrad=False):
    """One row's step in float64: (sides, own, status) after it. Where there is a master weight, it is what moves."""
    (a, b), n = ({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in s.items()} for s in sides), own["n"]
    own, status = dict(own), PLAIN
    stored = a["p"], b["p"].mT
    for side in (a, b):
        side["p"] = side.get("w", side["p"])
    fresh = n >= warmup_steps and (n - warmup_steps) % interval == 0
    next_fresh = n + 1 >= warmup_steps and (n + 1 - warmup_steps) % interval == 0
    g = list(grads)

    def move(c):  # A's moments by c, B's by 1 / c
        for side, f in ((a, c), (b, 1 / c)):
            side["m"], side["v"], side["x"] = side["m"] * f, side["v"] * f**2, side["x"] * f**2

    def refactor(A, B):
        root = float(reference.balance_scalar(A, B)) ** 0.5
        root = 2.0 ** round(math.log2(root)) if own["half"] else root  # exact in half precision
        a["p"], b["p"] = a["p"] * root, b["p"] / root
        move(1 / root)
        return root

    before = scalar and n == 0 and warmup_steps == 0
    if before or (scalar and next_fresh):
        status = REFACTORED
    if before:
        root = refactor(*stored)
        g = [g[0] / root, g[1] * root]
    if not scalar and n >= warmup_steps:
        status = REFACTORED
        if fresh or own["S"][0, 0, 0] == 0:
            S, S_inv, _ = reference.choose(*stored)
            if own["phase"] == 0:
                move(float(stored[0].norm() / stored[1].norm()))
            own["phase"] = 1.0
            if interval > 1:
                own["S"] = torch.stack([S, S_inv])
        else:
            S, S_inv = own["S"]
        g = [S_inv @ g[0], S @ g[1]]
    for side, grad in zip((a, b), g):
        side["steps"] += 1
        side["m"] = HYPER["beta1"] * side["m"] + (1 - HYPER["beta1"]) * grad
        side["v"] = second = HYPER["beta2"] * side["v"] + (1 - HYPER["beta2"]) * grad**2
        if amsgrad:
            side["x"] = second = torch.maximum(side["x"], second)
        divisor = (second / (1 - HYPER["beta2"] ** side["steps"])).sqrt() + HYPER["eps"]
        moved = side["m"] / (1 - HYPER["beta1"] ** side["steps"]) / divisor
        side["p"] = side["p"] * (1 - HYPER["lr"] * HYPER["decay"]) - HYPER["lr"] * moved
    if scalar and next_fresh:
        refactor(a["p"], b["p"].mT)
    own["n"] += 1
    return [a, b], own, status


def check_step(rows, grads, rtol, p_rtol=None, amsgrad=False, **fields):
    """One step of every row, from where the row stands, against its plain writing."""
    before = [rows.read(i) for i in range(len(rows.plan.rows))]
    status = rows.step(grads, **fields)[:, col.STATUS]
    fields.pop("seed", None), fields.pop("carry", None)
    for number, (row, (sides, own)) in enumerate(zip(rows.plan.rows, before)):
        p, (gA, gB) = rows.pairs[row.pair], grads[row.pair]
        g = p.views_A(gA)[row.expert].double(), p.views_B(gB)[row.expert].double().mT
        want, own, expected = plain_step(sides, own, g, amsgrad=amsgrad, **fields)
        have, own_have = rows.read(number)
        assert status[number] == expected
        assert own_have["n"] == own["n"] and own_have["phase"] == own["phase"]
        assert torch.allclose(own_have["S"], own["S"], rtol=10 * rtol, atol=10 * rtol)
        for got, wanted in zip(have, want):
            assert got["steps"] == wanted["steps"]
            for name in ("p", "m", "v", *(["x"] if amsgrad else []), *(["w"] if "w" in got else [])):
                exact = wanted["p" if name == "w" else name]
                bound = p_rtol if name == "p" and p_rtol else rtol
                error = (got[name] - exact).abs()
                assert (error <= bound * exact.abs() + rtol * exact.abs().mean()).all(), (p.name, name, error.max())
