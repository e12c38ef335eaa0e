"""The benchmarks of steps: what they count is right, and the programs run. No timing decides anything here."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bench_cases import PretendedGpu, medians, rows_of
from conftest import spectrum_pair

from benchmarks import figures, harness, host, kernels, methods, probes, roofline, scaling, shapes, step, stepper
from benchmarks.baselines import peft_optimizers
from benchmarks.roofline_figure import main as draw_roofline

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
TINY = ["--rounds", "2", "--warm", "2", "--copy-mib", "1", "--device", "cpu"]


# ---- PEFT's optimizer on bare pairs


def test_riemannian_is_the_formula() -> None:
    """`gA (B^T B + reg I)^-1 gA` and `gB (A A^T + reg I)^-1` in front of AdamW; what is in no pair gets AdamW alone."""
    start = [*spectrum_pair(4, 30, 20, 3.0, 10.0), *spectrum_pair(4, 30, 20, 3.0, 10.0), torch.randn(5)]
    own, plain = ([tensor.clone().requires_grad_() for tensor in start] for _ in range(2))
    for p, twin in zip(own, plain):
        p.grad = torch.randn_like(p)
        twin.grad = p.grad.clone()
    damping = 1e-2 * torch.eye(4, dtype=start[0].dtype)
    for A, B in (plain[:2], plain[2:4]):
        gram_A, gram_B = (A @ A.T + damping).detach(), (B.T @ B + damping).detach()
        A.grad, B.grad = torch.linalg.solve(gram_B, A.grad), torch.linalg.solve(gram_A, B.grad, left=False)
    peft_optimizers.riemannian(own, [tuple(own[:2]), tuple(own[2:4])], lr=1e-2, weight_decay=0.0).step()
    torch.optim.AdamW(plain, lr=1e-2, weight_decay=0.0).step()
    torch.testing.assert_close([p.detach() for p in own], [p.detach() for p in plain], rtol=1e-5, atol=1e-7)


# ---- what a step asks of a device


@pytest.mark.parametrize(("dtype", "each"), [(torch.float32, 28), (torch.float64, 56), (torch.bfloat16, 14)])
def test_bytes_of_a_step_follow_the_types(dtype: torch.dtype, each: int) -> None:
    A, B = (f.to(dtype).requires_grad_() for f in spectrum_pair(4, 30, 20, 3.0, 10.0))
    optimizer = methods.build("lora", methods.Subject([A, B], [(A, B)], methods.Setting(1e-3, 0)))
    A.grad, B.grad = torch.ones_like(A), torch.ones_like(B)
    optimizer.step()
    assert probes.step_bytes(optimizer, [A, B]) == each * (A.numel() + B.numel())


def test_moments_of_another_type_count_as_what_they_are() -> None:
    p = torch.ones(10, dtype=torch.bfloat16, requires_grad=True)
    optimizer = torch.optim.AdamW([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.state[p].update(exp_avg=torch.ones(10), exp_avg_sq=torch.ones(10))
    assert probes.step_bytes(optimizer, [p]) == 10 * (2 + 2 * (2 + 4 + 4))


def test_launches_are_counted_by_kind() -> None:
    def event(cat: str, name: str, ph: str = "X") -> dict[str, object]:
        return {"ph": ph, "cat": cat, "name": name, "ts": 0, "dur": 1}

    events = [
        event("kernel", "gram_kernel"), event("kernel", "void at::native::x"), event("cpu_op", "aten::add"),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)"), event("gpu_memcpy", "Memcpy DtoD (Device -> Device)"),
        event("gpu_memset", "Memset (Device)"), event("cuda_runtime", "cudaLaunchKernel"),
        event("kernel", "gram_kernel", "f"), {"ph": "M"},
    ]  # fmt: skip
    assert probes.count(events) == probes.Launches(kernels=2, to_host=1, others=2)
    # nothing of a device is claimed on a CPU
    assert probes.launches(lambda: torch.ones(3), CPU) is None and probes.allocated(CPU) is None


def test_copies_move_what_they_say() -> None:
    copies = probes.Copies(CPU, 1)
    copies(0)
    assert copies.bytes == 2 << 20 and copies.times[0] > 0 and torch.equal(copies.source, copies.target)


def test_stopwatch_knows_host_time_from_wall_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 3.0, 7.0])
    monkeypatch.setattr(harness.time, "perf_counter", lambda: next(clock))
    with harness.Stopwatch(CPU) as watch:
        pass
    assert (watch.host, watch.seconds) == (2.0, 6.0)


def test_slow_methods_sit_out_but_take_part_three_times() -> None:
    assert [stepper._stride(50, fit) for fit in (1000.0, 50.0, 10.0, 0.1)] == [1, 1, 5, 16]


# ---- step and scaling, end to end


def test_step_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    kernels.main(["step", "--cases", "minilm:4", *TINY, "--out", str(tmp_path)])
    rows = rows_of(tmp_path / "step_cpu.csv")
    cold = {(row["method"], row["metric"]): float(row["p50"]) for row in rows if row["case"].endswith("cold")}
    labels = {methods.LABELS[name] for name in step.CPU_METHODS}
    assert {method for method, metric in cold if metric == "wall to LoRA"} == labels
    assert cold["LoRA", "wall to LoRA"] == 1 and cold["copy", "bandwidth"] > 0
    assert cold["RefLoRA", "bytes to move"] == pytest.approx(28e-6 * shapes.size(shapes.layers("minilm"), 4), rel=1e-5)
    assert {row["case"].split()[-1] for row in rows} == {"cold", "warm"}
    assert not {"host", "gpu", "kernel launches"} & {row["metric"] for row in rows}  # of a GPU alone
    assert "minilm (36 pairs) r=4 warm" in capsys.readouterr().out
    for name in ("step_cpu.png", "overhead_cpu.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_method_that_fails_is_shown_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str, *arguments: object) -> torch.optim.Optimizer:
        optimizer = build(name, *arguments)  # type: ignore[arg-type]
        if name in failing:
            optimizer.register_step_pre_hook(lambda *_: torch.linalg.eigh(torch.full((3, 3), torch.nan)))
        return optimizer

    build = methods.build
    monkeypatch.setattr(methods, "build", broken)
    arguments = ["step", "--cases", "minilm:4", *TINY, "--caches", "cold", "--out", str(tmp_path)]
    failing = ["published"]
    kernels.main([*arguments, "--methods", "lora", "reflora", "published"])
    assert "published RefLoRA, minilm (36 pairs) r=4 cold: failed: round 0" in capsys.readouterr().out
    assert {row["method"] for row in rows_of(tmp_path / "step_cpu.csv")} == {"copy", "LoRA", "RefLoRA"}
    failing = ["reflora"]
    with pytest.raises(SystemExit, match="1"):
        kernels.main([*arguments, "--methods", "lora", "reflora"])


def test_step_takes_the_way_of_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All but the device itself: both kinds of timing, host time, launches, memory."""
    memory = iter(range(10**9))

    def trace(work: Callable[[], object], *_: object) -> list[dict[str, str]]:
        work()
        kernel, copy = {"cat": "kernel", "name": "k"}, {"cat": "gpu_memcpy", "name": "Memcpy DtoH"}
        return [{"ph": "X", **event} for event in (kernel, kernel, kernel, copy)]

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: next(memory))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: next(memory) + 10**6)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *_: None)
    monkeypatch.setattr(harness, "trace", trace)
    arguments = ["step", "--cases", "minilm:4", *TINY, "--device", "cuda", "--methods", "lora", "reflora"]
    with PretendedGpu(monkeypatch):
        kernels.main([*arguments, "--out", str(tmp_path)])
    every = medians(tmp_path / "step_cuda.csv", "method", "metric")
    found = {metric: value for (method, metric), value in every.items() if method == "RefLoRA"}
    assert set(found) == {
        "gpu", "wall", "host", "gpu to LoRA", "wall to LoRA", "bytes to move", "of copy bandwidth", "overtaken",
        "kernel launches", "copies to the host", "other copies and fills", "memory kept above LoRA",
        "step peak above LoRA",
    }  # fmt: skip
    assert (found["gpu"], found["gpu to LoRA"], found["overtaken"]) == (2000, 1, 1) and found["host"] <= found["wall"]
    assert (found["kernel launches"], found["copies to the host"], found["other copies and fills"]) == (3, 1, 0)
    assert "launches" in capsys.readouterr().out and (tmp_path / "step_cuda.png").exists()


