"""Where kernel tests run, the pairs they use, and a RefLoRA-AdamW step beside its plain float64 writing."""

from __future__ import annotations

import pytest
import torch
from conftest import served, spectrum_pair

from reflora import plan as col
from reflora import reference
from reflora.backends import FRESH, IDENTITY, SAVED, AdamWStep, triton_backend
from reflora.contract import DEGENERATE, SKIPPED, STORAGE_DTYPES, LoRAPair
from reflora.optim.state import zeros_like
from reflora.plan import A_SIDE, B_SIDE, HYPERS, Plan

DOUBLE = torch.float64
# a GPU runs the kernels under `pytest -m gpu`, tools/ptxsim without one, under `make emulate`
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EMULATED = [pytest.mark.kernels, pytest.mark.skipif(not served("triton"), reason="make emulate runs it")]
MARKS = [pytest.mark.gpu] if torch.cuda.is_available() else EMULATED
# of factors and state after some steps, norm by norm, by the type that they are stored in
STEP_TOLERANCE = {DOUBLE: 1e-9, torch.float32: 2e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DEFAULTS = dict(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, amsgrad=0.0, maximize=0.0)


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=DOUBLE).to(DEVICE, dtype)


def pair(r, k_A=3.0, k_B=1e3, dtype=torch.float32, n_in=150, n_out=173, scale_A=1.0, scale_B=1.0):
    """A pair with log-spaced spectra of the given condition."""
    A, B = spectrum_pair(r, n_in, n_out, k_A, k_B)
    return LoRAPair("pair", (scale_A * A).to(DEVICE, dtype), (scale_B * B).to(DEVICE, dtype))


def degenerate_pairs():
    """(name, pair, status, scale or None for the balance scalar)"""
    row = torch.tensor([7], device=DEVICE)
    yield "zero B", LoRAPair("", randn(4, 30), 0 * randn(20, 4)), DEGENERATE, 1.0
    yield "all zero", LoRAPair("", 0 * randn(4, 30), 0 * randn(20, 4)), DEGENERATE, 1.0
    yield "rank 1", LoRAPair("", randn(4, 30), randn(20, 1) @ randn(1, 4)), DEGENERATE, None
    yield "k = 1e12", pair(6, 3, 1e12, DOUBLE), DEGENERATE, None
    yield "n < r", LoRAPair("", randn(6, 4), randn(20, 6)), DEGENERATE, None
    yield "far scales", LoRAPair("", 1e30 * randn(3, 40), 1e-30 * randn(20, 3)), DEGENERATE, 1.0
    yield "nan", LoRAPair("", torch.nan * randn(3, 40), randn(20, 3)), SKIPPED, None
    yield "inf", LoRAPair("", randn(3, 40), randn(20, 3).index_fill(0, row, torch.inf)), SKIPPED, None


