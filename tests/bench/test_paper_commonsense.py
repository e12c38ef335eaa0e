"""Table 3's program: prompts, answers, and a series on a tiny causal model that is stopped and goes on."""

from __future__ import annotations

import gzip
import itertools
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import save_causal

from benchmarks import checkpoints, finetuning, generation, jsonl, models
from benchmarks.paper import commonsense, commonsense_tasks
from benchmarks.paper.commonsense_tasks import TASKS

CPU = torch.device("cpu")
# one row of each layout; with REFLORA_DATA, a folder that has `commonsense`, the rows are real ones
ANSWERS = {
    "boolq": ["true", "false"], "piqa": ["solution1", "solution2"], "social_i_qa": ["answer1", "answer2", "answer3"],
    "hellaswag": ["ending1", "ending2", "ending3", "ending4"], "winogrande": ["option1", "option2"],
    "ARC-Easy": ["answer1", "answer2", "answer3", "answer4"], "ARC-Challenge": ["answer1", "answer2", "answer3"],
    "openbookqa": ["answer1", "answer2", "answer3", "answer4"],
}  # fmt: skip


def made_rows(folder: str, count: int) -> list[dict[str, str]]:
    choices = ANSWERS[folder]
    rows = []
    for index in range(count):
        options = " ".join(f"{choice.capitalize()}: thing {index + place}" for place, choice in enumerate(choices))
        answer = choices[index % len(choices)]
        rows.append({
            "instruction": f"Please choose: what is {index}?\n\n{options}\n\nAnswer format: {'/'.join(choices)}",
            "input": "", "output": f"the correct answer is {answer}", "answer": answer,
        })  # fmt: skip
    return rows


def some_rows(folder: str, split: str, count: int) -> list[dict[str, str]] | None:
    """Real ones where there are; None for a file that a real folder lacks."""
    if "REFLORA_DATA" not in os.environ:
        return made_rows(folder, count) if (folder, split) != ("hellaswag", "train") else None
    root = Path(os.environ["REFLORA_DATA"]) / "commonsense"
    task = next(task for task in TASKS.values() if folder in task.folders)
    path = task.folder(root) / f"{split}.json.gz"
    return json.loads(gzip.decompress(path.read_bytes()))[:count] if path.exists() else None


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for folder in ANSWERS:
        (root / folder).mkdir()
        for split, count in (("train", 6), ("test", 5)):
            rows = some_rows(folder, split, count)
            if rows is not None:
                (root / folder / f"{split}.json").write_text(json.dumps(rows, indent=4))
    return root


