"""Tensor parallelism under FSDP2 and Megatron's splits: two processes, or four, train as one does."""

from __future__ import annotations

from typing import Any

import pytest
import split_cases as cases
import torch
from test_distributed import assert_close, both, results
from two_processes import Case

pytestmark = pytest.mark.xdist_group("two processes")
OF_FOUR = (cases.meshes, cases.one_dimension, cases.megatron_splits)


def each(case: Case) -> list[Any]:
    """What two processes made of a case, and what four did."""
    found = both(case) + results(OF_FOUR, 4)[case.__name__]
    for one in found:
        if isinstance(one, AssertionError):
            raise one
    return found


@pytest.mark.parametrize("name", cases.WAYS)
def test_tensor_parallelism_under_fsdp2(name: str) -> None:
    """Meshes of which one dimension cuts, the other or both; a factor may be cut twice along one side."""
    alone, seen = cases.alone(name), set()
    for found in each(cases.meshes):
        for key in (key for key in found if key.endswith(f" {name}")):
            assert_close(found[key], alone)
            seen.add(key.split(",")[0])
    assert seen == {"1 x 2", "2 x 1", "2 x 2"}


@pytest.mark.parametrize("name", cases.WAYS)
def test_a_mesh_of_which_one_dimension_cuts(name: str) -> None:
    """And a gradient that is still to be summed."""
    wanted = cases.one_dimension_alone(name)
    for found in each(cases.one_dimension):
        assert_close(found[name], wanted)


@pytest.mark.parametrize("name", cases.WAYS)
def test_megatrons_splits(name: str) -> None:
    """PEFT's layers over a stand-in for Megatron's; in four processes there are two groups of tensor parallelism."""
    alone = cases.alone(name, torch.float32)
    for found in each(cases.megatron_splits):
        assert found["cut"] == {"up.default": (None, 0, True), "down.default": (1, None, True)}
        assert_close(found[name], alone, rtol=1e-5, atol=2e-6)


def test_the_refactorer_over_megatrons_splits() -> None:
    alone = cases.refactored_alone()
    for found in both(cases.megatron_splits):
        assert_close(found["Refactorer"], alone, rtol=1e-5, atol=2e-6)


def test_a_gradient_that_is_not_finite_in_one_part_of_megatrons() -> None:
    for found in both(cases.megatron_splits):
        assert found["skipped"] == (1, True)


def test_what_would_take_megatrons_part_for_the_whole_is_refused() -> None:
    for found in both(cases.megatron_splits):
        said = found["refused"]
        for name in ("RefLoRAAdamW", "InvariantAdamW", "refactor_", "precondition_"):
            assert "held whole by this process, got a part that Megatron split off" in said[name]
            assert "create_reflora_optimizer" in said[name]
        assert "holds whole, got a part that Megatron split off" in said["GradientHooks"]
        assert "expected a model that is not sharded" in said["RiemannianAdamW"]
        assert "refactoring sharded factors: expected scalar=True" in said["Refactorer"]


def test_splits_of_megatrons_that_cannot_be_summed_are_refused() -> None:
    for found in both(cases.megatron_splits):
        said = found["asked"]
        assert "expected the group of megatron.core.parallel_state, got import of" in said["no Megatron"]
        assert "group is not initialized. Import and initialise Megatron" in said["not initialised"]
        assert "expected a factor that Megatron splits along dimension 0, got 1" in said["along r"]
        assert "got one of expert layers" in said["experts"]
        assert "ColumnParallelLinear factors" in said["without marks"]
