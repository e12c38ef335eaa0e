"""The fused step on a CUDA device: launches, memory, CUDA graphs, torch.compile, and the same bits every time."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from reflora import InvariantAdamW, RefLoRAAdamW, RiemannianAdamW, precondition_, refactor_
from reflora.kernels import routes

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
DEBERTA = ([(768, 768)] * 4 + [(768, 3072), (3072, 768)]) * 12
LLAMA = ([(4096, 4096)] * 3 + [(4096, 11008), (11008, 4096)]) * 32


def leaf_pairs(shapes, r, dtype=torch.float32, seed=0):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, device=DEVICE).to(dtype)  # noqa: E731
    return [
        (draw(r, n_in).div_(n_in**0.5).requires_grad_(), draw(n_out, r).mul_(0.02).requires_grad_())
        for n_in, n_out in shapes
    ]


def factors(pairs):
    return [t for pair in pairs for t in pair]


def set_grads(tensors, seed):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    for t in tensors:
        grad = torch.randn(t.shape, generator=generator, device=DEVICE).to(t.dtype)
        if t.grad is None:
            t.grad = grad
        else:
            t.grad.copy_(grad)


def everything(optimizer, tensors):
    return [t.detach().clone() for t in tensors] + [v.clone() for t in tensors for v in optimizer.state[t].values()]


def launches(run):
    """(kernels, copies from the device to the host) of `run()`, which has been compiled by a call before."""
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        run()
        torch.cuda.synchronize()
    on_device = [event for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    names = [event.name for event in on_device if not event.is_user_annotation]
    copies = [name for name in names if name.startswith(("Memcpy", "Memset"))]
    return [name for name in names if name not in copies], [name for name in copies if "DtoH" in name]


def test_one_launch_for_all_layers():
    pairs = leaf_pairs(LLAMA, 32)
    grads = [(torch.randn_like(A), torch.randn_like(B)) for A, B in pairs]
    assert len(pairs) == 160
    for run in (lambda: precondition_(pairs, grads), lambda: refactor_([(A.detach(), B.detach()) for A, B in pairs])):
        kernels, copies = launches(run)
        assert len(kernels) == 1 and not copies, kernels


OPTIMIZERS = {
    "RefLoRA": RefLoRAAdamW,
    "RefLoRA, carried": partial(RefLoRAAdamW, carry_grams=True),
    "RefLoRA-S": partial(RefLoRAAdamW, scalar=True),
    "schedule": partial(RefLoRAAdamW, warmup_steps=3, interval=2),
    "RefLoRA-S, interval": partial(RefLoRAAdamW, scalar=True, interval=2),
    "stochastic rounding": partial(RefLoRAAdamW, stochastic_rounding=True, state_dtype=torch.float32),
    "Invariant": InvariantAdamW,
    "Invariant, carried": partial(InvariantAdamW, carry_grams=True),
    "Invariant, momentum": partial(InvariantAdamW, metric="scaled", moments="momentum"),
    "Riemannian": RiemannianAdamW,
}
SOLVED_APART = ("RefLoRA", "RefLoRA, carried", "Riemannian")
MOST = {"RefLoRA-S": 2, "Invariant": 4, "Invariant, carried": 5, "Invariant, momentum": 4}


@pytest.mark.parametrize("r", [8, 32])
@pytest.mark.parametrize("name", [*SOLVED_APART, *MOST])
def test_launches_of_a_step(name, r):
    """From rank 17 on S is solved for in a launch of its own."""
    most = MOST.get(name, 3 if r > 16 else 2)
    pairs = leaf_pairs(LLAMA, r)
    optimizer = OPTIMIZERS[name](pairs, lr=1e-4)
    set_grads(factors(pairs), 0)
    kernels, copies = launches(optimizer.step)
    assert 0 < len(kernels) <= most and not copies, kernels


@pytest.mark.parametrize("shapes, r, megabytes", [(LLAMA, 32, 8), (DEBERTA, 8, 1)])
@pytest.mark.parametrize("carry", [False, True])
def test_memory_beyond_adamw(shapes, r, megabytes, carry):
    def cost(make):
        pairs = leaf_pairs(shapes, r)
        set_grads(factors(pairs), 0)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        optimizer = make(pairs)
        optimizer.step(), optimizer.step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    adamw = cost(lambda pairs: torch.optim.AdamW(factors(pairs), fused=True))
    ours = cost(lambda pairs: RefLoRAAdamW(pairs, carry_grams=carry))
    assert ours - adamw <= megabytes * 2**20


@pytest.mark.parametrize("r", [8, 32, 64, 128])
@pytest.mark.parametrize("name", [*SOLVED_APART, *MOST])
def test_repeated_steps_and_routes_agree_to_the_bit(r, name, monkeypatch):
    shapes = [(1000, 1500), (4096, 333), (70, 50)] * 12
    ends = []
    for route in ("split", "split", "row"):
        monkeypatch.setattr(routes, "forced", route)
        pairs = leaf_pairs(shapes, r)
        optimizer = OPTIMIZERS[name](pairs, lr=1e-3)
        for seed in range(4):
            set_grads(factors(pairs), seed)
            optimizer.step()
        ends.append(everything(optimizer, factors(pairs)))
    for other in ends[1:]:
        assert all(torch.equal(x, y) for x, y in zip(ends[0], other))


@pytest.mark.parametrize("cls", [RefLoRAAdamW, RiemannianAdamW])
def test_carried_grams_change_no_bit(cls):
    ends = []
    for carry in (False, True):
        pairs = leaf_pairs(LLAMA[:5], 32) + leaf_pairs(DEBERTA[:6], 8, torch.bfloat16)
        optimizer = cls(pairs, lr=1e-3, carry_grams=carry, master_weights=True)
        for seed in range(5):
            set_grads(factors(pairs), seed)
            if seed == 2:
                pairs[0][0].grad[1, 5] = torch.nan
            optimizer.step()
        ends.append(everything(optimizer, factors(pairs)))
    assert all(torch.equal(x, y) for x, y in zip(*ends))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_captured_step_replays_to_the_bit(name):
    """Two steps outside the graph, five replays with other gradients and learning rates."""
    ends = []
    dtype = torch.bfloat16 if "stochastic" in name else torch.float32
    for captured in (False, True):
        torch.manual_seed(0)
        pairs = leaf_pairs(DEBERTA[:6], 8, dtype) + leaf_pairs([(300, 200)], 24, dtype)
        head = torch.ones(1000, device=DEVICE, requires_grad=True)
        tensors = [*factors(pairs), head]
        lr = torch.tensor(1e-3, device=DEVICE)
        optimizer = OPTIMIZERS[name](tensors, pairs=pairs, lr=lr)
        run, graph = optimizer.step, torch.cuda.CUDAGraph()
        for number in range(7):
            set_grads(tensors, number)
            lr.fill_(1e-3 / (1 + number))
            if captured and number == 2:
                with torch.cuda.graph(graph):
                    optimizer.step()
                run = graph.replay
            run()
        ends.append(everything(optimizer, tensors))
        assert float(optimizer.state[pairs[0][0]]["step"]) == 7
    assert all(torch.equal(x, y) for x, y in zip(*ends))


def test_a_captured_training_step():
    """Forward, backward and step in one graph: its gradients lie where the graph puts them."""
    ends = []
    for captured in (False, True):
        pairs = leaf_pairs(DEBERTA[:6], 8)
        inputs = [torch.empty(16, A.shape[1], device=DEVICE) for A, _ in pairs]
        optimizer = RefLoRAAdamW(pairs, lr=1e-3)

        def train():
            loss = sum((x @ A.mT @ B.mT - 1).square().mean() for x, (A, B) in zip(inputs, pairs))  # noqa: B023
            optimizer.zero_grad(set_to_none=True)  # noqa: B023
            loss.backward()
            optimizer.step()  # noqa: B023

        def draw(seed):
            generator = torch.Generator(DEVICE).manual_seed(seed)
            for x in inputs:  # noqa: B023
                x.normal_(generator=generator)

        run, graph = train, torch.cuda.CUDAGraph()
        for number in range(8):
            draw(number)
            if captured and number == 3:
                optimizer.zero_grad(set_to_none=True)
                with torch.cuda.graph(graph):
                    train()
                run = graph.replay
            run()
        ends.append(everything(optimizer, factors(pairs)))
    assert all(torch.allclose(x, y, rtol=1e-4, atol=1e-6) for x, y in zip(*ends))


def test_a_step_between_replays_sees_what_they_wrote():
    pairs = leaf_pairs(DEBERTA[:3], 8)
    optimizer = RefLoRAAdamW(pairs, lr=1e-3, carry_grams=True)
    twins = [tuple(t.detach().clone().requires_grad_() for t in pair) for pair in pairs]
    twin = RefLoRAAdamW(twins, lr=1e-3)
    graph = torch.cuda.CUDAGraph()
    for number in range(6):
        set_grads(factors(pairs), number), set_grads(factors(twins), number)
        if number == 2:
            with torch.cuda.graph(graph):
                optimizer.step()
        (graph.replay if number in (2, 4) else optimizer.step)()
        twin.step()
    assert all(torch.equal(x, y) for x, y in zip(factors(pairs), factors(twins)))


def test_a_compiled_step():
    ends = []
    for compiled in (False, True):
        pairs = leaf_pairs(DEBERTA[:6], 8)
        optimizer = RefLoRAAdamW(pairs, lr=torch.tensor(1e-3, device=DEVICE))
        with torch._dynamo.config.patch(error_on_recompile=True):
            step = torch.compile(lambda: optimizer.step(), fullgraph=True) if compiled else optimizer.step  # noqa: B023
            for seed in range(4):
                set_grads(factors(pairs), seed)
                step()
        ends.append(everything(optimizer, factors(pairs)))
    assert all(torch.equal(x, y) for x, y in zip(*ends))


def test_the_host_is_done_long_before_the_device():
    """No wait: a step returns while a long kernel is still running."""
    pairs = leaf_pairs(DEBERTA[:6], 8)
    optimizer = RefLoRAAdamW(pairs, lr=1e-3, carry_grams=True)
    set_grads(factors(pairs), 0)
    optimizer.step(), optimizer.step()
    torch.cuda.synchronize()
    end = torch.cuda.Event()
    torch.cuda._sleep(int(2e9))
    optimizer.step()
    end.record()
    assert not end.query()
    torch.cuda.synchronize()