class Fused:
    """Pairs with optimizer state bound to a plan; hypers[0] serves every A, hypers[1] every B."""

    def __init__(self, pairs, hypers, backend=triton_backend, state_dtype=None, master=False):
        self.pairs, self.backend, self.plan, self.state_dtype = pairs, backend, Plan(pairs), state_dtype
        self.options = [{**DEFAULTS, **h} for h in hypers]
        self.hypers = torch.zeros(2, HYPERS, dtype=DOUBLE)
        for row, options in zip(self.hypers, self.options):
            row[: len(options)] = torch.tensor(list(options.values()), dtype=DOUBLE)
        self.state = {}
        for side, factors in ((A_SIDE, [p.A for p in pairs]), (B_SIDE, [p.B for p in pairs])):
            for column in (col.M, col.V, col.X):
                dtype = self.state_dtype
                self.state[side + column] = [zeros_like(f, dtype or f.dtype) for f in factors]
                self.plan.bind(side, column, self.state[side + column])
            self.state[side + col.STEP] = [torch.zeros(p.experts, device=p.A.device) for p in pairs]
            self.plan.bind_once(side + col.STEP, self.state[side + col.STEP])
            self.plan.bind_groups(side, [side // col.SIDE] * len(pairs))
            if master:
                self.state[side + col.W] = [f.float() for f in factors]
                self.plan.bind(side, col.W, self.state[side + col.W])
        if state_dtype:
            self.plan.set(col.STATE, [STORAGE_DTYPES.index(state_dtype)] * len(pairs))
        for column in (col.PHASE, col.COUNT):
            self.state[column] = [torch.zeros(p.experts, device=p.A.device) for p in pairs]
        self.state[col.SAVED] = [
            torch.zeros(p.experts, 2, p.rank, p.rank, device=p.A.device).to(
                DOUBLE if p.A.dtype == DOUBLE else torch.float32
            ) for p in pairs
        ]  # fmt: skip
        for column in (col.PHASE, col.COUNT, col.SAVED):
            self.plan.bind_once(column, self.state[column])

    def step(
        self, grads, source, keep=False, scalar_before=False, scalar_after=False, count=None, interval=None, **options
    ):
        """A step at a count, and with a schedule, at which every row does what is named."""
        self.plan.bind_grads(grads)
        scalar = scalar_before or scalar_after
        late = 1 if source == SAVED or (scalar and not scalar_before) else 0
        for counts in self.state[col.COUNT]:
            counts.fill_(late if count is None else count)
        step = AdamWStep(
            self.hypers, scalar=scalar, warmup_steps=10**9 if source == IDENTITY and not scalar else 0,
            interval=interval or (10**6 if keep or source == SAVED else 1), **options,
        )  # fmt: skip
        return self.backend.adamw(self.plan, step)

    def snapshot(self):
        """Copies of factors and state (but for the saved S), pair after pair."""
        columns = [tensors for column, tensors in self.state.items() if column not in (col.SAVED, col.COUNT)]
        return [t.clone() for i, p in enumerate(self.pairs) for t in (p.A, p.B, *(c[i] for c in columns))]

    def counts(self):
        return [int(c) for counts in self.state[col.COUNT] for c in counts]


class Oracle:
    """Starts from the factors and state of a Fused and does the same steps in float64."""

    def __init__(self, fused):
        self.fused = fused
        self.rows = []
        for row in fused.plan.rows:
            p = fused.pairs[row.pair]
            entry = {
                "A": row.A.double().cpu().clone(),
                "B": row.B.double().cpu().clone(),
                "phase": 0.0,
                "S": None,
                "r": p.rank,
            }
            for side in "AB":
                entry["count" + side] = 0
                for name in "mvx":
                    entry[name + side] = torch.zeros_like(entry[side])
            self.rows.append(entry)

    def step(
        self, grads, source, keep=False, scalar_before=False, scalar_after=False, grad_scale=None, found_inf=None,
        weight=None, scalar_start=False, scalar_due=True,
    ):  # fmt: skip
        """weight: of shrunk Grams. scalar_start: RefLoRA-S begins where the norms meet; scalar_due: after this step."""
        for entry, row in zip(self.rows, self.fused.plan.rows):
            p = self.fused.pairs[row.pair]
            gA, gB = grads[row.pair]
            g = {"A": p.views_A(gA)[row.expert].double().cpu(), "B": p.views_B(gB)[row.expert].double().cpu()}
            for side, options in zip("AB", self.fused.options):
                g[side] = g[side] / (1 if grad_scale is None else grad_scale.double().cpu())
                g[side] = -g[side] if options["maximize"] else g[side]
            if scalar_before:
                root = self.refactor(entry)
                g = {"A": g["A"] / root, "B": g["B"] * root}
            elif not scalar_after:
                S, S_inv = self.choose(entry, source, keep, weight)
                g = {"A": S_inv @ g["A"], "B": g["B"] @ S}
            old = entry["A"].clone(), entry["B"].clone()
            for side, options in zip("AB", self.fused.options):
                self.adam(entry, side, g[side], **options)
            if scalar_start and entry["phase"] == 0 and reference.met(*old, entry["A"], entry["B"]):
                entry["phase"] = float(col.BALANCED)
            if scalar_after and scalar_due and (not scalar_start or entry["phase"] != 0):
                self.refactor(entry)

    def choose(self, entry, source, keep, weight=None):
        eye = torch.eye(entry["r"], dtype=DOUBLE)
        if source == SAVED:
            return entry["S"]
        S, S_inv, why = (eye, eye, "")
        if source == FRESH:
            S, S_inv, why = reference.choose(entry["A"], entry["B"], weight=weight)
        if weight is not None:
            return S, S_inv
        identity = source == IDENTITY or (why == "degenerate" and torch.equal(S, eye))
        norms = [float(entry[side].norm()) for side in "AB"]
        c = norms[1] / norms[0] if min(norms) > 0 else 1.0
        if not identity and entry["phase"] == 0:
            self.move(entry, 1 / c)
        if identity and entry["phase"] == 1 and source == IDENTITY:
            self.move(entry, c)
        entry["phase"] = 0.0 if identity else 1.0
        if keep:
            entry["S"] = (S, S_inv)
        return S, S_inv

    def refactor(self, entry):
        norms = [float(entry[side].norm()) for side in "AB"]
        root = (norms[1] / norms[0]) ** 0.5 if min(norms) > 0 else 1.0
        entry["A"], entry["B"] = entry["A"] * root, entry["B"] / root
        self.move(entry, 1 / root)
        return root

    @staticmethod
    def move(entry, factor):
        for side, f in (("A", factor), ("B", 1 / factor)):
            entry["m" + side], entry["v" + side] = reference.transport(entry["m" + side], entry["v" + side], f)
            entry["x" + side] = entry["x" + side] * f**2

    @staticmethod
    def adam(entry, side, g, lr, beta1, beta2, eps, weight_decay, amsgrad, maximize):
        entry["count" + side] += 1
        t = entry["count" + side]
        m = entry["m" + side] = beta1 * entry["m" + side] + (1 - beta1) * g
        v = entry["v" + side] = beta2 * entry["v" + side] + (1 - beta2) * g * g
        if amsgrad:
            v = entry["x" + side] = torch.maximum(entry["x" + side], v)
        denom = v.sqrt() / (1 - beta2**t) ** 0.5 + eps
        entry[side] = entry[side] * (1 - lr * weight_decay) - lr / (1 - beta1**t) * m / denom

    def check(self, rtol=None):
        """Factors, moments, counts and phases of the Fused are those of this, to rtol or STEP_TOLERANCE."""
        fused = self.fused
        for entry, row in zip(self.rows, fused.plan.rows):
            p = fused.pairs[row.pair]
            assert float(fused.state[col.PHASE][row.pair][row.expert]) == entry["phase"], p.name
            for side, base, views in (("A", A_SIDE, p.views_A), ("B", B_SIDE, p.views_B)):
                got = {side: p.A if side == "A" else p.B}
                for name, column in (("m", col.M), ("v", col.V), ("x", col.X)):
                    got[name + side] = fused.state[base + column][row.pair]
                assert float(fused.state[base + col.STEP][row.pair][row.expert]) == entry["count" + side]
                for name, tensor in got.items():
                    want, have = entry[name], views(tensor)[row.expert].double().cpu()
                    error = float((have - want).norm()) / max(float(want.norm()), 1e-300)
                    bound = rtol or STEP_TOLERANCE[tensor.dtype]
                    assert error < bound or float(want.norm()) == 0 == float(have.norm()), (p.name, name, error)
