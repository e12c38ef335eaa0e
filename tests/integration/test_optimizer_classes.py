"""Optimizer classes of other packages behind RefLoRA: steps in numbers, resumes, and rates that they find."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from wrapping import assert_same, backward, factors, make_pairs, precondition_by_reference, targets

import reflora

Pairs = list[reflora.LoRAPair]


def named(pairs: Pairs) -> Any:
    return [(f"layers.{i // 2}.lora_{'AB'[i % 2]}", factor) for i, factor in enumerate(factors(pairs))]


def as_model(pairs: Pairs) -> Any:
    return nn.ParameterList(factors(pairs))


def by_muon(pairs: Pairs) -> Any:
    found = factors(pairs)
    return [{"params": found[2:], "use_muon": True}, {"params": found[:2], "use_muon": False}]


@dataclass(frozen=True)
class Case:
    """path: module and class. options: of the class. given: its first argument. matrices: it takes no others."""

    path: str
    options: dict[str, Any] = field(default_factory=dict)
    given: Any = factors
    matrices: bool = False

    @property
    def cls(self) -> Any:
        module, _, name = self.path.rpartition(".")
        return getattr(pytest.importorskip(module), name)

    def pairs(self) -> Pairs:
        return make_pairs()[: 4 if self.matrices else None]

    def plain(self, pairs: Pairs) -> Any:
        return self.cls(self.given(pairs), lr=1e-2, **self.options)

    def wrapped(self, pairs: Pairs, warmup_steps: int | None = 0) -> Any:
        """With the exact S from the first step on, unless warmup_steps is None."""
        shared = {"warmup_steps": self.options["warmup_steps"]} if "warmup_steps" in self.options else {}
        rest = {key: value for key, value in self.options.items() if key not in shared}
        own = {"warmup_steps": warmup_steps, "base_options": shared}
        return reflora.wrap(self.cls)(self.given(pairs), pairs=pairs, lr=1e-2, **rest, **own)  # type: ignore[call-arg]


CASES = [
    Case("schedulefree.AdamWScheduleFree", {"warmup_steps": 3}),
    Case("schedulefree.SGDScheduleFree", {"warmup_steps": 0}),
    Case("schedulefree.RAdamScheduleFree"),
    Case("prodigyopt.Prodigy", {"d0": 1e-3}),
    Case("prodigyopt.Prodigy", {"d0": 1e-3, "safeguard_warmup": True, "use_bias_correction": True, "slice_p": 3}),
    Case("adam_mini.Adam_mini", {"verbose": False}, named),
    Case("lion_pytorch.Lion", {"weight_decay": 0.1}),
    Case("torch.optim.Muon", {}, matrices=True),
    Case("torch.optim.Adafactor"),
    Case("pytorch_optimizer.Lion"),
    Case("pytorch_optimizer.AdaGC", {"warmup_steps": 2}),
    Case("pytorch_optimizer.AdamMini", {}, as_model),
    Case("pytorch_optimizer.CAME"),
    Case("pytorch_optimizer.DAdaptAdam", {"d0": 1e-3}),
    Case("pytorch_optimizer.DAdaptLion", {"d0": 1e-3}),
    Case("pytorch_optimizer.Muon", {}, by_muon, matrices=True),
    Case("pytorch_optimizer.AdaMuon", {}, by_muon, matrices=True),
    Case("pytorch_optimizer.Shampoo"),
    # the Gram of a long side has a null space, whose basis is drawn by rounding: r x r alone
    Case("pytorch_optimizer.SOAP", {"max_precondition_dim": 4}),
]
LABELS = [f"{case.path} {'-'.join(case.options)}".strip() for case in CASES]
each = pytest.mark.parametrize("case", CASES, ids=LABELS)


def training(*optimizers: Any) -> None:
    for one in optimizers:
        getattr(one, "train", bool)()


def held(optimizer: Any) -> list[float]:
    """The numbers that a class keeps in its groups: Prodigy's d, schedule-free's weights, counts."""
    groups = [dict(sorted(group.items())) for group in optimizer.param_groups]
    kept = [(name, value) for group in groups for name, value in group.items() if not name.startswith("reflora_")]
    return [float(value) for _, value in kept if isinstance(value, (int, float)) and math.isfinite(value)]


@each
def test_a_step_is_the_base_step_of_preconditioned_gradients(case: Case) -> None:
    ours, plain = case.pairs(), case.pairs()
    for mine, other in zip(factors(ours), factors(plain)):
        other.data.copy_(mine.data)
    goals = targets(ours)
    optimizer, base = case.wrapped(ours), case.plain(plain)
    training(optimizer, base)
    for _ in range(6):
        backward(ours, goals)
        optimizer.step()
        backward(plain, goals)
        precondition_by_reference(plain)
        base.step()
    assert_same(factors(ours), factors(plain), 1e-9)
    assert held(optimizer) == pytest.approx(held(base), rel=1e-9)
    assert optimizer.diagnostics().refactored == len(goals)
    before = [factor.detach().clone() for factor in factors(ours)]
    getattr(optimizer, "eval", bool)()
    assert "schedulefree" not in case.path or not all(map(torch.equal, factors(ours), before))  # its average


@each
def test_a_resumed_run_continues_bit_for_bit(case: Case) -> None:
    ours, again = case.pairs(), case.pairs()
    goals = targets(ours)
    optimizer, resumed = case.wrapped(ours, None), case.wrapped(again, None)
    training(optimizer, resumed)
    for step in range(8):
        if step == 4:
            state = copy.deepcopy(optimizer.state_dict())
            for mine, other in zip(factors(ours), factors(again)):
                other.data.copy_(mine.data)
            resumed.load_state_dict(state)
        backward(ours, goals)
        optimizer.step()
        if step >= 4:
            backward(again, goals)
            resumed.step()
    assert all(map(torch.equal, factors(ours), factors(again)))
    assert held(optimizer) == held(resumed)


def from_zero(optimizer_of: Any, seed: int, steps: int = 150) -> tuple[float, float]:
    """LoRA from B = 0 towards products of rank 4: the loss in the end over that of the start, and d."""
    torch.manual_seed(seed)
    pairs = make_pairs()[:4]
    goals = targets(pairs)
    for pair in pairs:
        pair.A.data /= pair.A.shape[1] ** 0.5
        pair.B.data.zero_()
    optimizer = optimizer_of(pairs)
    losses = [backward(pairs, goals).item()]
    for _ in range(steps):
        optimizer.step()
        losses.append(backward(pairs, goals).item())
    return losses[-1] / losses[0], optimizer.param_groups[0]["d"]


@pytest.mark.parametrize("seed", range(3))
def test_prodigy_finds_the_distance_that_it_finds_without_reflora(seed: int) -> None:
    """S comes without its scale, so that preconditioned gradients keep their unit, and d its meaning."""
    Prodigy = pytest.importorskip("prodigyopt").Prodigy
    options = {"d0": 1e-3, "safeguard_warmup": True, "use_bias_correction": True}
    plain, d = from_zero(lambda pairs: Prodigy(factors(pairs), **options), seed)
    ours, found = from_zero(lambda pairs: reflora.wrap(Prodigy)(factors(pairs), pairs=pairs, **options), seed)
    assert plain < 0.3 and ours < 0.3
    assert found != d and found == pytest.approx(d, rel=0.02)  # with the scale of S, 9 to 20 % more


@pytest.mark.parametrize("path", ["adam_mini.Adam_mini", "pytorch_optimizer.AdamMini"])
def test_a_class_over_names_or_a_model_is_built_from_the_model(path: str) -> None:
    peft = pytest.importorskip("peft")
    case = Case(path, {"verbose": False} if path.startswith("adam_mini") else {})

    def build() -> Any:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 9)).double()
        config = peft.LoraConfig(r=4, target_modules=["0", "1"], init_lora_weights=False)
        return peft.get_peft_model(net, config).double()

    ours, plain = build(), build()
    optimizer: Any = reflora.create_reflora_optimizer(ours, case.cls, lr=1e-2, warmup_steps=0, **case.options)
    trained = [(name, param) for name, param in plain.named_parameters() if param.requires_grad]
    base = case.cls(plain if path.endswith("AdamMini") else trained, lr=1e-2, **case.options)
    assert [group["name"] for group in optimizer.param_groups] == [group["name"] for group in base.param_groups]
    for step in range(4):
        x = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        for model in (ours, plain):
            model.zero_grad()
            model(x).square().sum().backward()
        precondition_by_reference(reflora.find_pairs(plain))
        optimizer.step()
        base.step()
    assert_same([p for p in ours.parameters() if p.requires_grad], [param for _, param in trained], 1e-9)
