"""`benchmarks.kernels profile`: what is read off a trace. The traces themselves need a GPU."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import kernels, profile, roofline

UPDATE = "update_kernel"
ADAM = (
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous namespace)::"
    "FusedOptimizerTensorListMetadata<4>, at::native::(anonymous namespace)::FusedAdamMathFunctor<float, 4, "
    "(at::native::ADAM_MODE)1, false>, double>(at::native::(anonymous namespace)::F<4>, double)"
)
ADD = "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::A<1>, std::plus<float> >(int)"


def event(cat: str, name: str, ts: float, dur: float, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": args}


COPY = "Memcpy DtoD (Device -> Device)"
EVENTS = [
    event("kernel", "before the first copy", 0, 5),
    event("gpu_memcpy", COPY, 10, 10),
    event("gpu_memcpy", COPY, 20, 10),
    event("cpu_op", "aten::add", 31, 50),
    event("kernel", "gram_kernel", 32, 6, grid=[4, 1, 2]),
    event("kernel", UPDATE, 40, 10, **{"registers per thread": 128}),
    event("gpu_memcpy", COPY, 60, 10),
    # out of order; overlaps the one before it; one kernel twice
    event("kernel", UPDATE, 76, 12),
    event("kernel", "gram_kernel", 70, 4),
    event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 75, 2),
    event("kernel", UPDATE, 90, 8),
    {"ph": "M", "name": "process_name"},
]


def test_names_are_short() -> None:
    assert profile.short(UPDATE) == UPDATE
    assert profile.short(ADAM) == profile.FUSED
    assert profile.short(ADD) == "multi_tensor_apply_kernel"


def test_kernels_of_a_trace() -> None:
    found = {kernel.name: kernel for kernel in profile.kernels(EVENTS)}
    assert list(found) == ["gram_kernel", UPDATE, "Memcpy HtoD", profile.GAP]
    times = {name: [round(1e6 * seconds) for seconds in kernel.times] for name, kernel in found.items()}
    assert times == {"gram_kernel": [6, 4], UPDATE: [10, 20], "Memcpy HtoD": [0, 2], profile.GAP: [2, 1 + 2]}
    assert found[UPDATE].launches == 3
    assert found["gram_kernel"].args == {"grid": [4, 1, 2]} and profile.kernels([])[0].times == []


def test_measurements_and_their_table() -> None:
    copies = SimpleNamespace(bytes=1000, seconds=1e-9 * 1000 / 3000)  # 3000 GB/s
    rows = profile.measurements("case", "reflora", profile.kernels(EVENTS), 1000, copies)  # type: ignore[arg-type]
    found = {(row.method.removeprefix("RefLoRA: "), row.metric): row.summary.p50 for row in rows}
    assert found[UPDATE, "bytes to move"] == pytest.approx(28e-3)
    assert found[UPDATE, "bandwidth"] == pytest.approx((28e3 / 10e-6 + 28e3 / 20e-6) / 2 / 1e9)
    assert found["gram_kernel", "bytes to move"] == pytest.approx(8e-3)
    assert found[UPDATE, "launches"] == 1.5 and (profile.GAP, "launches") not in found
    text = profile.report(rows, 3e12)
    assert "case, copy 3000 GB/s" in text
    assert len({len(line) for line in text.splitlines()[2:4]}) == 1


@pytest.mark.parametrize(
    ("method", "kernel", "each"),
    [
        ("lora", profile.FUSED, 28),
        ("reflora-carried", "gram_kernel", 4),
        ("reflora-s", "foresee_kernel", 16),
        ("reflora-s", "turn_kernel", 28),
        ("reflora", "fill", None),
    ],
)
def test_bytes_of_a_kernel(method: str, kernel: str, each: int | None) -> None:
    assert profile.moved(method, kernel, 10) == (None if each is None else 10 * each)
    assert roofline.FORESEEN == 16


@pytest.mark.gpu
def test_a_step_is_seen(tmp_path: Path) -> None:
    kernels.main(["profile", "--cases", "minilm:8", "--steps", "3", "--copy-mib", "64", "--out", str(tmp_path)])
    text = (tmp_path / "profile_cuda.csv").read_text()
    for name in ("LoRA: fused AdamW", "RefLoRA: gram_kernel", "RefLoRA: update_kernel", "RefLoRA-S: turn_kernel"):
        assert name in text
    options = argparse.Namespace(bare=True, methods=["reflora"], steps=2, device=torch.device("cuda"))
    assert profile.measure(options, "minilm", 8, profile.probes.Copies(options.device, 64)) == []