def test_scaling_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--base", "2", "3", "16", "--rank", "2", "4", "--layers", "1", "3", "--width", "16"]
    kernels.main(["scaling", *sizes, "--methods", "lora", "reflora", *TINY, "--out", str(tmp_path)])
    rows = rows_of(tmp_path / "scaling_cpu.csv")
    # the base stands in all three panels and is measured once
    cases = [f"r={rank}, {pairs} pairs, width 16" for rank, pairs in ((2, 3), (4, 3), (2, 1))]
    assert list(dict.fromkeys(row["case"] for row in rows)) == cases
    assert {row["method"] for row in rows if row["metric"] == "wall to LoRA"} == {"LoRA", "RefLoRA"}
    assert (tmp_path / "scaling_cpu.png").read_bytes().startswith(b"\x89PNG")


def test_figure_sets_far_methods_apart() -> None:
    near = {("RefLoRA", "rank"): [1.1, 2.0], ("RefLoRA-S", "rank"): [0.9], ("LoRA", "rank"): [1.0]}
    far = {("published RefLoRA", "rank"): [4.1, 60.0], ("published RefLoRA", "width"): [5.0]}
    assert figures._levels({**near, **far}) == [["published RefLoRA"], ["LoRA", "RefLoRA", "RefLoRA-S"]]
    reached = {**near, ("RefLoRA", "rank"): [1.1, 2.1]}
    assert figures._levels({**reached, **far}) == [["LoRA", "RefLoRA", "RefLoRA-S", "published RefLoRA"]]
    assert figures._levels({}) == []


