"""Tensor and pipeline parallelism, and ZeroRedundancyOptimizer: processes train as one does, or say what would."""

from __future__ import annotations

import parallel_cases as cases
import pytest
import torch
from test_distributed import assert_close, both
from tiny_models import needs_its_kernels

import reflora

# by layer, whether A and whether B is cut
CUT = {"q_proj": [False, True], "v_proj": [False, True], "o_proj": [True, False], "down_proj": [True, False]}
pytestmark = pytest.mark.xdist_group("two processes")


@pytest.mark.parametrize("name", cases.TENSOR_PARALLEL)
def test_tensor_parallel(name: str) -> None:
    """`tp_plan="auto"` cuts B of column-parallel layers, A of row-parallel ones; the steps are the whole model's."""
    needs_its_kernels()
    cls, options = cases.TENSOR_PARALLEL[name]
    model = cases.causal()
    start = cases.trained(model)
    optimizer = reflora.create_reflora_optimizer(model, cls or reflora.RefLoRAAdamW, lr=1e-2, **options)
    alone = cases.train_causal(model, optimizer)
    for found in both(cases.tensor_parallel):
        assert {path.split(".")[-2]: cut for path, cut in found["cut"].items()} == CUT
        assert_close(found[name], alone, rtol=2e-4, atol=2e-6)
        assert all(float((found[name][key] - start[key]).abs().max()) > 1e-3 for key in start)


def test_tensor_parallel_is_refused_where_it_cannot_be_served() -> None:
    needs_its_kernels()
    for found in both(cases.tensor_parallel):
        for said in found["refused"].values():
            assert "DTensor" in said and "reflora.create_reflora_optimizer" in said
        assert found["skipped"] == (1, True)  # a bad gradient in one process is so in both


def test_zero_redundancy_optimizer() -> None:
    alone = cases.train_hooked(cases.build("gaussian"), torch.optim.AdamW)
    for found in both(cases.zero_redundancy):
        assert_close(found["hooks"], alone)


def test_zero_redundancy_optimizer_around_reflora_is_refused() -> None:
    for found in both(cases.zero_redundancy):
        for name in ("wrap", "RefLoRAAdamW"):
            said = " ".join(found[name])
            assert "one factor" in said or "both factors" in said
            assert "reflora.GradientHooks" in said and all(len(one) < 300 for one in found[name])


@pytest.mark.parametrize("name", cases.PIPELINES)
def test_pipeline_stages(name: str) -> None:
    """Each process steps its own stage; together the step of the whole network over all microbatches."""
    for found, alone in zip(both(cases.pipeline), cases.pipeline_alone(name)):
        assert_close(found[name], alone)
