"""Every column of Diagnostics means the same on every backend."""

import math

import pytest
import torch
from conftest import spectrum_pair

import reflora
from reflora import RefLoRAAdamW
from reflora.columns import DEGENERATE, PLAIN, REFACTORED, SKIPPED
from reflora.constants import KAPPA_MAX
from reflora.diagnostics import Diagnostics, diagnose
from reflora.pairs import LoRAPair

COLUMNS = ("status", "condition_A", "condition_B", "balance", "scale")
R = 4


def layers(dtype):
    """Name -> (pair, gradients): of all kinds that a step tells apart."""

    def normal():
        return [t.to(dtype) for t in spectrum_pair(R, 30, 20, 3.0, 20.0)]

    def spoilt(t, value):
        t = t.clone()
        t[1, 2] = value
        return t

    A, B = normal()
    draws = {
        "normal": (A, B), "B = 0": (A, B * 0), "A = 0": (A * 0, B), "both 0": (A * 0, B * 0),
        "rank 1": (A, B[:, :1] @ torch.ones(1, R, dtype=dtype)), "n < r": (A[:, :3], B),
        "apart": (A / 1e15, B * 1e15), "too far apart": (A / 1e30, B * 1e30), "NaN factor": (A, spoilt(B, torch.nan)),
        "inf factor": (spoilt(A, torch.inf), B), "NaN gradient": normal(), "inf gradient": normal(),
        "no gradient": normal(),
    }  # fmt: skip
    if dtype == torch.float16:
        del draws["apart"], draws["too far apart"]
    pairs = [LoRAPair(name, A.clone(), B.clone().contiguous()) for name, (A, B) in draws.items()]
    of_experts = LoRAPair("experts", torch.randn(3 * R, 9).to(dtype), torch.randn(7, R * 3).to(dtype), "experts(3)")
    of_experts.views_B(of_experts.B)[1].zero_()
    pairs.append(of_experts)
    grads = {pair.name: [torch.randn_like(pair.A), torch.randn_like(pair.B)] for pair in pairs}
    grads["NaN gradient"][1][2, 1] = torch.nan
    grads["inf gradient"][0][1, 2] = torch.inf
    grads["no gradient"] = [None, None]
    return pairs, list(grads.values())


def functional(name, backend, pairs, grads, **options):
    if name == "refactor_":
        return reflora.refactor_(pairs, backend=backend, **options)
    return reflora.precondition_(pairs, grads, backend=backend, **options)


def stepped(backend, pairs, grads, steps=1, **options):
    """Of the last of some steps of AdamW; the later ones with finite gradients."""
    optimizer = RefLoRAAdamW(
        [t.requires_grad_() for pair in pairs for t in (pair.A, pair.B)], pairs=pairs, lr=1e-3, backend=backend,
        **options,
    )  # fmt: skip
    for step in range(steps):
        for pair, sides in zip(pairs, grads):
            for factor, grad in zip((pair.A, pair.B), sides):
                factor.grad = grad if grad is None or not step else grad.nan_to_num(0.0, 0.0, 0.0)
        optimizer.step()
    engines = optimizer._engines.made
    return diagnose(
        pairs, [e.chosen for e in engines], [e.plan for e in engines], [e.results for e in engines],
        reuses=optimizer.interval > 1 and not optimizer.scalar,
    )  # fmt: skip


CASES = {
    "refactor_": {}, "precondition_": {}, "refactor_, scalar": dict(scalar=True),
    "precondition_, scalar": dict(scalar=True), "adamw": {}, "adamw, exact S": dict(warmup_steps=0),
    "adamw, warm-up": dict(warmup_steps=5, steps=2), "adamw, later": dict(steps=2),
    "adamw, kept S": dict(warmup_steps=0, interval=3, steps=2), "adamw, scalar": dict(scalar=True, steps=2),
    "adamw, scalar at once": dict(scalar=True, warmup_steps=0),
    "adamw, scalar, between": dict(scalar=True, warmup_steps=0, interval=3, steps=2),
}  # fmt: skip


def report(case, backend, dtype):
    torch.manual_seed(0)
    pairs, grads = layers(dtype)
    name = case.split(",")[0]
    if name == "adamw":
        return stepped(backend, pairs, grads, **CASES[case])
    return functional(name, backend, pairs, grads, **CASES[case])


def alike(column, found, wanted):
    if math.isnan(wanted) or math.isinf(wanted):
        # what rounding leaves of a singular Gram may still have a Cholesky factor
        return math.isnan(found) == math.isnan(wanted) and (found == wanted or not found <= KAPPA_MAX["float64"])
    if column.startswith("condition") and wanted > KAPPA_MAX["float64"]:
        return found > KAPPA_MAX["float64"]
    return found == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_every_backend_reports_the_same(backend, case):
    same_reports(case, backend, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_of_other_types_too(fast_backend, case, dtype):
    same_reports(case, fast_backend, dtype)


def same_reports(case, backend, dtype):
    found, wanted = report(case, backend, dtype), report(case, "torch", dtype)
    assert found.names == wanted.names
    for column in COLUMNS:
        values = zip(found.names, getattr(found, column).tolist(), getattr(wanted, column).tolist(), strict=True)
        for name, ours, theirs in values:
            assert alike(column, ours, theirs), (column, name, ours, theirs)


def test_what_the_columns_say(backend):
    found = report("precondition_", backend, torch.float32)
    rows = dict(zip(found.names, zip(*(getattr(found, column).tolist() for column in COLUMNS))))
    inf, nan = pytest.approx(math.inf), pytest.approx(math.nan, nan_ok=True)
    assert rows["normal"][0] == REFACTORED and all(map(math.isfinite, rows["normal"]))
    assert rows["B = 0"] == (DEGENERATE, rows["normal"][1], inf, 1.0, 1.0)
    assert rows["experts[1]"][0] == DEGENERATE and rows["experts[1]"][2] == inf
    assert rows["A = 0"][1:] == (inf, pytest.approx(rows["normal"][2], rel=1e-6), inf, 1.0)
    assert rows["both 0"] == (DEGENERATE, inf, inf, inf, 1.0)
    assert rows["n < r"][:2] == (DEGENERATE, inf)
    for name in ("NaN factor", "inf factor", "NaN gradient", "inf gradient"):
        assert rows[name] == (SKIPPED, nan, nan, nan, nan), name
    assert rows["no gradient"] == (PLAIN, nan, nan, nan, nan)


def test_a_zero_factor_has_no_condition_at_the_start_either(backend):
    """Its shrunk Gram is a multiple of I."""
    found = report("adamw", backend, torch.float32)
    assert found.condition_B[found.names.index("B = 0")] == math.inf
    assert found.condition_A[found.names.index("A = 0")] == math.inf


def test_scale_is_that_before_the_step(backend):
    """RefLoRA-S measures its norms before and after."""
    torch.manual_seed(0)
    A, B = torch.randn(4, 30), torch.randn(20, 4) / 7
    scale = float(B.double().norm() / A.double().norm())
    found = stepped(backend, [LoRAPair("x", A, B)], [[torch.randn_like(A), torch.randn_like(B)]], scalar=True,
                    warmup_steps=1)  # fmt: skip
    assert found.status.tolist() == [REFACTORED] and float(found.scale) == pytest.approx(scale, rel=1e-6)
    assert found.condition_A.isnan().all() and found.balance.isnan().all()


def test_of_nothing():
    found = Diagnostics([], [], [])
    assert [len(getattr(found, column)) for column in COLUMNS] == [0] * 5
    assert found.refactored == found.skipped == 0 and math.isnan(found.worst_condition)
