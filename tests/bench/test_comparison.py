"""Throughput and memory over all methods: what is trained, what is shared, and every kind of model, made small."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bench_cases import medians
from conftest import spectrum_pair

from benchmarks import harness, memory, methods, models, options, throughput, training, unit_determinant, variants
from reflora import reference

CPU = torch.device("cpu")
SIZE = ["--device", "cpu", "--batch", "2", "--rank", "2", "--length", "12"]
INPUT = {"input_ids": torch.arange(6)[None], "attention_mask": torch.ones(1, 6, dtype=torch.long)}


def adapter(rank: int = 2) -> variants.Adapter:
    return variants.Adapter(rank, rank, "all-linear", seed=3, steps=6)


@pytest.fixture
def minilm(tiny: None) -> models.Loaded:
    return models.load("minilm", 11, CPU, seed=0)


def bench_of(*more: str, steps: int = 6, warmup: int = 0) -> training.Bench:
    return options.prepare(throughput.parse([*SIZE, "--steps", "40", *more]), steps, warmup).bench


def run(names: str, steps: int, warmup: int = 1) -> tuple[list[training.Runner], list[harness.Measurement], str]:
    given = f"--steps {steps} --warmup {warmup} --methods {names}"
    return throughput.run(throughput.parse([*SIZE, *given.split()]))


# ---- variants


@pytest.mark.parametrize("name", variants.NAMES)
def test_variants_share_the_frozen_weights_and_leave_them_alone(minilm: models.Loaded, name: str) -> None:
    before = {key: value.clone() for key, value in minilm.model.state_dict().items()}
    model = variants.build(name, minilm, adapter())
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    frozen = {n: parameter.data_ptr() for n, parameter in minilm.model.named_parameters()}
    assert trainable and not any(parameter.data_ptr() in frozen.values() for parameter in trainable)
    if name not in ("full", "pissa"):
        rest = {parameter.data_ptr() for parameter in model.parameters() if not parameter.requires_grad}
        moved = ("bias", "classifier") if name == "bitfit" else ("classifier.weight", "classifier.bias")
        assert rest >= {pointer for n, pointer in frozen.items() if not any(part in n for part in moved)}
    model(**INPUT, labels=torch.tensor([1])).loss.backward()
    torch.optim.SGD(trainable, lr=0.1).step()
    for key, value in minilm.model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert not any(parameter.requires_grad for parameter in minilm.model.parameters())


def test_variants_start_from_the_same_function(minilm: models.Loaded) -> None:
    first, *others = (variants.build(name, minilm, adapter()).eval()(**INPUT).logits for name in variants.NAMES)
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-4, atol=1e-4)


def test_pairs_and_their_weights_belong_together(minilm: models.Loaded) -> None:
    model = variants.build("lora", minilm, adapter())
    pairs, weights = variants.pairs_of(model), variants.base_weights(model)
    assert len(pairs) == len(weights) == 13
    for (A, B), W in zip(pairs, weights):
        assert W.shape == (B.shape[0], A.shape[1]) and not W.requires_grad


def test_checkpointed_training_keeps_fewer_activations(tiny: None) -> None:
    peaks = []
    for flag in ("--checkpointing", "--no-checkpointing"):
        footprint = bench_of("--model", "llama2-7b", "--batch", "16", flag, steps=2).memory("lora")
        assert footprint is not None
        peaks.append(footprint.peak)
    assert peaks[0] < 0.8 * peaks[1]


def test_bitfit_needs_biases(tiny: None) -> None:
    with pytest.raises(RuntimeError, match="bitfit trains biases, and this model has none"):
        variants.build("bitfit", models.load("llama2-7b", 2, CPU, 0, torch.float32), adapter())


# ---- all methods


def test_every_method_trains_and_is_measured(tiny: None, capsys: pytest.CaptureFixture[str]) -> None:
    runners, rows, text = run("all", steps=5)
    assert [runner.name for runner in runners] == [n for n in methods.METHODS if n not in methods.EXPERIMENTS]
    found = {(row.method, row.metric): row.summary.p50 for row in rows}
    for runner in runners:
        label = methods.LABELS[runner.name]
        assert runner.failure is None and label in text
        assert all(map(torch.isfinite, runner.losses)) and len(runner.losses) == 5
        assert runner.places is not None
        start = runner.places.copies()
        still = [torch.equal(new, old) for new, old in zip(runner.parameters, start) if new.requires_grad]
        assert sum(still) < len(still) / 2, label
        assert found[label, "optimizer step"] > 0 and found[label, "throughput to LoRA"] > 0
        assert all(parameter.grad is None for parameter in runner.parameters)
    errors = capsys.readouterr().err
    assert "training" in errors and "memory" in errors


def test_memory_is_the_state_that_each_method_has(minilm: models.Loaded, tmp_path: Path) -> None:
    chosen = "lora,reflora,reflora-s,lora-pro-full,lora-fa,full,lora-rite"  # test_every_method_trains has the others
    memory.main([*SIZE, "--methods", chosen, "--out", str(tmp_path)])
    found = medians(tmp_path / "memory_minilm_cpu.csv", "method", "metric")
    model = variants.build("lora", minilm, adapter())
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    products = sum(B.shape[0] * A.shape[1] for A, B in variants.pairs_of(model))
    # two float32 moments a parameter, and a step count for each
    assert found["LoRA", "optimizer state"] == pytest.approx(8e-6 * trainable, rel=0.05)
    assert 0 <= found["RefLoRA", "state above LoRA"] < 0.02 > abs(found["RefLoRA-S", "state above LoRA"])
    assert found["LoRA-Pro, full", "optimizer state"] > 4e-6 * products
    assert found["LoRA-FA", "optimizer state"] < 0.8 * found["LoRA", "optimizer state"]
    assert found["full fine-tuning", "optimizer state"] > found["LoRA", "optimizer state"]
    assert found["LoRA-RITE", "temporaries of a step"] > found["LoRA", "temporaries of a step"]
    assert (tmp_path / "memory_minilm_cpu.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("model", "more"),
    [("llama2-7b", ["--checkpointing"]), ("llama2-7b", ["--dtype", "float32"]), ("vit-base", []), ("minilm", [])],
    ids=["causal-bfloat16-checkpointed", "causal-float32", "image", "text"],
)
def test_every_kind_of_model_trains(
    tiny: None, model: str, more: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    chosen = ["--model", model, "--methods", "lora,reflora,nora+", "--steps", "4", "--warmup", "1"]
    throughput.main([*SIZE, *chosen, *more, "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert ("random images" in printed) == (model == "vit-base")
    assert ("frozen in bfloat16, gradient checkpointing" in printed) == (more == ["--checkpointing"])
    assert "failed" not in printed


def test_llama_leaves_out_what_it_has_no_biases_or_room_for() -> None:
    chosen = throughput.parse(["--device", "cpu", "--model", "llama-7b", "--methods", "all"])
    assert {"bitfit", "full", "pissa", "lora-pro-full"}.isdisjoint(chosen.methods) and "reflora" in chosen.methods
    assert chosen.dtype is torch.bfloat16 and chosen.checkpointing
    assert not throughput.parse(["--device", "cpu", "--model", "llama-7b", "--no-checkpointing"]).checkpointing


def test_all_leaves_out_what_an_older_peft_lacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(methods.PEFT_OPTIMIZERS, "lora-fa", "create_nothing")
    assert "lora-fa" not in throughput.parse(["--device", "cpu", "--methods", "all"]).methods
    assert "left out: --methods: lora-fa needs a PEFT with peft.optimizers.create_nothing" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        throughput.parse(["--device", "cpu", "--methods", "lora-fa"])
    assert "lora-fa needs a PEFT with" in capsys.readouterr().err


class Failing(torch.optim.AdamW):
    def step(self, closure: object = None) -> None:
        raise torch.linalg.LinAlgError("no convergence (error code: 3)")


@pytest.mark.parametrize(
    "build, failure",
    [
        (lambda subject: Failing(subject.parameters), "step 1: no convergence"),
        (lambda subject: torch.optim.SGD(subject.parameters, lr=math.inf), "step 2: the loss is not finite"),
    ],
    ids=["raises", "nan"],
)
def test_method_that_fails_says_where_and_the_others_go_on(
    tiny: None, build: Callable[..., torch.optim.Optimizer], failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(methods.METHODS, "balora", methods.Method("BaLoRA", build))
    runners, rows, text = run("lora,balora", steps=4)
    assert runners[1].failure == failure and f"failed at {failure}" in text
    if "step 1" in failure:  # its memory is given back at once
        assert runners[1].optimizer is None and not runners[1].parameters
    assert {row.method for row in rows} == {"LoRA"}


@pytest.mark.parametrize("variant", ["dora", "full"])
def test_method_without_room_leaves_the_others_alone(tiny: None, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = variants.build

    def build(name: str, *others: object) -> torch.nn.Module:
        if name == variant:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return whole(name, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(variants, "build", build)
    runners, rows, text = run(f"{variant},lora", steps=4)
    assert runners[0].failure == "start: CUDA out of memory. Tried to allocate 20.00 GiB"
    assert f"failed at {runners[0].failure}" in text and {row.method for row in rows} == {"LoRA"}
    assert bench_of(steps=2).memory(variant) is None


def test_adaloras_penalty_is_trained_for_images_too(tiny: None) -> None:
    bench = bench_of("--model", "vit-base", steps=3)
    losses = []
    for runner in map(bench.runner, ("lora", "adalora")):
        assert runner.places is not None and runner.optimizer is not None
        runner.places.install(runner.parameters)
        losses.append(bench.backward(runner.places.model, runner.optimizer, 0))
    assert losses[1] > losses[0] + 0.1


def test_nora_starts_from_its_sketch_and_the_others_do_not(tiny: None) -> None:
    bench = bench_of(steps=4)
    lora, nora, again = (bench.runner(name).parameters for name in ("lora", "nora+", "reflora"))
    assert not all(map(torch.equal, lora, nora)) and all(map(torch.equal, lora, again))


def test_unit_determinant_keeps_the_shape_of_s_alone() -> None:
    A, B = spectrum_pair(4, 30, 20, 3.0, 50.0)
    S, inverse = unit_determinant.unit_means([(A, 7.0 * B), (torch.randn_like(A), torch.zeros_like(B))])
    expected = reference.refactoring(A, B).S
    torch.testing.assert_close(S[0], expected / torch.linalg.det(expected) ** 0.25, rtol=1e-9, atol=1e-12)
    eye = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(S @ inverse, eye.expand(2, 4, 4), rtol=0, atol=1e-10)
    assert torch.equal(S[1], eye)


# ---- that a method is what its name says


def test_variants_are_what_their_names_say(minilm: models.Loaded) -> None:
    made = {name: variants.build(name, minilm, adapter()) for name in variants.NAMES}
    assert any("lora_magnitude_vector" in name for name, _ in made["dora"].named_parameters())
    assert all(B.any() for _, B in variants.pairs_of(made["pissa"]))
    assert not any(B.any() for _, B in variants.pairs_of(made["lora"]))
    assert any("lora_E" in name for name, _ in made["adalora"].named_parameters())
    assert {"bias"} < {n.rsplit(".")[-1] for n, p in made["bitfit"].named_parameters() if p.requires_grad}


def trained(bench: training.Bench, name: str, steps: int) -> training.Runner:
    runner = bench.runner(name)
    for step in range(steps):
        bench.block(runner, step, 1, False)
    assert runner.failure is None
    return runner


def test_loraplus_gives_b_its_own_rate_and_adalora_allocates(tiny: None) -> None:
    bench = bench_of()
    rates = {group["lr"] for group in bench.runner("lora+").optimizer.param_groups if group["params"]}  # type: ignore
    assert rates == {1e-3, 16e-3}
    assert trained(bench, "adalora", 5).places.model.base_model.rankallocator.ipt  # type: ignore[union-attr]


def test_methods_share_weights_batches_and_dropout_and_depart_after_the_warmup(tiny: None) -> None:
    """In the warm-up every method is plain AdamW: the same losses from the same start, in whatever order they ran."""
    runners, _, _ = run("lora,reflora,published", steps=7, warmup=3)
    lora, reflora, published = (torch.stack(runner.losses) for runner in runners)
    torch.testing.assert_close(reflora[:4], lora[:4], rtol=1e-4, atol=0)
    torch.testing.assert_close(published[:4], lora[:4], rtol=1e-6, atol=0)
    assert not torch.allclose(published[5:], lora[5:], rtol=1e-6)
    assert len({runner.parameters[0].data_ptr() for runner in runners}) == 3


def test_setting_carries_scaling_and_decay(tiny: None) -> None:
    """The llamas' alpha is twice their rank."""
    bench = bench_of("--model", "llama2-7b")
    assert (bench.setting.scaling, bench.setting.weight_decay) == (2.0, 0.01)
    assert bench.runner("lora-pro").optimizer.scaling == 2.0  # type: ignore[union-attr]
    subject = methods.Subject([], [], methods.Setting(1e-3, 0, weight_decay=0.3))
    assert subject.options == {"lr": 1e-3, "weight_decay": 0.3}


