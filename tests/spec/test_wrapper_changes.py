"""Wrapped optimizers over parameters that were replaced, and over classes whose state nothing is known about."""

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
from refusals import refused
from torch import nn
from torch.optim import Adam, AdamW
from wrapping import assert_same, backward, factors, make_pairs, precondition_by_reference, targets, twins, wrap

import reflora
from reflora.optim.pairs import PairOps, multiply
from reflora.optim.sharded import ShardedOps
from reflora.optim.wrapper import reflora_class


class HiddenAdam(torch.optim.Optimizer):
    """Adam under names that no table knows, as 8-bit optimizers keep it; its eps is too small to matter."""

    def __init__(self, params, lr=1e-2):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if "n" not in state:
                    state.update(n=0, first=torch.zeros_like(p), second=torch.zeros_like(p))
                state["n"] += 1
                state["first"].lerp_(p.grad, 0.1)
                state["second"].lerp_(p.grad.square(), 0.001)
                root = (state["second"] / (1 - 0.999 ** state["n"])).sqrt()
                p.addcdiv_(state["first"], root.add_(1e-30), value=-group["lr"] / (1 - 0.9 ** state["n"]))


@pytest.mark.parametrize("options", [{}, {"warmup_steps": 3}, {"interval": 2}, {"warmup_steps": 2, "interval": 3}])
def test_state_that_cannot_be_moved_does_as_if_it_had_been(options):
    """From B = 0, where S is I in the first step: the gradients keep the unit that they had then."""
    ours, others = make_pairs(), make_pairs()
    for pair, other in zip(ours, others):
        pair.B.data.zero_()
        other.A.data.copy_(pair.A.data), other.B.data.zero_()
    goals = targets(ours)
    hidden = wrap(HiddenAdam, ours, **options)
    known = wrap(Adam, others, eps=1e-30, **options)
    for step in range(8):
        backward(ours, goals), hidden.step()
        backward(others, goals), known.step()
        if step == 4:
            resumed = wrap(HiddenAdam, ours, **options)
            resumed.load_state_dict(copy.deepcopy(hidden.state_dict()))
            hidden = resumed
    assert_same(factors(ours), factors(others), 1e-9)


def new_of(pair):
    return reflora.LoRAPair(pair.name, *(nn.Parameter(t.detach().clone()) for t in (pair.A, pair.B)), pair.layout)


def test_parameters_that_are_swapped_one_by_one_are_followed():
    """As accelerate does around `fully_shard`; RefLoRAAdamW, which cannot follow, says so instead of going plain."""
    ours, optimizer, plain, base, goals = twins(AdamW, {}, {})
    swapped = [new_of(pair) for pair in ours]
    fused = reflora.RefLoRAAdamW(factors(ours), pairs=ours)
    for one in (optimizer, fused):
        one.param_groups[0]["params"] = factors(swapped)
    for _ in range(3):
        backward(swapped, goals), optimizer.step()
        backward(plain, goals)
        precondition_by_reference(plain)
        base.step()
    assert_same(factors(swapped), factors(plain))
    # some of them only
    half = [new_of(pair) for pair in swapped[:2]]
    both = half + swapped[2:]
    optimizer.param_groups[0]["params"] = factors(both)
    backward(both, goals), optimizer.step()
    assert optimizer.diagnostics().refactored == 8
    backward(swapped, goals)
    with refused("expected the factors of the pairs among them.*reflora.wrap", error=RuntimeError):
        fused.step()
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.cat([t.detach().flatten() for t in factors(swapped)]))]
    with refused("flatten or replace parameters", error=RuntimeError):
        optimizer.step()


def test_a_step_without_any_gradient_is_told_of():
    """As of an optimizer whose parameters are no longer the model's."""
    pairs = make_pairs()
    for optimizer in (reflora.RefLoRAAdamW(factors(pairs), pairs=pairs), wrap(torch.optim.SGD, pairs)):
        with pytest.warns(UserWarning, match="no LoRA pair of the optimizer has a gradient"):
            optimizer.step()


def test_matrices_of_two_types_multiply():
    """A saved S may be float32 where a new one is float64."""
    views = [torch.randn(3, 5) for _ in range(2)]
    before = [view.clone() for view in views]
    matrices = [torch.randn(3, 3), torch.randn(3, 3, dtype=torch.float64)]
    multiply(views, matrices)
    for view, old, matrix in zip(views, before, matrices):
        torch.testing.assert_close(view, matrix.float() @ old)


def test_experts_have_names_of_their_own_when_sharded():
    """The operations of FSDP2 on whole tensors: the same numbers, and the names that PairOps gives."""
    ours, others = make_pairs(), make_pairs()
    for pair, other in zip(ours, others):
        for mine, theirs in ((pair.A, other.A), (pair.B, other.B)):
            theirs.data.copy_(mine.data)
            mine.grad = torch.randn_like(mine)
            theirs.grad = mine.grad.clone()
    sharded, whole = ShardedOps(ours), PairOps(others)
    for ops in (sharded, whole):
        ops.precondition([True] * len(ours))
    assert sharded.diagnostics().names == whole.diagnostics().names
    assert_same([f.grad for f in factors(ours)], [f.grad for f in factors(others)], 1e-9)


def test_accelerates_fsdp2_is_recognised_where_it_is_set_up_in_code(monkeypatch):
    linear = nn.Linear(6, 4)
    layer = nn.Module()
    layer.lora_A = nn.ModuleDict({"default": nn.Linear(6, 2, bias=False)})
    layer.lora_B = nn.ModuleDict({"default": nn.Linear(2, 4, bias=False)})
    model = nn.ModuleList([linear, layer])
    assert isinstance(reflora.create_reflora_optimizer(model, lr=1e-3), reflora.RefLoRAAdamW)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.delenv("FSDP_VERSION", raising=False)
    plugin = SimpleNamespace(fsdp_version=1)
    state = SimpleNamespace(AcceleratorState=SimpleNamespace(_shared_state={"fsdp_plugin": plugin}))
    monkeypatch.setitem(sys.modules, "accelerate.state", state)
    assert isinstance(reflora.create_reflora_optimizer(model, lr=1e-3), reflora.RefLoRAAdamW)
    plugin.fsdp_version = 2
    assert type(reflora.create_reflora_optimizer(model, lr=1e-3)) is reflora_class(AdamW)
