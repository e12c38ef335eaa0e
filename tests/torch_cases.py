"""Pairs bound to a plan of their own for the torch backend, and a plain float64 writing of a row's AdamW steps."""

import torch
from conftest import spectrum_pair

from reflora import plan as col
from reflora import reference
from reflora.backends import AdamWStep, torch_backend
from reflora.contract import STORAGE_DTYPES, LoRAPair
from reflora.plan import A_SIDE, B_SIDE, HYPERS, Plan

SIDES = (("A", A_SIDE), ("B", B_SIDE))
# lr, beta1, beta2, eps, weight_decay, amsgrad, maximize of the groups of A and of B
OPTIONS = [(1e-2, 0.9, 0.999, 1e-8, 0.01, 0, 0), (3e-2, 0.8, 0.99, 1e-8, 0.1, 0, 0)]
AMSGRAD = [(1e-2, 0.9, 0.999, 1e-8, 0.01, 1, 0), (3e-2, 0.8, 0.99, 1e-8, 0.1, 0, 1)]


def some_pairs(dtype=torch.float64):
    """Two rows of one shape, one of another, and two experts; r is 4 throughout."""
    pairs = [LoRAPair(f"pair {n}", *spectrum_pair(4, n, 17, 2, 20, dtype)) for n in (21, 21, 12)]
    experts = [spectrum_pair(4, 11, 9, 2, 20, dtype) for _ in range(2)]
    A, B = torch.cat([a for a, _ in experts]), torch.stack([b for _, b in experts], 2).reshape(9, 8)
    return [*pairs, LoRAPair("experts", A, B, "experts(2)")]


def draw(pairs, times=1):
    return [[tuple(torch.randn_like(t) for t in (p.A, p.B)) for p in pairs] for _ in range(times)]


class Bound:
    """Copies of pairs, with optimizer state, bound to a plan."""

    def __init__(self, pairs, options=OPTIONS, state=None, master=False):
        self.pairs = [LoRAPair(p.name, p.A.clone(), p.B.clone(), p.layout) for p in pairs]
        self.plan, self.options = Plan(self.pairs), options
        self.hypers = torch.zeros(2, HYPERS, dtype=torch.float64)
        self.hypers[:, :7] = torch.tensor(options, dtype=torch.float64)
        self.state = {}
        for number, (name, side) in enumerate(SIDES):
            factors = [getattr(p, name) for p in self.pairs]
            for column in (col.M, col.V, col.X):
                self.bind(side, column, [torch.zeros_like(f, dtype=state) for f in factors])
            if master:
                self.bind(side, col.W, [f.float() for f in factors])
            self.once(side + col.STEP, [torch.zeros(p.experts) for p in self.pairs])
            self.plan.bind_groups(side, [number] * len(pairs))
        if state is not None:
            self.plan.table[:, col.STATE] = STORAGE_DTYPES.index(state)
        for column in (col.PHASE, col.COUNT):
            self.once(column, [torch.zeros(p.experts) for p in self.pairs])
        wide = torch.float64 if pairs[0].A.dtype == torch.float64 else torch.float32
        self.once(col.SAVED, [torch.zeros(p.experts, 2, p.rank, p.rank, dtype=wide) for p in self.pairs])

    def bind(self, side, column, tensors):
        self.state[side + column] = tensors
        self.plan.bind(side, column, tensors)

    def once(self, column, tensors):
        self.state[column] = tensors
        self.plan.bind_once(column, tensors)

    def step(self, grads, kept=0, **options):
        self.plan.bind_grads(grads)
        self.plan.table[:, col.KEPT] = kept
        return torch_backend.adamw(self.plan, AdamWStep(self.hypers, **options))

    def tensors(self):
        return [t for p in self.pairs for t in (p.A, p.B)] + [t for tensors in self.state.values() for t in tensors]

    def snapshot(self):
        return [t.clone() for t in self.tensors()]

    def side(self, column, name, row):
        """`[r, n]` of a row, of a column of a side."""
        pair, side = self.pairs[row.pair], dict(SIDES)[name]
        tensor = getattr(pair, name) if column == col.P else self.state[side + column][row.pair]
        return pair.views_A(tensor)[row.expert] if name == "A" else pair.views_B(tensor)[row.expert].mT


