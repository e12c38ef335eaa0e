"""Throughput and memory over all methods: what is trained, what is shared, and every kind of model, made small."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import spectrum_pair

from benchmarks import memory, methods, models, options, throughput, training, unit_determinant, variants
from reflora import reference

CPU = torch.device("cpu")
SIZE = ["--device", "cpu", "--batch", "2", "--rank", "2", "--length", "12"]


def adapter(rank: int = 2) -> variants.Adapter:
    return variants.Adapter(rank, rank, "all-linear", seed=3, steps=6)


def figures(path: Path) -> dict[tuple[str, str], float]:
    return {(row["method"], row["metric"]): float(row["p50"]) for row in csv.DictReader(path.open())}


# ---- variants


@pytest.mark.parametrize("name", variants.NAMES)
def test_variants_share_the_frozen_weights_and_leave_them_alone(tiny: None, name: str) -> None:
    loaded = models.load("minilm", 11, CPU, seed=0)
    before = {key: value.clone() for key, value in loaded.model.state_dict().items()}
    model = variants.build(name, loaded, adapter())
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    frozen = {p.data_ptr() for p in loaded.model.parameters()}
    assert trainable and not any(parameter.data_ptr() in frozen for parameter in trainable)
    if name not in ("full", "pissa"):
        rest = {parameter.data_ptr() for parameter in model.parameters() if not parameter.requires_grad}
        moved = {"classifier.weight", "classifier.bias"} if name != "bitfit" else set()
        moved |= {
            n for n, _ in loaded.model.named_parameters() if name == "bitfit" and ("bias" in n or "classifier" in n)
        }
        kept = {p.data_ptr() for n, p in loaded.model.named_parameters() if n not in moved}
        assert kept <= rest
    ids, mask = torch.arange(6)[None], torch.ones(1, 6, dtype=torch.long)
    loss = model(input_ids=ids, attention_mask=mask, labels=torch.tensor([1])).loss
    loss.backward()
    torch.optim.SGD(trainable, lr=0.1).step()
    for key, value in loaded.model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_variants_start_from_the_same_function(tiny: None) -> None:
    loaded = models.load("minilm", 11, CPU, seed=0)
    ids, mask = torch.arange(6)[None], torch.ones(1, 6, dtype=torch.long)
    outputs = []
    for name in variants.NAMES:
        model = variants.build(name, loaded, adapter()).eval()
        outputs.append(model(input_ids=ids, attention_mask=mask).logits)
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], rtol=1e-4, atol=1e-4)


def test_pairs_and_their_weights_belong_together(tiny: None) -> None:
    model = variants.build("lora", models.load("minilm", 11, CPU, seed=0), adapter())
    pairs, weights = variants.pairs_of(model), variants.base_weights(model)
    assert len(pairs) == len(weights) == 13
    for (A, B), W in zip(pairs, weights):
        assert W.shape == (B.shape[0], A.shape[1]) and not W.requires_grad


def test_checkpointed_training_keeps_fewer_activations(tiny: None) -> None:
    peaks = []
    for flag in ("--checkpointing", "--no-checkpointing"):
        chosen = throughput.parse(["--model", "llama2-7b", *SIZE, "--batch", "16", "--steps", "23", flag])
        footprint = options.prepare(chosen, 2, 0).bench.memory("lora")
        assert footprint is not None
        peaks.append(footprint.peak)
    assert peaks[0] < 0.8 * peaks[1]


def test_bitfit_needs_biases(tiny: None) -> None:
    with pytest.raises(RuntimeError, match="bitfit trains biases, and this model has none"):
        variants.build("bitfit", models.load("llama2-7b", 2, CPU, 0, torch.float32), adapter())


# ---- all methods


def test_every_method_trains_and_is_measured(tiny: None, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = throughput.parse([*SIZE, "--steps", "5", "--warmup", "1", "--methods", "all"])
    runners, rows, text = throughput.run(chosen)
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


def test_memory_is_the_state_that_each_method_has(tiny: None, tmp_path: Path) -> None:
    chosen = "lora,reflora,reflora-s,lora-pro-full,lora-fa,full,lora-rite"  # test_every_method_trains has the others
    memory.main([*SIZE, "--methods", chosen, "--out", str(tmp_path)])
    found = figures(tmp_path / "memory_minilm_cpu.csv")
    model = variants.build("lora", models.load("minilm", 11, CPU, seed=0), adapter())
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
    left_out = {"bitfit", "full", "pissa", "lora-pro-full"}
    assert left_out.isdisjoint(chosen.methods) and "reflora" in chosen.methods
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


class Spoiling(torch.optim.SGD):
    def step(self, closure: object = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.fill_(torch.nan)


@pytest.mark.parametrize(
    ("broken", "failure"),
    [(Failing, "step 1: no convergence"), (Spoiling, "step 2: the loss is not finite")],
    ids=["raises", "nan"],
)
def test_method_that_fails_says_where_and_the_others_go_on(
    tiny: None, broken: Callable[..., torch.optim.Optimizer], failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(methods.METHODS, "balora", methods.Method("BaLoRA", lambda s: broken(s.parameters)))
    chosen = throughput.parse([*SIZE, "--steps", "4", "--warmup", "1", "--methods", "lora,balora"])
    runners, rows, text = throughput.run(chosen)
    assert runners[1].failure == failure and f"failed at {failure}" in text
    if broken is Failing:  # its memory is given back at once
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
    chosen = throughput.parse([*SIZE, "--steps", "4", "--warmup", "1", "--methods", f"{variant},lora"])
    runners, rows, text = throughput.run(chosen)
    assert runners[0].failure == "start: CUDA out of memory. Tried to allocate 20.00 GiB"
    assert f"failed at {runners[0].failure}" in text and {row.method for row in rows} == {"LoRA"}
    assert options.prepare(chosen, 2, 0).bench.memory(variant) is None


def test_adaloras_penalty_is_trained_for_images_too(tiny: None) -> None:
    chosen = throughput.parse(["--model", "vit-base", *SIZE, "--steps", "23"])
    bench = options.prepare(chosen, 3, 0).bench
    lora, adalora = (bench.runner(name) for name in ("lora", "adalora"))
    losses = []
    for runner in (lora, adalora):
        assert runner.places is not None and runner.optimizer is not None
        runner.places.install(runner.parameters)
        losses.append(bench.backward(runner.places.model, runner.optimizer, 0))
    assert losses[1] > losses[0] + 0.1


def test_nora_starts_from_its_sketch_and_the_others_do_not(tiny: None) -> None:
    prepared = options.prepare(throughput.parse([*SIZE, "--steps", "30"]), 4, 0)
    bench: training.Bench = prepared.bench
    lora, nora = (bench.runner(name).parameters for name in ("lora", "nora+"))
    assert any(not torch.equal(one, other) for one, other in zip(lora, nora))
    again = bench.runner("reflora").parameters
    assert all(torch.equal(one, other) for one, other in zip(lora, again))


def test_unit_determinant_keeps_the_shape_of_s_alone() -> None:
    A, B = spectrum_pair(4, 30, 20, 3.0, 50.0)
    dead = (torch.randn(4, 30, dtype=torch.float64), torch.zeros(20, 4, dtype=torch.float64))
    S, inverse = unit_determinant.unit_means([(A, 7.0 * B), dead])
    expected = reference.refactoring(A, B).S
    torch.testing.assert_close(S[0], expected / torch.linalg.det(expected) ** 0.25, rtol=1e-9, atol=1e-12)
    eye = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(S @ inverse, eye.expand(2, 4, 4), rtol=0, atol=1e-10)
    assert torch.equal(S[1], eye)


# ---- that a method is what its name says


def test_variants_are_what_their_names_say(tiny: None) -> None:
    loaded = models.load("minilm", 11, CPU, seed=0)
    made = {name: variants.build(name, loaded, adapter()) for name in variants.NAMES}
    assert any("lora_magnitude_vector" in name for name, _ in made["dora"].named_parameters())
    assert all(B.any() for _, B in variants.pairs_of(made["pissa"]))
    assert not any(B.any() for _, B in variants.pairs_of(made["lora"]))
    assert any("lora_E" in name for name, _ in made["adalora"].named_parameters())
    assert {"bias"} < {n.rsplit(".")[-1] for n, p in made["bitfit"].named_parameters() if p.requires_grad}


def bench_of(*more: str, steps: int = 6, warmup: int = 0) -> training.Bench:
    return options.prepare(throughput.parse([*SIZE, "--steps", "40", *more]), steps, warmup).bench


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
    model = trained(bench, "adalora", 5).places.model  # type: ignore[union-attr]
    assert model.base_model.rankallocator.ipt


def test_published_loop_departs_from_adamw_after_its_warmup(tiny: None) -> None:
    bench = bench_of(warmup=2)
    lora, published = (torch.stack(trained(bench, name, 6).losses) for name in ("lora", "published"))
    torch.testing.assert_close(lora[:3], published[:3], rtol=1e-6, atol=0)
    assert not torch.allclose(lora[4:], published[4:], rtol=1e-6)


def test_setting_carries_scaling_and_decay(tiny: None) -> None:
    """The llamas' alpha is twice their rank."""
    bench = bench_of("--model", "llama2-7b")
    assert (bench.setting.scaling, bench.setting.weight_decay) == (2.0, 0.01)
    assert bench.runner("lora-pro").optimizer.scaling == 2.0  # type: ignore[union-attr]
    subject = methods.Subject([], [], methods.Setting(1e-3, 0, weight_decay=0.3))
    assert subject.options == {"lr": 1e-3, "weight_decay": 0.3}


def test_memory_is_measured_on_factors_that_are_not_zero(tiny: None) -> None:
    bench = bench_of()
    seen: list[bool] = []
    whole = methods.build

    def build(name: str, subject: methods.Subject) -> torch.optim.Optimizer:
        seen.extend(bool(factor.any()) for pair in subject.pairs for factor in pair)
        return whole(name, subject)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods, "build", build)
        assert bench.memory("published") is not None
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
