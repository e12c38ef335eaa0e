"""The operators behind torch.compile, and a compiled step against an eager one."""

import gc
import warnings
import weakref

import pytest
import torch
from conftest import needs_compiler
from refusals import unchanged
from torch._inductor import config as inductor_config
from toys import clones, factors, leaf_pairs, random_grads

import reflora
from reflora import InvariantAdamW, RefLoRAAdamW, RiemannianAdamW
from reflora.columns import PLAIN
from reflora.optim.adamw_engine import AdamWEngine
from reflora.optim.compiled import empty_results
from reflora.pairs import LoRAPair

SHAPES = [(4, 20, 12), (3, 9, 30)]


@pytest.fixture(autouse=True)
def no_recompilation():
    """A recompilation is an error."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True), inductor_config.patch(force_disable_caches=True):
        yield
    torch._dynamo.reset()


OPTIONS = {
    "default": {},
    "scalar": dict(scalar=True),
    "schedule": dict(interval=2, warmup_steps=1),
    "amsgrad": dict(amsgrad=True),
    "lr tensor": dict(lr=torch.tensor(1e-2)),
    "carried": dict(carry_grams=True),
    "torch": dict(backend="torch"),
    "invariant": dict(metric="scaled"),
    "invariant, torch": dict(moments="momentum", backend="torch"),
    "riemannian": dict(reg=1e-3),
}


@pytest.mark.parametrize("options", OPTIONS)
def test_a_compiled_step_is_the_eager_one(options):
    """Pairs, experts, a head in no pair and one without a gradient, over a scheduled learning rate.

    The operator's options do not show in the graph around it: Inductor has the default's, AOTAutograd the others'.
    """
    compiler = "inductor" if options == "default" else "aot_eager"
    ends = []
    for compiled in (False, True):
        torch.manual_seed(0)
        pairs = leaf_pairs(SHAPES, torch.float32)
        A, B = torch.randn(2 * 3, 8).requires_grad_(), torch.randn(7, 3 * 2).requires_grad_()
        head, idle = torch.randn(5, requires_grad=True), torch.randn(3, requires_grad=True)
        owned = [*factors(pairs), A, B, head, idle]
        all_pairs = [*pairs, LoRAPair("moe", A, B, "experts(2)")]
        cls = {"invariant": InvariantAdamW, "riemannian": RiemannianAdamW}.get(options.split(",")[0], RefLoRAAdamW)
        optimizer = cls(owned, pairs=all_pairs, **{"lr": 1e-2, **OPTIONS[options]})
        step = optimizer.step
        if compiled:
            step = torch.compile(lambda: optimizer.step(), fullgraph=True, backend=compiler)  # noqa: B023
        generator = torch.Generator().manual_seed(1)
        for number in range(4):
            random_grads(owned[:-1], generator)
            if isinstance(optimizer.param_groups[0]["lr"], torch.Tensor):
                optimizer.param_groups[0]["lr"].fill_(1e-2 / (number + 1))
            step()
            optimizer.zero_grad()
        state = [v for p in owned[:-1] for v in optimizer.state[p].values()]
        found = optimizer.diagnostics()
        ends.append([t.detach().clone() for t in (*owned, *state)] + [found.status, found.scale])
        assert found.names == ["pair 0", "pair 1", "moe[0]", "moe[1]"]
    assert len(ends[0]) == len(ends[1])
    assert all(torch.equal(eager.nan_to_num(7.0), compiled.nan_to_num(7.0)) for eager, compiled in zip(*ends))


def test_a_compiled_lone_gradient_of_InvariantAdamW():
    """AdamW's second moments appear and go between traces, as they do without them."""
    ends, start = [], leaf_pairs(SHAPES, torch.float32)
    for compiled in (False, True):
        pairs = clones(start)
        optimizer = InvariantAdamW(pairs, lr=1e-2)
        generator, kept = torch.Generator().manual_seed(1), []
        for number in range(4):
            random_grads(factors(pairs), generator)
            if number in (1, 2):
                pairs[0][0].grad = None
            torch._dynamo.reset()
            step = torch.compile(lambda: optimizer.step(), fullgraph=True, backend="aot_eager")  # noqa: B023
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                (step if compiled else optimizer.step)()
            kept += [t.detach().clone() for t in factors(pairs)]
            kept += [t.clone() for own in optimizer.state.values() for _, t in sorted(own.items())]
        ends.append(kept)
    assert len(ends[0]) == len(ends[1]) and all(torch.equal(x, y) for x, y in zip(*ends))


