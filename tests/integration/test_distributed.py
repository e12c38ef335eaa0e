"""Two processes train as one does: DDP and FSDP2 on gloo."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import distributed_cases as cases
import parallel_cases
import pytest
import split_cases
import torch
import whitened_cases
from torch import Tensor
from two_processes import Case, together

# one worker makes both processes, once
pytestmark = pytest.mark.xdist_group("two processes")
# with those of test_parallel.py and test_examples.py
CASES = (
    cases.ddp, cases.fsdp2, cases.fsdp2_checkpoint, whitened_cases.fsdp2_invariant, cases.fsdp2_refusals,
    cases.fsdp2_refactorer, cases.fsdp2_after_the_optimizer, cases.fsdp1, cases.fsdp2_hard_shapes,
    parallel_cases.zero_redundancy, parallel_cases.tensor_parallel, parallel_cases.pipeline, split_cases.meshes,
    split_cases.one_dimension, split_cases.megatron_splits, cases.accelerated,
    *([cases.deepspeed] if importlib.util.find_spec("deepspeed") else []), cases.example,
)  # fmt: skip
results = functools.cache(together)
assert_close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)


def both(case: Case) -> list[Any]:
    """What the two processes made of a case; all of them are run at the first question."""
    found = results(CASES)[case.__name__]
    for one in found:
        if isinstance(one, AssertionError):
            raise one
    return found


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Tensor]]:
    return {variant: cases.alone(variant) for variant in cases.VARIANTS}


def test_ddp(alone: dict[str, dict[str, Tensor]]) -> None:
    one, other = both(cases.ddp)
    for variant, wanted in alone.items():
        assert_close(one[variant], wanted)
        cases.assert_equal(one[variant], other[variant])


def test_fsdp2(alone: dict[str, dict[str, Tensor]]) -> None:
    one, other = both(cases.fsdp2)
    for variant, wanted in alone.items():
        for how in ("along r", "along n"):
            assert_close(one[f"{variant}, {how}"], wanted)
            assert_close(other[f"{variant}, {how}"], wanted)
    names, refactored, condition = one["report"]
    assert len(names) == refactored == 3 and 1 < condition < 1e6
    dims = one["placements"]
    # 10 and 12 columns are shared out by two; the embedding's 11 are left to FSDP2
    assert {dims[name][0] for name in dims if ".lora_A." in name} == {1}
    assert {dims[name][0] for name in dims if "embedding" in name or ".lora_B." in name} == {0}


def test_fsdp2_through_a_distributed_checkpoint() -> None:
    for found in both(cases.fsdp2_checkpoint):
        for whole, resumed in found.values():
            cases.assert_equal(resumed, whole)


@pytest.mark.filterwarnings("ignore:.*stepped without RefLoRA")
def test_fsdp2_with_second_moments_of_adamw() -> None:
    """Loaded, and of a factor whose partner has no gradient; what does not belong to it is refused."""
    wanted = whitened_cases.loaded_and_lone(cases.build(False))
    by_mean = whitened_cases.loaded_and_lone(cases.build(False), moments="momentum")
    for found in both(whitened_cases.fsdp2_invariant):
        for how in ("along r", "along n"):
            assert_close(found[how], wanted)
            assert_close(found[f"momentum, {how}"], by_mean)
        assert found["untouched"]
        assert "means of the gradients themselves" in found["refloras state"]
        assert "expected AdamW's, got InvariantAdamW's, with exp_avg_gram" in found["its own"]
        assert "expected exp_avg_gram, a mean of Grams" in found["momentum's"]
        assert "amsgrad: expected False" in found["amsgrad"] and "amsgrad: expected False" in found["written amsgrad"]


def test_what_cannot_serve_sharded_factors_says_what_can() -> None:
    for found in both(cases.fsdp2_refusals):
        for name in ("RefLoRAAdamW", "InvariantAdamW", "refactor_"):
            assert "held whole by this process, got DTensor" in found[name]
            assert "create_reflora_optimizer" in found[name]
        for name in ("options", "options of InvariantAdamW"):
            assert "none of the fused step's own options, got carry_grams" in found[name]
        assert "expected a model that is not sharded, got one that is" in found["RiemannianAdamW"]
        assert "not cut across experts" in found["experts"] and "shard_placement" in found["experts"]
        assert "sharded expert factors of two dimensions" in found["stacked experts"]
        assert found["skipped"] == "1" and found["unchanged"] == "True"


def test_the_refactorer_leaves_a_sharded_layer_alone_whose_gradient_is_not_finite() -> None:
    for found in both(cases.fsdp2_refactorer):
        assert found["changed"] == [False, True, True]


def test_fsdp2_of_a_model_whose_optimizer_exists(alone: dict[str, dict[str, Tensor]]) -> None:
    for found in both(cases.fsdp2_after_the_optimizer):
        assert_close(found, alone["full"])


def test_accelerate_accumulates_and_clips() -> None:
    wanted = cases.accumulated_alone(0.1)
    for found in both(cases.accelerated):
        assert_close(found, wanted)


@pytest.mark.skipif(cases.deepspeed not in CASES, reason="no deepspeed")
def test_deepspeed() -> None:
    """ZeRO-1 and 2 step as one process does; what cannot is refused."""
    wanted = cases.accumulated_alone(None, torch.float32, eps=1e-30)
    for found in both(cases.deepspeed):
        for stage in (1, 2):
            assert_close(found[f"stage {stage}"], wanted, rtol=1e-4, atol=1e-6)
        assert "ZeRO-3 takes them away" in found["ZeRO-3"]
        assert "DeepSpeed: reflora.GradientHooks" in found["RefLoRAAdamW"]


def test_fsdp1_is_refused() -> None:
    for found in both(cases.fsdp1):
        assert len(found) == 3
        assert all("FSDP2" in said for said in found.values()), found


def test_fsdp2_where_a_process_holds_nothing() -> None:
    for found in both(cases.fsdp2_hard_shapes):
        assert found == {"full": True, "scalar": True, "skipped": 1, "resumed": True}
