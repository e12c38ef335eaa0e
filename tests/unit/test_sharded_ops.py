"""The operations on sharded pairs, over pairs that one process holds whole: what they make is what PairOps makes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernel_cases import degenerate_pairs, pair, randn

import reflora
from reflora import LoRAPair
from reflora.constants import START_STEPS
from reflora.optim.pairs import PairOps
from reflora.optim.sharded import ShardedOps

DOUBLE = torch.float64


def pairs_of() -> list[LoRAPair]:
    """Every way to lose rank, at both sides, and sound pairs beside them."""
    found = [one for _, one, *_ in degenerate_pairs()]
    found += [
        pair(5),
        LoRAPair("zero A", 0 * randn(4, 30), randn(20, 4)),
        LoRAPair("n_out < r", randn(6, 20), randn(3, 6)),
        LoRAPair("one column", randn(3, 1), randn(20, 3)),
        LoRAPair("experts", randn(2, 3, 20), torch.stack([randn(21, 3), 0 * randn(21, 3)], 2), "experts(2)"),
    ]
    return [LoRAPair(one.name, one.A.to(DOUBLE), one.B.to(DOUBLE), one.layout) for one in found]


@pytest.mark.parametrize("count", [None, 0, 50, 5000])
def test_singular_pairs_are_solved_as_they_are_when_held_whole(count: int | None) -> None:
    pairs = pairs_of()
    whole, sharded = PairOps(pairs, "torch"), ShardedOps(pairs, "torch")
    counts = None if count is None else {i: torch.full((p.experts,), float(count)) for i, p in enumerate(pairs)}
    wanted, found = (ops.solve(range(len(pairs)), counts) for ops in (whole, sharded))
    for (i, one), (_, other) in zip(whole.outcome().items(), sharded.outcome().items()):
        assert torch.equal(one.status, other.status), (pairs[i], one.status, other.status)
        torch.testing.assert_close(other.scale, one.scale, rtol=1e-9, atol=0)
        if (one.status < 2).all():
            torch.testing.assert_close(found[i], wanted[i], rtol=1e-5, atol=1e-9)
    assert all(torch.equal(a, b) for a, b in zip(whole.started().values(), sharded.started().values()))


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
def test_refloras_of_fewer_columns_than_ranks_is_balanced(dtype: torch.dtype) -> None:
    """It needs norms alone; a Gram that is singular was taken for one that is not finite."""
    A, B = randn(6, 20, dtype=dtype), 9 * randn(3, 6, dtype=dtype)
    root = ShardedOps([LoRAPair("", A, B)], "torch").refactor([True], scalar=True)[0]
    assert float(root) == pytest.approx(float((B.norm() * root) / (A.norm() / root)) ** 0.5, rel=1e-5)
    assert float(A.norm()) == pytest.approx(float(B.norm()), rel=1e-5)


def test_the_start_is_counted_from_where_both_factors_are_there() -> None:
    pairs = pairs_of()
    ops = ShardedOps(pairs, "torch")
    ops.solve(range(len(pairs)), {i: torch.full((p.experts,), float(START_STEPS)) for i, p in enumerate(pairs)})
    flags = {p.name: ops.started()[i].tolist() for i, p in enumerate(pairs)}
    assert flags["zero A"] == [0] and flags["n_out < r"] == [1] and flags["experts"] == [1, 0]


@pytest.mark.filterwarnings("ignore:Dynamo does not know")
@pytest.mark.parametrize("call", [reflora.refactor_, reflora.precondition_])
def test_a_graph_refuses_what_megatron_has_split(call: Callable[..., object]) -> None:
    """An operator is given tensors without the mark."""
    A, B = (torch.nn.Parameter(randn(*shape)) for shape in ((3, 8), (6, 3)))
    A.grad, B.grad = torch.ones_like(A), torch.ones_like(B)
    compiled = torch.compile(lambda: call([(A, B)]), backend="eager", fullgraph=True)
    compiled()
    B.tensor_model_parallel, B.partition_dim = True, 0  # type: ignore[attr-defined]
    torch.compiler.reset()
    with pytest.raises(Exception, match="held whole by this process"):
        compiled()