def test_memory_is_measured_on_factors_that_are_not_zero(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    whole = methods.build

    def build(name: str, subject: methods.Subject) -> torch.optim.Optimizer:
        seen.extend(bool(factor.any()) for pair in subject.pairs for factor in pair)
        return whole(name, subject)

    monkeypatch.setattr(methods, "build", build)
    assert bench_of().memory("published") is not None
    assert seen and all(seen)


def test_tied_weights_stay_tied(tiny: None) -> None:
    loaded = models.load("llama2-7b", 2, CPU, 0, torch.float32)
    loaded.model.lm_head.weight = loaded.model.get_input_embeddings().weight
    places = variants.Trainables(variants.build("full", loaded, adapter()))
    copies = places.copies()
    places.install(copies)
    assert places.model.lm_head.weight is places.model.get_input_embeddings().weight
    assert len({id(parameter) for parameter in places.model.parameters()}) == len(copies)


def test_nothing_measured_is_an_error_and_leaves_the_last_results(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(subject: methods.Subject) -> torch.optim.Optimizer:
        raise KeyError("of whatever kind")

    path = tmp_path / "throughput_minilm_cpu.csv"
    path.write_text("earlier")
    monkeypatch.setitem(methods.METHODS, "reflora", methods.Method("RefLoRA", broken))
    size = [*SIZE, "--steps", "4", "--warmup", "1", "--no-memory", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="no method came through"):
        throughput.main([*size, "--methods", "reflora"])
    assert path.read_text() == "earlier"
    with pytest.raises(SystemExit) as stop:
        throughput.main([*size, "--methods", "lora,reflora"])
    assert stop.value.code == 1 and "LoRA" in path.read_text()
