"""Table 2's program: metrics, the choice of a learning rate, and a series on a tiny model that resumes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_benchmarks import write_rows
from tiny_models import SIZE, save_causal

from benchmarks import data, finetuning, jsonl
from benchmarks.paper import convergence, glue, glue_tasks, tables, tuning

CPU = torch.device("cpu")
SHORT = "--tasks cola --steps 2 --batch 4 --rank 2 --device cpu"
Runs = list[dict[str, Any]]
Series = Callable[[str], Runs]
ROWS = {
    "cola": [{"sentence1": f"the {word} {i}", "label": i % 2} for i, word in enumerate(["cat", "dog"] * 20)],
    "stsb": [{"sentence1": f"a {i}", "sentence2": f"b {i % 3}", "label": 0.5 * (i % 11)} for i in range(44)],
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """With REFLORA_DATA, a folder that has `glue`, rows of the real tasks."""
    for name, rows in ROWS.items():
        if "REFLORA_DATA" in os.environ:
            rows = data.rows(Path(os.environ["REFLORA_DATA"]) / "glue" / name / "train.jsonl.gz")[: len(rows)]
        folder = tmp_path / "data" / name
        write_rows(folder / "train.jsonl.gz", rows)  # type: ignore[arg-type]
        write_rows(folder / "dev.jsonl.gz", rows[:12])  # type: ignore[arg-type]
    return tmp_path / "data"


@pytest.fixture
def series(tiny: None, root: Path, tmp_path: Path) -> Series:
    """Runs the program on more options; gives all that its file has then."""
    out = tmp_path / "runs.jsonl"

    def run(more: str) -> Runs:
        glue.main(["--data", str(root), "--out", str(out), *f"{SHORT} {more}".split()])
        return list(map(json.loads, out.open()))

    return run


def test_series_resumes_and_its_table_names_every_method(
    series: Series, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = "--tasks cola stsb --steps 4 --alpha 2"
    some = f"{size} --seeds 0 1 --lrs 1e-3 1e-2 --methods"
    series(f"{some} lora")
    series(f"{some} lora reflora")
    runs = series(f"{size} --seeds 0 --lrs 1e-3 --methods dora lora-rite full")
    assert len(runs) == 2 * 2 * 2 * 2 + 2 * 3
    assert all(run["finite"] and run["machine"]["torch"] == torch.__version__ for run in runs)
    assert set(runs[0]["scores"]) == {"Matthews"} and runs[0]["score"] == runs[0]["scores"]["Matthews"]
    pair = next(run for run in runs if run["task"] == "stsb")
    assert pair["score"] == pytest.approx(sum(pair["scores"].values()) / 2, abs=1e-3)
    monkeypatch.setattr(finetuning, "train", lambda *_: pytest.fail("made a run"))
    capsys.readouterr()
    series(f"{some} lora reflora --table")
    printed = capsys.readouterr().out
    assert ": 16 runs, the last on" in printed and "RefLoRA" in printed
    assert "81.88" in printed  # of the paper: CoLA and STS-B


def test_same_seed_same_run_and_the_rate_rises_and_falls(tiny: None, root: Path) -> None:
    task = glue_tasks.TASKS["cola"].load(root)
    recipe = finetuning.Recipe("minilm", "reflora", 3, 1e-2, 6, 4, 16, 2, 2, lr_warmup=2, dropout=0.3)
    seen: list[float] = []

    def watch(_: int, run: finetuning.Trained) -> None:
        seen.append(run.optimizer.param_groups[0]["lr"])

    first = finetuning.train(recipe, task, CPU, after_step=watch)
    again = finetuning.train(recipe, task, CPU)
    assert first.losses == again.losses and first.finite
    assert seen == pytest.approx([1e-2, 1e-2, 7.5e-3, 5e-3, 2.5e-3, 0.0])
    assert first.model.base_model.model.dropout.p == 0.3  # type: ignore[union-attr]
    one, other = (finetuning.outputs(run, task.eval, 16, CPU) for run in (first, again))
    assert torch.equal(one, other) and one.shape == (12, 2)
    alone = torch.cat([finetuning.outputs(first, [example], 16, CPU) for example in task.eval])
    torch.testing.assert_close(one, alone, rtol=1e-4, atol=1e-5)


def test_metrics_are_glues() -> None:
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [0.0, 3.0], [5.0, 1.0]])
    labels = [0.0, 1.0, 0.0, 0.0]
    assert glue_tasks.TASKS["qqp"].scores(logits, labels) == pytest.approx({"accuracy": 75.0, "F1": 100 * 2 / 3})
    assert glue_tasks.TASKS["cola"].scores(logits, labels)["Matthews"] == pytest.approx(100 / 3**0.5)
    scores = glue_tasks.TASKS["stsb"].scores(torch.tensor([[1.0], [2.0], [4.0]]), [1.0, 2.0, 3.0])
    assert scores == pytest.approx({"Pearson": 98.198, "Spearman": 100.0}, abs=1e-3)
    assert glue_tasks.TASKS["stsb"].scores(torch.ones(3, 1), [1.0, 2.0, 3.0]) == {"Pearson": 0.0, "Spearman": 0.0}


def test_learning_rates_are_compared_on_the_seeds_they_share() -> None:
    def run(lr: float, seed: int, score: float) -> dict[str, object]:
        return {"method": "lora", "task": "cola", "lr": lr, "seed": seed, "score": score}

    whole = [run(1e-3, 0, 60.0), run(1e-3, 1, 50.0), run(1e-2, 0, 70.0), run(1e-2, 1, 30.0)]
    assert tuning.best(whole) == {("lora", "cola"): (1e-3, [60.0, 50.0])}
    # a series that was stopped: one rate alone has a second seed
    assert tuning.best([*whole[:3]]) == {("lora", "cola"): (1e-2, [70.0])}
    # chosen on the first seed, told of all
    assert tuning.best([whole[0], whole[2], whole[3]]) == {("lora", "cola"): (1e-2, [70.0, 30.0])}
    assert tuning.best([run(1e-3, 0, 60.0), run(1e-2, 1, 70.0)]) == {("lora", "cola"): (1e-2, [70.0])}
    # one that diverged has lost, whatever the others have
    gone = {**run(1e-2, 0, 0.0), "finite": False}
    assert tuning.best([run(1e-3, 0, -1.5), gone]) == {("lora", "cola"): (1e-3, [-1.5])}


def test_other_dev_rows_are_another_run_and_repeats_are_one(series: Series, capsys: pytest.CaptureFixture[str]) -> None:
    some = "--methods lora lora --seeds 0 0 --lrs 1e-3 1e-3"
    series(f"{some} --eval-rows 4")
    assert ": 1 runs" in capsys.readouterr().out
    assert [run["eval_rows"] for run in series(some)] == [4, 12]


def test_other_texts_are_another_run(series: Series, root: Path) -> None:
    """Of the same number of rows: a line of the file stood for whatever the data had become."""
    some = "--methods lora --seeds 0 --lrs 1e-3"
    series(some)
    write_rows(root / "cola" / "train.jsonl.gz", [{**row, "sentence1": "else"} for row in ROWS["cola"]])  # type: ignore[arg-type,dict-item]
    series(some)
    runs = series(some)
    assert len(runs) == 2 and runs[0]["rows"] == runs[1]["rows"]


def test_stopped_by_hand_it_says_where_it_goes_on(tmp_path: Path) -> None:
    def interrupted(_: object) -> dict[str, float]:
        raise KeyboardInterrupt

    record = finetuning.Record(tmp_path / "runs.jsonl", {"cpu": "x"})
    with pytest.raises(SystemExit, match="stopped; the same command goes on from .*runs.jsonl"):
        finetuning.series(record, [{"seed": 0}], interrupted, "runs")


@pytest.mark.parametrize("content", [b"\x89PNG\xff\xfe", b"commit,lr\n1,2\n"])
def test_a_file_of_something_else_is_left_alone(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "figure"
    other.write_bytes(content)
    with pytest.raises(SystemExit):
        glue.parse(["--data", "x", "--out", str(other)])
    assert "--out: expected a file of JSON lines, or none yet" in capsys.readouterr().err
    other.write_bytes(b'{"seed": 1}\n[2]\n\xff\n')
    assert list(jsonl.read(other)) == [{"seed": 1}]


def test_dropout_of_the_head_is_set_wherever_it_is() -> None:
    import transformers

    config = transformers.RobertaConfig(**SIZE, vocab_size=50, num_labels=2)
    model = transformers.RobertaForSequenceClassification(config)
    inner = model.roberta.embeddings.dropout.p
    finetuning._set_dropout(model, 0.35)
    assert model.classifier.dropout.p == 0.35 and model.roberta.embeddings.dropout.p == inner != 0.35


def test_papers_averages_come_out_of_its_columns() -> None:
    for method, average in glue_tasks.AVERAGES.items():
        assert sum(glue_tasks.PAPER[method].values()) / 8 == pytest.approx(average, abs=0.006), method


def test_convergence_takes_the_tuned_rates_and_keeps_every_loss(series: Series, root: Path, tmp_path: Path) -> None:
    tuned = series("--steps 5 --seeds 0 1 --lrs 1e-3 3e-2 --methods lora reflora")
    best = {method: lr for (method, _), (lr, _) in tuning.best(tuned).items()}
    out = tmp_path / "deep" / "convergence.jsonl"
    size = "--task cola --steps 5 --batch 4 --rank 2 --device cpu --seeds 0 1"
    some = ["--data", str(root), "--tuned", str(tmp_path / "runs.jsonl"), "--out", str(out), *size.split(), "--methods"]
    convergence.main([*some, "lora", "reflora"])
    runs = list(map(json.loads, out.open()))
    assert [len(run["losses"]) for run in runs] == [5] * 4
    assert {run["method"]: run["lr"] for run in runs} == best
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG") and out.with_suffix(".svg").exists()
    with pytest.raises(SystemExit, match="--tuned: expected runs of task cola, model minilm, .* got none for dora"):
        convergence.main([*some, "lora", "dora"])


def test_running_mean() -> None:
    assert convergence.smoothed([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]


def test_line_that_was_cut_off_is_made_again(tmp_path: Path) -> None:
    record = finetuning.Record(tmp_path / "runs.jsonl", {"cpu": "x"})
    record.add({"seed": 0})
    record.path.write_text(record.path.read_text() + '{"seed": 1, "sco')
    made = finetuning.series(record, [{"seed": 0}, {"seed": 1}], lambda key: {"score": 1.0}, "runs")
    assert [run["seed"] for run in made] == [0, 1] and made[1]["score"] == 1.0
    assert [run["seed"] for run in record.runs()] == [0, 1]


def test_rates_tuned_on_the_first_seed(series: Series, capsys: pytest.CaptureFixture[str]) -> None:
    runs = series("--methods lora reflora --seeds 0 1 2 --lrs 1e-3 1e-2 --tune-first-seed")
    assert ": 8 runs" in capsys.readouterr().out
    for method in ("lora", "reflora"):
        own = [run for run in runs if run["method"] == method]
        first = max((run for run in own if run["seed"] == 0), key=lambda run: run["score"])
        assert [run["lr"] for run in own if run["seed"] > 0] == 2 * [first["lr"]]


def test_line_of_an_older_file_has_the_defaults_of_what_it_does_not_say(tmp_path: Path) -> None:
    key = finetuning.key("cola", finetuning.Recipe("minilm", "lora", 0, 1e-3, 2, 4, 16, 2, 2))
    record = finetuning.Record(tmp_path / "runs.jsonl", {})
    record.add({name: value for name, value in key.items() if name not in ("targets", "lora_dropout")} | {"score": 1.0})
    found = record.find([key, {**key, "lora_dropout": 0.1}])
    assert found[0] is not None and found[0]["score"] == 1.0 and found[1] is None


def test_hub_has_every_task(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"sentence": "x", "premise": "x", "hypothesis": "y", "sentence1": "x", "sentence2": "y"}

    def load_dataset(name: str, config: str) -> dict[str, list[dict[str, object]]]:
        assert name == "nyu-mll/glue" and config in glue_tasks.TASKS
        made = [{**rows, "label": label} for label in ([1.0, 2.5, 4.0] if config == "stsb" else [0, 1, 2])]
        mnli = ("train", "validation_matched", "validation_mismatched", "test_matched")
        return dict.fromkeys(mnli if config == "mnli" else ("train", "validation", "test"), made)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for name in glue_tasks.TASKS:
        task = glue_tasks.TASKS[name].load("hub")
        assert len(task.eval) == 3 and task.classes == (1 if name == "stsb" else 3)


@pytest.mark.parametrize(
    ("name", "labels", "classes"), [("stsb", (3, 5), 1), ("mrpc", (0.0, 1.0), 2)], ids=["regression", "classes"]
)
def test_the_task_not_the_spelling_of_its_labels_says_what_is_predicted(
    name: str, labels: tuple[float, float], classes: int, tmp_path: Path
) -> None:
    for split in ("train", "dev"):
        rows = [{"sentence1": "a", "sentence2": "b", "label": label} for label in labels]
        write_rows(tmp_path / name / f"{split}.jsonl", rows)  # type: ignore[arg-type]
    assert glue_tasks.TASKS[name].load(tmp_path).classes == classes


def test_tables_keep_unlike_runs_apart_and_mark_unequal_ones() -> None:
    base = {"task": "cola", "model": "m", "rank": 8, "alpha": 8, "steps": 3, "batch": 4, "seed": 0, "lr": 1e-3}
    runs = [
        {**base, "method": "lora", "rows": 100, "score": 10.0}, {**base, "method": "lora", "rows": 100, "score": 99.0},
        {**base, "method": "lora", "rows": 50, "score": 20.0}, {**base, "method": "reflora", "rows": 100, "score": 5.0},
        {**base, "method": "reflora", "rows": 100, "score": 6.0, "lr": 1e-2},
    ]  # fmt: skip
    first, second = tables.settings(runs).values()
    assert [run["score"] for run in first] == [10.0, 5.0, 6.0] and [run["score"] for run in second] == [20.0]
    lines = glue.table(first, ["lora", "reflora"], ["cola"]).splitlines()
    assert "10.00 (0.001)*" in lines[2] and "6.00 (0.01) " in lines[4]


@pytest.mark.parametrize(
    "more, message",
    [
        ("--batch 41", "glue: --batch: expected at most the 40 rows of cola, got 41"),
        # random weights stood in for those of the hub, as in a benchmark of speed
        ("--model deberta-v3-base", "--model: expected trained weights of deberta-v3-base, got random weights"),
        ("--model llama2-7b", "--model: expected trained weights, got llama2-7b"),
    ],
)
def test_what_data_and_model_lack_is_told_in_one_line(series: Series, more: str, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        series(more)


def test_a_model_of_another_kind_is_refused(root: Path, tmp_path: Path) -> None:
    causal = save_causal(tmp_path / "model", ["some words", "and others"])
    with pytest.raises(SystemExit, match="--model: expected a text model, got .* of causal kind"):
        glue.main(["--data", str(root), "--model", str(causal), "--out", str(tmp_path / "runs.jsonl"), *SHORT.split()])