class PlainRow:
    """One row, step after step in float64; `storage` is what its factors are rounded to."""

    def __init__(self, bound, row, storage=torch.float64, master=False):
        self.bound, self.row, self.storage, self.master = bound, row, storage, master
        self.p = {name: bound.side(col.P, name, row).double().clone() for name, _ in SIDES}
        self.w = {name: p.clone() for name, p in self.p.items()}
        self.m, self.v, self.x = ({name: torch.zeros_like(p) for name, p in self.p.items()} for _ in range(3))
        self.t, self.count, self.phase, self.S, self.acted = 0, 0, 0, None, False

    def step(self, grads, warmup_steps=0, interval=1, scalar=False):
        pair, g, self.acted = self.bound.pairs[self.row.pair], {}, False
        for (name, _), views, grad, options in zip(SIDES, (pair.views_A, pair.views_B), grads, self.bound.options):
            g[name] = views(grad)[self.row.expert].double() * (-1 if options[6] else 1)
        past = self.count + 1 - warmup_steps
        after = scalar and past >= 0 and past % interval == 0
        if not scalar:
            S, S_inv = self.choose(warmup_steps, interval)
            g = {"A": S_inv @ g["A"], "B": g["B"] @ S}
        else:
            self.plain()  # of a state that has been in units of S
            if self.count == 0 == warmup_steps:
                root = self.refactor()
                g = {"A": g["A"] / root, "B": g["B"] * root}
        self.t += 1
        for (name, _), options in zip(SIDES, self.bound.options):
            self.update(name, g[name] if name == "A" else g[name].mT, *options)
        if after:
            self.refactor()
        self.count += 1

    def plain(self):
        """S = I from here on."""
        if self.phase:
            self.move(self.ratio())
        self.phase = 0

    def ratio(self):
        return float(self.p["B"].norm() / self.p["A"].norm())

    def choose(self, warmup_steps, interval):
        A, B = self.p["A"], self.p["B"].mT
        if self.count < warmup_steps:
            self.plain()
            return [torch.eye(len(A), dtype=torch.float64)] * 2
        if self.S is None or (self.count - warmup_steps) % interval == 0:
            self.S = reference.choose(A, B)[:2]
            if not self.phase:
                self.move(1 / self.ratio())
            self.phase = 1
        self.acted = True
        return self.S

    def refactor(self):
        self.acted = True
        root = self.ratio() ** 0.5
        for numbers in (self.p, self.w):
            numbers["A"], numbers["B"] = numbers["A"] * root, numbers["B"] / root
        self.move(1 / root)
        return root

    def move(self, factor):
        for name, f in (("A", factor), ("B", 1 / factor)):
            self.m[name], self.v[name] = reference.transport(self.m[name], self.v[name], f)
            self.x[name] = self.x[name] * f**2

    def update(self, name, g, lr, beta1, beta2, eps, decay, amsgrad, maximize):
        self.m[name] = beta1 * self.m[name] + (1 - beta1) * g
        self.v[name] = second = beta2 * self.v[name] + (1 - beta2) * g * g
        if amsgrad:
            self.x[name] = second = torch.maximum(self.x[name], second)
        denom = (second / (1 - beta2**self.t)).sqrt() + eps
        start = self.w if self.master else self.p
        self.w[name] = start[name] * (1 - lr * decay) - lr / (1 - beta1**self.t) * self.m[name] / denom
        self.p[name] = self.w[name].to(self.storage).double()

    def check(self, rtol, p_rtol=None):
        for name, _ in SIDES:
            for column, want in ((col.P, self.p), (col.M, self.m), (col.V, self.v), (col.X, self.x), (col.W, self.w)):
                if column != col.W or self.master:
                    got, limit = self.bound.side(column, name, self.row), p_rtol if column == col.P else None
                    error = (got.double() - want[name]).norm()
                    assert error <= (limit or rtol) * want[name].norm(), (self.row.pair, name, column)


def same(first, second):
    return all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