@torch._dynamo.config.patch(error_on_recompile=False)
def test_options_that_are_written_after_a_trace_are_followed():
    ends, start = [], leaf_pairs(SHAPES, torch.float32)
    for compiled in (False, True):
        pairs = clones(start)
        optimizer = InvariantAdamW(pairs, lr=1e-2)
        step = torch.compile(lambda: optimizer.step(), fullgraph=True, backend="aot_eager")  # noqa: B023
        generator = torch.Generator().manual_seed(1)
        for written in ({}, {"metric": "identity"}, {"damping": 0.5, "backend": "torch"}):
            for name, value in written.items():
                setattr(optimizer, name, value)
            random_grads(factors(pairs), generator)
            (step if compiled else optimizer.step)()
        ends.append([t.detach() for t in factors(pairs)])
    assert all(torch.equal(x, y) for x, y in zip(*ends))


@torch._dynamo.config.patch(error_on_recompile=False)
@pytest.mark.parametrize("steps", [0, 1])
def test_a_backend_that_is_written_and_refused_is_refused_again(steps):
    """With the graph run as it is: later steps crashed, or did nothing."""
    pairs = leaf_pairs(SHAPES, torch.float32)
    optimizer = InvariantAdamW(pairs, backend="torch")
    step = torch.compile(lambda: optimizer.step(), fullgraph=True, backend="eager")
    random_grads(factors(pairs), torch.Generator().manual_seed(1))
    for _ in range(steps):
        step()
    optimizer.backend = "triton"
    for _ in range(2):
        with unchanged(of=optimizer), pytest.raises(Exception, match="backend 'triton': expected"):
            step()
        assert bool(optimizer.state) == bool(steps)
    optimizer.backend = "torch"
    before = [t.detach().clone() for t in factors(pairs)]
    step()
    assert not any(torch.equal(t, old) for t, old in zip(factors(pairs), before))


WRITTEN = {"maximize": 1, "betas": (0.9, 0.99, 0.5), "lr": True, "amsgrad": "x", "eps": None, "weight_decay": "0"}


@torch._dynamo.config.patch(error_on_recompile=False)
@pytest.mark.parametrize("name", [*WRITTEN, "stochastic_rounding"])
@pytest.mark.parametrize("cls", [RefLoRAAdamW, InvariantAdamW])
def test_what_is_refused_without_a_trace_is_refused_with_one(cls, name):
    """And no state is made."""
    pairs = leaf_pairs(SHAPES, torch.float32)
    optimizer = cls(pairs)
    step = torch.compile(lambda: optimizer.step(), fullgraph=True, backend="aot_eager")
    random_grads(factors(pairs), torch.Generator().manual_seed(1))
    if name in WRITTEN:
        optimizer.param_groups[0][name] = WRITTEN[name]
    else:
        setattr(optimizer, name, True)
    with unchanged(of=optimizer), pytest.raises(Exception, match=f"{name}: expected"):
        step()
    assert not optimizer.state


@torch._dynamo.config.patch(error_on_recompile=False)
def test_amsgrad_that_is_written_after_a_trace_leaves_plain_parameters_as_they_were():
    pairs, head = leaf_pairs(SHAPES, torch.float32), torch.randn(5, requires_grad=True)
    optimizer = InvariantAdamW([*factors(pairs), head], pairs=pairs)
    step = torch.compile(lambda: optimizer.step(), fullgraph=True, backend="aot_eager")
    random_grads([*factors(pairs), head], torch.Generator().manual_seed(1))
    step()
    optimizer.param_groups[0]["amsgrad"] = True
    kept = set(optimizer.state[head])
    with unchanged(of=optimizer), pytest.raises(Exception, match="amsgrad: expected False in a group with LoRA"):
        step()
    assert set(optimizer.state[head]) == kept


@needs_compiler
def test_a_compiled_training_step():
    """Forward, backward and step in one function: no error, and no recompilation from one step to the next."""
    pairs = leaf_pairs(SHAPES, torch.float32)
    twins = clones(pairs)
    inputs = [torch.randn(6, A.shape[1]) for A, _ in pairs]
    losses = []
    for own, compile_it in ((pairs, True), (twins, False)):
        optimizer = RefLoRAAdamW(own, lr=1e-2)

        def train():
            optimizer.zero_grad()  # noqa: B023
            loss = sum((x @ A.mT @ B.mT).square().mean() for x, (A, B) in zip(inputs, own))  # noqa: B023
            loss.backward()
            optimizer.step()  # noqa: B023
            return loss.detach()

        run = torch.compile(train) if compile_it else train
        losses.append(torch.stack([run() for _ in range(6)]))
    assert torch.allclose(*losses, rtol=1e-4) and losses[0][-1] < losses[0][0]


