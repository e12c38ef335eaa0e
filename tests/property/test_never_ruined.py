"""What can happen to a long run: a gradient gone bad, a kill at any moment, threads and forks. It ends as it should."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import OPTIMIZERS, backward, clones, factors, leaf_pairs, targets

import reflora
from reflora import RefLoRAAdamW
from reflora.columns import SKIPPED

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


# ---- a gradient that is not finite


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_bad_layer_of_a_hundred(fast_backend: str, name: str, value: float) -> None:
    """The run ends, bit for bit, as if that layer had not taken part in that step; the others go on."""
    pairs = leaf_pairs([(3, 12, 9)] * 100, torch.float32)
    goals = targets(pairs)
    generator = random.Random(7)
    bad = {generator.randrange(20): generator.randrange(100) for _ in range(3)}
    ends, losses = [], []
    for spoilt in (True, False):
        own = clones(pairs)
        optimizer: Any = OPTIMIZERS[name](own, lr=1e-2, backend=fast_backend)
        for step in range(20):
            backward(own, goals)
            if step in bad:
                A, B = own[bad[step]]
                if spoilt:
                    (A if step % 2 else B).grad.view(-1)[5] = value
                else:
                    A.grad = B.grad = None
            optimizer.step()
            if spoilt and step in bad:
                report = optimizer.diagnostics()
                assert report.skipped == 1 and report.status[bad[step]] == SKIPPED
        ends.append([t.detach().clone() for t in factors(own)])
        losses.append(backward(own, goals))
    assert all(map(torch.equal, *ends)) and losses[0] == losses[1]


def test_one_bad_layer_under_a_wrapped_optimizer() -> None:
    """A wrapper skips the whole step, and the run ends as if that step had not been."""
    pairs = leaf_pairs([(3, 12, 9)] * 20, torch.float32)
    goals = targets(pairs)
    ends = []
    for spoilt in (True, False):
        own = clones(pairs)
        optimizer = reflora.wrap(torch.optim.NAdam)(factors(own), pairs=own, lr=1e-2)  # type: ignore[call-arg]
        for step in range(12):
            if step == 5 and not spoilt:
                continue
            backward(own, goals)
            if step == 5:
                own[11][0].grad[0, 0] = torch.nan
            optimizer.step()
        ends.append([t.detach().clone() for t in factors(own)])
        assert optimizer.skipped_steps == int(spoilt)  # type: ignore[attr-defined]
    assert all(map(torch.equal, *ends))


# ---- a kill


def _train(folder: Path, steps: int, pause: float) -> list[Tensor]:
    """A run that keeps itself after every step, and goes on from what it finds. Written beside, then moved."""
    torch.set_num_threads(1)
    torch.manual_seed(3)
    pairs = leaf_pairs([(4, 20, 15), (2, 9, 30)], torch.float32)
    goals = targets(pairs)
    optimizer = RefLoRAAdamW(pairs, lr=1e-2, interval=2, warmup_steps=2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))
    kept = folder / "checkpoint.pt"
    start = 0
    if kept.exists():
        found = torch.load(kept, weights_only=True)
        start = found["step"]
        for parameter, value in zip(factors(pairs), found["weights"]):
            parameter.data.copy_(value)
        optimizer.load_state_dict(found["optimizer"])
        schedule.load_state_dict(found["schedule"])
    for step in range(start, steps):
        backward(pairs, goals)
        optimizer.step()
        schedule.step()
        content = {
            "step": step + 1, "weights": [t.detach() for t in factors(pairs)], "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
        }  # fmt: skip
        new = folder / f"new-{os.getpid()}.pt"
        torch.save(content, new)
        new.replace(kept)
        time.sleep(pause)
    return [t.detach().clone() for t in factors(pairs)]


@needs_fork
def test_killed_at_twenty_random_moments(tmp_path: Path) -> None:
    """SIGKILL: nothing is tidied up. Resumed from the last checkpoint, it ends bit-equal to the run never killed."""
    steps, kills = 300, 0
    undisturbed, folder = tmp_path / "whole", tmp_path / "killed"
    undisturbed.mkdir()
    folder.mkdir()
    whole = _train(undisturbed, steps, 0.0)
    moments = random.Random(11)
    while kills < 20:
        child = os.fork()
        if child == 0:
            try:
                _train(folder, steps, 0.01)  # of all kills together 240 steps at most, whatever the machine
            finally:
                os._exit(0)
        time.sleep(0.02 + 0.1 * moments.random())
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the run was over before it was killed"
        kills += 1
    assert 0 < torch.load(folder / "checkpoint.pt", weights_only=True)["step"] < steps
    resumed = _train(folder, steps, 0.0)
    assert all(map(torch.equal, whole, resumed))


# ---- threads and processes


def test_two_optimizers_in_two_threads(fast_backend: str) -> None:
    """No state leaks from one to the other: each ends as it does alone."""
    problems = [leaf_pairs([(r, 40, 30)] * 12, torch.float32) for r in (4, 7)]
    goals = [targets(pairs) for pairs in problems]

    def run(which: int, ends: dict[int, list[Tensor]]) -> None:
        own = clones(problems[which])
        optimizer = RefLoRAAdamW(own, lr=1e-2, backend=fast_backend)
        for _ in range(40):
            backward(own, goals[which])
            optimizer.step()
        ends[which] = [t.detach().clone() for t in factors(own)]

    alone: dict[int, list[Tensor]] = {}
    for which in (0, 1):
        run(which, alone)
    together: dict[int, list[Tensor]] = {}
    threads = [threading.Thread(target=run, args=(which, together)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert all(all(map(torch.equal, alone[which], together[which])) for which in (0, 1))


def _sum(pairs: list[tuple[Tensor, Tensor]]) -> float:
    return float(sum(t.detach().double().sum() for t in factors(pairs)))


@needs_fork
def test_children_of_a_fork_after_a_step_do_as_the_parent(fast_backend: str) -> None:
    """Two threads, a step, a fork: the child steps on, in its own memory, and neither waits for the other's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        pairs = leaf_pairs([(8, 120, 90)] * 8, torch.float32)
        optimizer = RefLoRAAdamW(pairs, lr=1e-2, backend=fast_backend)
        for t in factors(pairs):
            t.grad = torch.ones_like(t)
        optimizer.step()
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            if fast_backend == "torch":
                torch.set_num_threads(1)  # torch's own pool is not safe to use after a fork, the core's is
            optimizer.step()
            os.write(write, str(_sum(pairs)).encode())
            os._exit(0)
        optimizer.step()
        deadline = time.monotonic() + 60
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                pytest.fail("the child hangs")
            time.sleep(0.02)
        assert float(os.read(read, 100)) == pytest.approx(_sum(pairs), rel=1e-12)
    finally:
        torch.set_num_threads(threads)


