"""The benchmarks measure what they say, on a model small enough for every test run. No timing decides anything here."""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import shutil
import subprocess
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_cases import medians, rows_of
from conftest import spectrum_pair
from tiny_models import texts

from benchmarks import batches, data, harness, hub, methods, probes, shapes, throughput
from benchmarks.baselines import published_reflora

CPU = torch.device("cpu")


# ---- data


def test_docstring_task_is_balanced_split_and_the_same_twice() -> None:
    task = data.stdlib_docstrings()
    assert data.load() == task
    counts = Counter(example.label for example in task.train)
    assert task.classes == len(counts) >= 8
    assert min(counts.values()) > 0.6 * max(counts.values())
    texts = [example.text for example in task.train + task.eval]
    assert len(set(texts)) == len(texts) > 2000
    assert {example.label for example in task.eval} == set(range(task.classes))


def test_labels_of_a_docstring_are_not_ambiguous() -> None:
    assert data._repeated([{"a", "b"}, {"b", "c"}, {"c", "d"}]) == {"b", "c"}


def test_missing_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no standard-library sources .* --data"):
        data.stdlib_docstrings(tmp_path)


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    text = "\n".join(map(json.dumps, rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_file_holds_out_every_fifth_row(tmp_path: Path, name: str) -> None:
    rows = [{"sentence1": f"a {i}", "sentence2": "b\u2028b", "label": i % 3} for i in range(10)]
    loaded = data.load(str(write_rows(tmp_path / name, rows)))
    assert loaded.classes == 3
    assert [example.text for example in loaded.eval] == ["a 0", "a 5"]
    assert loaded.train[0] == data.Example("a 1", 1, "b\u2028b")


def test_folder_has_its_own_split_and_float_labels_mean_regression(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl.gz", [{"sentence1": "x", "label": 0.5}, {"sentence1": "y", "label": 5.0}])
    write_rows(tmp_path / "dev.jsonl.gz", [{"sentence1": "z", "label": 1.0}])
    loaded = data.load(str(tmp_path))
    assert (loaded.classes, len(loaded.train), loaded.eval[0].label) == (1, 2, 1.0)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"sentence1": "x"}], "expected a label in every row, got rows with sentence1"),
        ([{"words": "x", "label": 1}, {"words": "y", "label": 0}], "expected a text field .* got a row with words"),
        ([], "expected labelled rows, got an empty file"),
        ([3, 4], "expected JSON objects, got 3 in row 1"),
        ([{"sentence1": "x", "label": 1}, {"sentence1": "y", "label": "no"}], "both numbers and texts"),
        ([{"sentence1": "x", "label": [1]}], r"expected a number or a text as a label, got \[1\]"),
        ([{"sentence1": None, "label": 1}], "expected texts, got None"),
    ],
)
def test_unusable_rows_are_described(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data.load(str(write_rows(tmp_path / "rows.jsonl", rows)))


def test_word_hash_batches_are_padded_and_masked() -> None:
    tokenizer = batches.WordHashTokenizer(100)
    examples = [data.Example("one two", 1, "three"), data.Example("four", 0)]
    batch = batches.encode(tokenizer, examples, 8, True, True)
    assert batch["input_ids"].shape == (2, 8) and batch["input_ids"].max() < 100
    assert batch["attention_mask"].sum(1).tolist() == [6, 4]
    assert ((batch["labels"] == -100) == (batch["attention_mask"] == 0)).all()
    assert batches.encode(tokenizer, examples, 8, False, False)["input_ids"].shape == (2, 6)


def test_batches_cover_an_epoch_and_depend_on_the_seed() -> None:
    examples = [data.Example(str(i), i) for i in range(10)]
    first, again, other = (batches.batches(examples, 5, seed) for seed in (0, 0, 1))
    epoch = next(first) + next(first)
    assert sorted(example.label for example in epoch) == list(range(10))
    assert next(again) + next(again) == epoch != next(other) + next(other)
    with pytest.raises(ValueError, match="at most the 10 examples"):
        next(batches.batches(examples, 11, 0))


# ---- shapes


def test_shapes_have_the_published_sizes() -> None:
    assert len(shapes.layers("deberta-v3-base")) == 72 and len(shapes.layers("llama-7b")) == 160
    trainable = sum(n_in + n_out for n_in, n_out in shapes.layers("deberta-v3-base"))
    assert 8 * trainable == 1_327_104  # the paper's 1.33 M at r = 8
    with pytest.raises(ValueError, match="expected one of minilm, .* got 'gpt'"):
        shapes.layers("gpt")


def test_random_pairs_are_leaves_of_the_asked_condition() -> None:
    for A, B in shapes.random_pairs(shapes.layers("minilm"), 8, torch.float64, condition=50.0)[:6]:
        assert A.shape[0] == B.shape[1] == 8 and A.is_leaf and B.requires_grad and B.is_contiguous()
        values = torch.linalg.svdvals(B.detach())
        assert 30 < values[0] / values[-1] < 80


# ---- harness


def test_summary_and_paired_ratio() -> None:
    summary = harness.summarize([float(i) for i in range(101)])
    assert (summary.p20, summary.p50, summary.p80, summary.quartiles, summary.count) == (20, 50, 80, (25, 75), 101)
    # a machine that slows down five times halfway through must not show in the ratio
    base = [1.0] * 10 + [5.0] * 10
    assert harness.paired_ratio([2 * t for t in base], base).p50 == 2.0
    assert harness.summarize(base[:5]).interval is None  # too few
    with pytest.raises(ValueError, match="expected at least one sample"):
        harness.summarize([])


def test_turns_start_with_another_case_each_round() -> None:
    seen: list[str] = []
    harness.interleave({name: lambda _, name=name: seen.append(name) for name in "abc"}, 3, "turns")
    assert "".join(seen) == "abcbcacab"


def test_rounds_end_when_their_time_is_up() -> None:
    seen: list[int] = []
    harness.interleave({"a": seen.append, "b": seen.append}, 5, "turns", seconds=0.0)
    assert seen == [0, 0]


def test_memory_counts_temporaries_frees_and_what_is_kept() -> None:
    held: list[torch.Tensor] = []

    def work() -> None:
        held[0] = torch.ones(1000)  # 4000 bytes before the 4000 of the old tensor are free
        torch.ones(5000)
        held.append(torch.ones(500))

    found = probes.memory(work, CPU, before=lambda: held.append(torch.ones(1000)))
    assert (found.peak, found.kept) == (20_000, 2000)


@pytest.mark.parametrize("count", [6, 7, 10, 28, 100])
def test_interval_of_the_median_covers_it(count: int) -> None:
    """Exactly: its ends are the innermost order statistics whose binomial tails stay under 5 %."""
    interval = harness.summarize([float(index) for index in range(count)]).interval
    assert interval is not None and sum(interval) == count - 1
    below = int(interval[0])
    outside = 2 * sum(math.comb(count, rank) for rank in range(below + 1)) / 2**count
    assert outside <= 0.05 < outside + 2 * math.comb(count, below + 1) / 2**count


def test_csv_has_one_measurement_a_row(tmp_path: Path) -> None:
    path, env = tmp_path / "deep" / "x.csv", harness.environment(CPU, torch.float32)
    measured = harness.Measurement("b", "case", "LoRA", "step", "ms", harness.summarize([1.0, 2.0]))
    harness.write_csv(path, [measured, measured], env)
    row, _ = rows_of(path)
    assert {"method", "unit", "p20", "p80", "low95", "samples", "cpu", "gpu", "torch", "commit", "dtype"} <= set(row)
    assert float(row["p50"]) == 1.5 and row["torch"] == torch.__version__ and row["torch"] in harness.header(env)


# ---- the published loop


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
def test_commit_is_dirty_by_code_not_by_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, rows = tmp_path / "benchmarks/harness.py", tmp_path / "benchmarks/results/rows.csv"
    rows.parent.mkdir(parents=True)
    for path in (code, rows):
        path.write_text("1")

    def git(*command: str) -> str:
        whole = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x", *command]
        return subprocess.run(whole, check=True, capture_output=True, text=True).stdout

    monkeypatch.setattr(harness, "__file__", str(code))
    monkeypatch.setenv("REFLORA_COMMIT", "abc")
    assert harness.commit() == "abc"
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    head = git("rev-parse", "--short", "HEAD").strip()
    rows.write_text("2")
    assert harness.commit() == head
    code.write_text("2")
    assert harness.commit() == f"{head}-dirty"


@pytest.mark.parametrize("scalar", [False, True], ids=["full", "scalar"])
def test_published_loop_does_not_train_from_pefts_start(scalar: bool) -> None:
    A, B = torch.randn(4, 30, requires_grad=True), torch.zeros(20, 4, requires_grad=True)
    x, y = torch.randn(64, 30), torch.randn(64, 20)
    optimizer = torch.optim.AdamW([A, B], lr=1e-2, weight_decay=0.0)
    start = A.detach().clone()
    published_reflora.attach(optimizer, [(A, B)], scalar=scalar)
    for _ in range(5):
        optimizer.zero_grad()
        (x @ (B @ A).T - y).square().mean().backward()
        optimizer.step()
    if scalar:
        assert A.isnan().all() or B.isnan().all()
    else:
        assert torch.equal(B, torch.zeros_like(B)) and torch.equal(A, start)


@pytest.mark.parametrize("scalar", [False, True], ids=["full", "scalar"])
def test_published_loop_sits_out_its_warmup(scalar: bool) -> None:
    """The scalar variant's call at the start counts too, as in the published package."""
    start = spectrum_pair(4, 30, 20, 2.0, 2.0)
    pair, plain = (tuple(factor.clone().requires_grad_() for factor in start) for _ in range(2))
    optimizers = [torch.optim.AdamW(factors) for factors in (pair, plain)]
    published_reflora.attach(optimizers[0], [pair], warmup_steps=3, scalar=scalar)
    equal = []
    for _ in range(4):
        for one, other in zip(pair, plain):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        equal.append(torch.equal(pair[0], plain[0]))
    assert equal == ([True, True, False, False] if scalar else [True, True, True, False])


# ---- the programs, end to end


def test_throughput_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(data, "stdlib_docstrings", texts)
    size = ["--steps", "6", "--warmup", "2", "--batch", "2", "--length", "12", "--rank", "4"]
    throughput.main([*size, "--device", "cpu", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert f"torch {torch.__version__}" in printed and "37 LoRA pairs, r=4" in printed
    figures = medians(tmp_path / "throughput_minilm_cpu.csv", "method", "metric")
    for label in (methods.LABELS[name] for name in methods.DEFAULT):
        assert label in printed
        assert figures[label, "optimizer step"] > 0 and figures[label, "throughput to LoRA"] > 0
        assert 1.5 < figures[label, "loss"] < 3.5
    # gradients, moments and activations of a MiniLM iteration: megabytes, the same for all but for what a step borrows
    assert figures["LoRA", "peak above LoRA"] == 0
    assert 1 < figures["RefLoRA", "peak of training"] < 100
    assert abs(figures["RefLoRA", "state above LoRA"]) < 1 > abs(figures["RefLoRA", "peak above LoRA"])
    assert (tmp_path / "throughput_minilm_cpu.png").read_bytes().startswith(b"\x89PNG")


def test_hub_is_left_alone_where_nothing_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "reachable", lambda: pytest.fail("asked the network"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert not hub.prepare(needed=True)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert not hub.prepare(needed=False) and os.environ.pop("HF_HUB_OFFLINE") == "1"


def test_unreachable_hub_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "WAIT_SECONDS", 0.05)
    monkeypatch.setattr(hub, "_ask", threading.Event().wait)
    hub.reachable.cache_clear()
    assert not hub.reachable()
    hub.reachable.cache_clear()


def test_resize(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every tool finds the same error, that of the truncated singular value decomposition."""
    from benchmarks import resize

    shapes = {"q_proj": (30, 40), "down_proj": (50, 20)}
    monkeypatch.setattr(resize, "SHAPES", shapes)
    resize.main(["--blocks", "2", "--rank", "6", "2", "--runs", "1", "--layers", "q_proj", "down_proj"])
    printed = capsys.readouterr().out
    assert "4 layers, rank 6 to 2: " in printed and "in all: error " in printed
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        A, B = resize.factors(*shape, 6, generator)
        s = torch.linalg.svdvals(B.double() @ A.double())
        wanted = float(s[2:].norm() / s.norm())
        found = re.findall(rf"{name} +(?:reflora|PEFT) +\S+ +(0\.\d+)", printed)
        assert len(found) == 4 and all(abs(float(one) - wanted) < 1e-6 for one in found)