@pytest.fixture(scope="module")
def model(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [example.text for example in commonsense_tasks.training_texts(root, list(TASKS), "")]
    return save_causal(tmp_path_factory.mktemp("model"), texts)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def arguments(root: Path, model: Path, out: Path, more: str) -> list[str]:
    size = "--steps 4 --batch 2 --length 96 --rank 2 --new-tokens 3 --beams 2 --checkpoint-every 1 --eval-batch 3"
    paths = ["--data", str(root), "--model", str(model), "--out", str(out)]
    return [*paths, *f"--device cpu {size} {more}".split()]


def lines(path: Path) -> list[dict[str, Any]]:
    return list(jsonl.read(path))


@pytest.mark.parametrize(
    ("task", "response", "answer"),
    [
        ("boolq", "the correct answer is true", "true"),
        ("boolq", "False, no: false then true", "false"),
        ("piqa", "solution2 not solution1", "solution2"),
        ("siqa", "the correct answer is answer3.", "answer3"),
        ("siqa", "Answer3", ""),
        ("hellaswag", "ending5 ending4", "ending4"),
        ("winogrande", "option12", "option1"),
        ("arc-e", "answer5", "answer5"),
        ("arc-c", "", ""),
        ("obqa", "answer6", ""),
        ("boolq", "I do not know. ### Response: true", ""),
    ],
)
def test_answers_are_the_first_that_is_named(task: str, response: str, answer: str) -> None:
    """As LLM-Adapters takes them: letter for letter, and wherever in the response."""
    assert TASKS[task].extract(response) == answer


def test_prompt_is_alpacas_with_and_without_input() -> None:
    bare = commonsense_tasks.prompt({"instruction": "Do it.", "input": ""})
    assert bare.endswith("request.\n\n### Instruction:\nDo it.\n\n### Response:\n")
    assert "further context" not in bare
    paired = commonsense_tasks.prompt({"instruction": "Do it.", "input": "Here."})
    assert "further context. Write" in paired and "\n\n### Input:\nHere.\n\n### Response:\n" in paired


def test_series_trains_answers_and_resumes(
    root: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments(root, model, tmp_path, "--methods lora reflora --lrs 1e-3 1e-2 --seeds 0 1")
    commonsense.main([*given, "--tune-first-seed"])
    printed = capsys.readouterr().out
    assert ": 6 runs" in printed and "RefLoRA" in printed and "ARCc" in printed and "±" in printed
    runs = lines(tmp_path / "runs.jsonl")
    assert len(runs) == 6 and sum(run["seed"] == 1 for run in runs) == 2
    for run in runs:
        assert run["finite"] and set(run["scores"]) == set(TASKS) and run["machine"]["torch"] == torch.__version__
        folder = tmp_path / run["folder"]
        assert (folder / "adapter" / "adapter_model.safetensors").exists() and not (folder / "checkpoint.pt").exists()
        for name in TASKS:
            answers = lines(folder / f"answers-{name}.jsonl")
            assert sorted(one["index"] for one in answers) == list(range(5))
            assert run["scores"][name] == pytest.approx(100 * sum(one["right"] for one in answers) / 5)
    monkeypatch.setattr(finetuning, "train", lambda *_, **__: pytest.fail("made a run"))
    commonsense.main([*given, "--tune-first-seed"])
    commonsense.main([*given, "--table"])
    assert ": 6 runs" in capsys.readouterr().out


def test_stopped_in_training_and_in_a_test_set_it_ends_as_if_it_never_had_been(
    root: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    def outcome(out: Path) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        (run,) = lines(out / "runs.jsonl")
        return run["scores"], load_file(out / run["folder"] / "adapter" / "adapter_model.safetensors")

    more = "--methods reflora --lrs 1e-2 --seeds 0"
    commonsense.main(arguments(root, model, tmp_path / "whole", more))
    stopped = arguments(root, model, tmp_path / "stopped", more)
    backward, calls = finetuning._backward, 0

    def stop_at_third(*given: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return backward(*given)

    monkeypatch.setattr(finetuning, "_backward", stop_at_third)
    with pytest.raises(SystemExit, match="goes on"):
        commonsense.main(stopped)
    assert not (tmp_path / "stopped" / "runs.jsonl").exists()
    generate, asked, most = generation._generate, 0, 9

    def stop_at_most(model: Any, inputs: Any, *given: Any) -> torch.Tensor:
        nonlocal asked
        if asked >= most:
            raise KeyboardInterrupt
        asked += len(inputs["input_ids"])
        return generate(model, inputs, *given)

    monkeypatch.setattr(generation, "_generate", stop_at_most)
    with pytest.raises(SystemExit, match="goes on"):
        commonsense.main(stopped)
    assert calls == 3 + 2  # the first two steps were kept
    monkeypatch.setattr(finetuning, "_backward", lambda *_: pytest.fail("trained again"))
    most = 100
    commonsense.main(stopped)
    assert asked == 8 * 5
    torch.testing.assert_close(outcome(tmp_path / "stopped"), outcome(tmp_path / "whole"), rtol=0, atol=0)


def test_batched_answers_are_those_of_single_prompts(root: Path, model: Path) -> None:
    """Padding on the left, masked: the published evaluation has no mask, and must ask one prompt at a time."""
    recipe = finetuning.Recipe(str(model), "lora", 0, 1e-3, 1, 2, 64, 2, 4, targets="q_proj")
    run = finetuning.build(recipe, 1, CPU, kind="causal")
    prompts = [question.prompt[: 20 + 31 * index] for index, question in enumerate(TASKS["obqa"].questions(root))]
    for beams in (1, 3):
        alone, together = (
            list(itertools.chain(*generation.responses(run.model, run.tokenizer, prompts, size, beams, 6)))
            for size in (1, 4)
        )
        assert dict(together) == dict(alone) and sorted(dict(alone)) == list(range(5))
        assert [index for index, _ in together] == [4, 3, 2, 1, 0]  # the longest first


def test_170k_file_takes_the_place_of_the_eight_and_texts_end(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    every = commonsense_tasks.training_texts(root, list(TASKS), "</s>")
    assert len(every) == 7 * 6 and "no train file in" in capsys.readouterr().err  # hellaswag comes without
    assert all(example.text.endswith("</s>") and "the correct answer is" in example.text for example in every)
    (tmp_path / "commonsense_170k.json").write_text(json.dumps(made_rows("boolq", 3)))
    assert len(commonsense_tasks.training_texts(tmp_path, list(TASKS), "")) == 3


def test_table_has_the_papers_lines() -> None:
    options = SimpleNamespace(methods=["reflora", "lora"], tasks=list(TASKS))
    run = {"task": "commonsense", "method": "reflora", "seed": 0, "model": "meta-llama/Llama-2-7b-hf", "rank": 32}
    scores = {1e-4: 40.0, 2e-4: 50.0}
    runs = [{**run, "lr": lr, "score": score, "scores": dict.fromkeys(TASKS, score)} for lr, score in scores.items()]
    printed = commonsense.table(runs, options)  # type: ignore[arg-type]
    assert printed.splitlines()[2].split() == ["RefLoRA", *(9 * ["50.00"]), "(0.0002)"]
    assert printed.splitlines()[3].split()[-1] == "80.78" and "LoRA-Pro" not in printed


def test_papers_averages_come_out_of_its_columns() -> None:
    """DoRA's rows are copied from its own paper with one digit, and one of theirs does not add up."""
    for figures in commonsense_tasks.PAPER.values():
        for method, (*columns, average) in figures.items():
            assert sum(columns) / 8 == pytest.approx(average, abs=0.2 if method in ("dora", "lora") else 0.02)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--targets q_proj,w_proj", "got 'w_proj', which no layer has"),
        ("--data nowhere", "expected a folder"),
        ("--model nowhere/none", "--model: expected a folder or the hub id"),
        ("--batch 1000", "--batch: expected at most the 42 training texts"),
    ],
)
def test_what_data_and_model_lack_is_told_in_one_line(
    root: Path, model: Path, tmp_path: Path, more: str, message: str
) -> None:
    with pytest.raises(SystemExit, match=message):
        commonsense.main(arguments(root, model, tmp_path, f"--methods lora --seeds 0 {more}"))


def test_model_that_is_not_causal_is_refused(root: Path, tmp_path: Path, tiny: None) -> None:
    with pytest.raises(SystemExit, match="causal"):
        commonsense.main(arguments(root, Path("minilm"), tmp_path, "--methods lora"))


def test_a_run_that_another_program_makes_is_left_to_it(tmp_path: Path) -> None:
    first = checkpoints.alone(tmp_path)
    with first, pytest.raises(OSError, match="another program makes this run"), checkpoints.alone(tmp_path):
        pass
    with checkpoints.alone(tmp_path):
        pass


def test_rows_of_another_layout_are_refused(tmp_path: Path) -> None:
    (tmp_path / "boolq").mkdir()
    (tmp_path / "boolq" / "test.json").write_text(json.dumps([{"instruction": "x", "label": 1}]))
    message = "expected rows with texts instruction, output, answer, got instruction, label"
    with pytest.raises(ValueError, match=message):
        TASKS["boolq"].questions(tmp_path)


def test_names_with_weights_are_presets() -> None:
    assert models.preset("meta-llama/Meta-Llama-3-8B") is models.PRESETS["llama3-8b"]
    assert models.preset("somebody/else") is models.OTHER