def test_eager_and_compiled_steps_in_turns():
    """Without a recompilation, and diagnostics() tells of the last of them."""
    pairs = leaf_pairs(SHAPES, torch.float32)
    optimizer = RefLoRAAdamW(pairs, lr=1e-2)
    step = torch.compile(lambda: optimizer.step(), fullgraph=True)
    generator = torch.Generator().manual_seed(0)
    for number in range(5):
        random_grads(factors(pairs), generator)
        if number == 3:
            pairs[0][0].grad[0, 0] = torch.nan
        (step if number % 2 else optimizer.step)()
        assert optimizer.diagnostics().skipped == int(number == 3)
    assert [float(optimizer.state[A]["step"]) for A, _ in pairs] == [4, 5]


def test_compiled_steps_after_a_change_of_dtype():
    """The state that the optimizer shows is the state that the step writes."""
    pairs = leaf_pairs(SHAPES, torch.float32)
    optimizer = RefLoRAAdamW(pairs, lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    random_grads(factors(pairs), generator)
    optimizer.step()
    for t in factors(pairs):
        t.grad, t.data = None, t.data.double()
    with torch._dynamo.config.patch(error_on_recompile=False):
        step = torch.compile(lambda: optimizer.step(), fullgraph=True)
        for _ in range(2):
            before = optimizer.state[pairs[0][0]].get("exp_avg").clone()
            random_grads(factors(pairs), generator)
            step()
            now = optimizer.state[pairs[0][0]]["exp_avg"]
            assert now.dtype == torch.float64 and not torch.equal(now, before.double())


@pytest.mark.parametrize("compiled", [False, True])
def test_invalidate_reaches_the_next_step(compiled):
    """A write through .data is seen then, though Grams are carried; without, an eager step misses it.

    A compiled step carries none: what its graph writes back counts as a write of somebody else.
    """
    ends = []
    for carry, told in ((False, False), (True, True), (True, False)):
        torch.manual_seed(0)
        torch._dynamo.reset()
        pairs = leaf_pairs(SHAPES, torch.float32)
        optimizer = RefLoRAAdamW(pairs, lr=1e-2, carry_grams=carry)
        step = torch.compile(lambda: optimizer.step(), fullgraph=True) if compiled else optimizer.step  # noqa: B023
        generator = torch.Generator().manual_seed(0)
        for number in range(4):
            random_grads(factors(pairs), generator)
            if number == 3:
                pairs[0][1].data.mul_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
                if told:
                    optimizer.invalidate()
            step()
        ends.append([t.detach().clone() for t in factors(pairs)])
    fresh, invalidated, unseen = ends
    assert all(map(torch.equal, fresh, invalidated))
    assert all(map(torch.equal, fresh, unseen)) == compiled


@pytest.mark.parametrize("options", [{"warmup_steps": 0}, {}, {"interval": 2, "warmup_steps": 1}], ids=str)
@pytest.mark.parametrize("frozen", [0, 1], ids="AB")
@pytest.mark.filterwarnings("ignore:.*only one factor")
def test_a_factor_that_is_frozen_for_a_while(frozen, options):
    """Its moments are moved to other units with its partner's, and are still there when it is trained again."""
    start, ends = leaf_pairs(SHAPES, torch.float32), []
    for compiled in (False, True):
        pairs = clones(start)
        optimizer = RefLoRAAdamW(pairs, lr=1e-2, **options)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        generator = torch.Generator().manual_seed(1)
        with torch._dynamo.config.patch(error_on_recompile=False):
            for number in range(8):
                random_grads(factors(pairs), generator)
                held = pairs[0][frozen].requires_grad_(number not in (3, 4))
                held.grad = held.grad if held.requires_grad else None
                step()
        ends.append([*factors(pairs), *(v for p in factors(pairs) for v in optimizer.state[p].values())])
    assert all(map(torch.equal, *ends))


def test_state_that_does_not_fit_is_refused_before_any_is_made():
    pairs, W = leaf_pairs(SHAPES, torch.float32), torch.nn.Parameter(torch.randn(5))
    optimizer = RefLoRAAdamW([*factors(pairs), W], pairs=pairs)
    optimizer.state[W] = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(5)}
    random_grads([*factors(pairs), W], torch.Generator().manual_seed(0))
    with pytest.raises(torch._dynamo.exc.InternalTorchDynamoError, match="state 'exp_avg': expected .5,., got .3,."):
        torch.compile(optimizer.step, backend="eager")()
    assert list(optimizer.state) == [W]