# ---- determinism


def test_same_seed_same_bits_whatever_the_threads() -> None:
    """On the C++ backend; torch's own matmul sums in another order with another number of threads."""
    if "cpp" not in reflora.RefLoRAAdamW(leaf_pairs([(2, 3, 3)])).backends.values():
        pytest.skip("no C++ core")
    before = torch.get_num_threads()
    pairs = leaf_pairs([(8, 300, 200), (16, 100, 400), (3, 7, 5)] * 4, torch.float32)
    ends = []
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            own = clones(pairs)
            optimizer = RefLoRAAdamW(own, lr=1e-2, backend="cpp")
            generator = torch.Generator().manual_seed(5)
            for _ in range(10):
                for t in factors(own):
                    t.grad = torch.randn(t.shape, generator=generator)
                optimizer.step()
            ends.append([t.detach().clone() for t in factors(own)])
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, ends[0], ends[1])) and all(map(torch.equal, ends[0], ends[2]))


def test_nothing_is_kept_of_an_optimizer_that_is_gone() -> None:
    """No global table holds parameters or state."""
    import gc
    import weakref

    model = nn.ParameterList(t for pair in leaf_pairs([(2, 30, 20)] * 3, torch.float32) for t in pair)
    optimizer = RefLoRAAdamW(list(zip(model[::2], model[1::2])))
    for t in model:
        t.grad = torch.ones_like(t)
    optimizer.step()
    seen = [weakref.ref(optimizer), weakref.ref(optimizer.state[model[0]]["exp_avg"])]
    del optimizer
    gc.collect()
    assert all(one() is None for one in seen)