def test_every_method_of_the_step_benchmark_has_a_colour_and_a_marker() -> None:
    assert {methods.LABELS[name] for name in methods.BARE} <= set(figures.COLOURS) == set(figures.MARKERS)
    assert len(set(figures.COLOURS.values())) == len(figures.COLOURS)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_scaling_varies_one_size_at_a_time(device: str) -> None:
    options = argparse.Namespace(device=torch.device(device), base=None, **dict.fromkeys(scaling.PANELS))
    for name, panel in scaling.points(options).items():
        others = [n for n in scaling.PANELS if n != name]
        assert all(getattr(point, n) == getattr(scaling.BASE[device], n) for n in others for _, point in panel)
        assert [getattr(p, name) for _, p in panel] == [x for x, _ in panel] == list(scaling.PANELS[name])
    assert scaling.BASE["cpu"] != scaling.BASE["cuda"]


# ---- roofline


def test_roofline_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    roofline.main([])
    draw_roofline([str(tmp_path / "roofline.png")])
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")
    told = capsys.readouterr().out
    assert "36 B per parameter, 1.29 of AdamW's" in told
    assert "InvariantAdamW, carried Grams: 20 B per parameter, 0.71 of AdamW's" in told


def test_bytes_of_a_step_are_those_of_the_notes() -> None:
    ratios = [round(roofline.bytes_a_parameter(*c) / 28, 2) for c in ((1, 0), (0, 0), (1, 1), (0, 1))]
    assert ratios == [1.29, 1.14, 1.14, 1.0]
    for check in (True, False):
        gram, _, update = roofline.kernels("llama-7b", 32, check)
        size = shapes.size(shapes.layers("llama-7b"), 32)
        assert gram.bytes + update.bytes == roofline.bytes_a_parameter(check) * size


def test_roofline_of_one_pair_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "layers", lambda name: [(30, 20)])
    gram, solve, update = roofline.kernels("one", 4)
    assert (gram.bytes, gram.float64) == (8 * 200, 2 * 4 * 200)
    assert (solve.bytes, solve.float64) == (4 * 8 * 16, 2 * 64 * 26) and roofline.rounds(4) == 4
    assert (update.bytes, update.float32, update.float64) == (28 * 200, 2 * 4 * 200, 0)
    machine = roofline.Machine("m", copy=100.0, float64=50.0, float32=1e9)
    assert gram.times(machine) == {"bytes": 16.0, "float64": 32.0, "float32": 0.0} and gram.bound(machine) == "float64"
    gram, solve, update = roofline.invariant_kernels("one", 4)
    assert (gram.bytes, gram.float64, update.bytes) == (8 * 200, 2 * 2 * 4 * 200, 20 * 200)
    assert (solve.bytes, solve.float64) == (8 * 8 * 16, 2 * 64 * 74)
    assert roofline.invariant_kernels("one", 4, carried=True)[1].float64 == 3 * 2 * 4 * 200


def test_notes_have_the_table_of_the_program() -> None:
    assert roofline.markdown() in (ROOT / "benchmarks" / "NOTES.md").read_text()


def test_host_end_to_end(tmp_path: Path) -> None:
    kernels.main(["host", "--pairs", "3", "--rounds", "4", "--warm", "1", "--out", str(tmp_path)])
    rows = rows_of(tmp_path / "host_cpu.csv")
    assert {row["method"] for row in rows} == {"RefLoRA, host", "RefLoRA, with backend", "AdamW fused"}
    assert all(row["samples"] == "4" and float(row["p50"]) > 0 for row in rows)


def test_host_time_leaves_the_backend_out() -> None:
    steps = host.cases(2)
    parameter = next(p for p in steps["RefLoRA, host"].__closure__ or () if hasattr(p.cell_contents, "param_groups"))
    factors = parameter.cell_contents.param_groups[0]["params"]
    before = [factor.detach().clone() for factor in factors]
    steps["RefLoRA, host"]()
    assert all(torch.equal(factor, old) for factor, old in zip(factors, before))
    steps["RefLoRA, with backend"]()
    assert not any(torch.equal(factor, old) for factor, old in zip(factors, before))