@pytest.mark.parametrize("scalar", [False, True])
def test_compiled_functions(fast_backend, scalar):
    pairs = leaf_pairs(SHAPES, torch.float64)
    twins = clones(pairs)
    grads = [tuple(torch.randn_like(t) for t in pair) for pair in pairs]
    copies = [tuple(t.clone() for t in sides) for sides in grads]
    grads[1] = copies[1] = (None, None)

    @torch.compile(fullgraph=True)
    def both(pairs, grads):
        first = reflora.precondition_(pairs, grads, scalar, fast_backend)
        with torch.no_grad():
            return first, reflora.refactor_([LoRAPair("x", *pair) for pair in pairs], scalar, fast_backend)

    for _ in range(2):
        found = both(pairs, grads)
        wanted = reflora.precondition_(twins, copies, scalar, fast_backend), None
        with torch.no_grad():
            wanted = wanted[0], reflora.refactor_(twins, scalar, fast_backend)
        for got, want in zip(found, wanted):
            assert got.status.tolist() == want.status.tolist()
            assert torch.allclose(got.scale, want.scale, equal_nan=True)
        assert found[0].status.tolist()[1] == PLAIN and found[1].names == ["x", "x"]
        assert all(torch.equal(a, b) for a, b in zip(factors(pairs), factors(twins)))
        assert all(torch.equal(a, b) for a, b in zip(grads[0], copies[0]))


def step_arguments(pairs, **options):
    """What a graph hands to the operator, of an optimizer that is gone afterwards."""
    optimizer = RefLoRAAdamW(pairs, lr=1e-2, **options)
    optimizer._init_group()
    params, grads = [t.detach() for t in factors(pairs)], [t.grad for t in factors(pairs)]
    state = [optimizer.state[p][name] for p, names in zip(factors(pairs), optimizer._state_names) for name in names]
    hypers = [1e-2, 0.9, 0.999, 1e-8, 0.01, 0.0, 0.0]
    graded, results = list(range(len(params))), empty_results(optimizer.pairs)
    return params, grads, graded, state, results, hypers, [], [], None, None, optimizer._described


def test_the_operator_needs_no_optimizer():
    pairs = leaf_pairs(SHAPES, torch.float32)
    random_grads(factors(pairs), torch.Generator().manual_seed(0))
    twins = clones(pairs)
    arguments, eager = step_arguments(pairs), RefLoRAAdamW(twins, lr=1e-2)
    for _ in range(2):
        for own, other in zip(factors(twins), factors(pairs)):
            own.grad = other.grad
        torch.ops.reflora.adamw_(*arguments)
        eager.step()
        assert all(torch.equal(x, y) for x, y in zip(factors(pairs), factors(twins)))
    assert arguments[4][:, 0].tolist() == eager.diagnostics().status.tolist()


def test_nothing_is_kept_of_a_compiled_step_that_is_gone():
    """Engines live no longer than the table of results that they are kept under."""
    pairs = leaf_pairs(SHAPES, torch.float32)
    random_grads(factors(pairs), torch.Generator().manual_seed(0))
    arguments = step_arguments(pairs)
    torch.ops.reflora.adamw_(*arguments)
    seen = weakref.ref(arguments[3][0])
    assert seen() is not None
    del arguments
    gc.collect()
    assert seen() is None


def operator_cases():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    tensors = [draw(4, 20), draw(12, 4), draw(6, 9), draw(7, 6)]
    grads = [torch.randn_like(t) for t in tensors]
    ops = torch.ops.reflora
    yield ops.refactor_, (tensors, "linear;experts(2)", False, "", "float64")
    yield ops.precondition_, (tensors, grads, [0, 1], "linear;experts(2)", False, "cpp", "float32")
    pairs = [tuple(t.requires_grad_() for t in (draw(4, 20), draw(12, 4)))]
    random_grads(factors(pairs), generator)
    yield ops.adamw_, step_arguments(pairs, interval=2)


def test_operators():
    """Schemas, fake implementations and mutations are what torch.library asks for."""
    for operator, args in operator_cases():
        torch.library.opcheck(operator, args)


def test_a_compiled_step_that_fails_leaves_autograd_on(monkeypatch):
    """Who catches an out-of-memory error goes on training."""
    pairs = leaf_pairs([(4, 30, 21)])
    optimizer = RefLoRAAdamW(pairs, lr=1e-2)
    random_grads(factors(pairs), torch.Generator().manual_seed(0))
    step = torch.compile(optimizer.step, backend="eager")
    step()

    def fails(*args):
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(AdamWEngine, "step", fails)
        with pytest.raises(MemoryError):
            step()
    assert torch.is_grad_enabled()
    step()
