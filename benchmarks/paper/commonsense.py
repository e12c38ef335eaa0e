"""Table 3: commonsense reasoning with a causal model: `python -m benchmarks.paper.commonsense --data FOLDER`.

One adapter is trained on all tasks and answers the test set of each. A run has a folder of its own: its checkpoint,
the answers so far, and in the end the adapter as PEFT reads it; when it is whole it has its line in `runs.jsonl`. A
series that was stopped goes on where it was, in the middle of a training or of a test set. The learning rate of every
method is chosen from the same grid, on the test sets as in the paper, which flatters all alike.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import checkpoints, data, finetuning, generation, harness, jsonl, models, unused
from . import arguments, commonsense_tasks, tables, tuning
from .commonsense_tasks import PAPER, TARGETS, TASKS, Question

METHODS = ("lora", "preclora", "nora+", "dora", "reflora", "reflora-s")
EPOCHS, LR_WARMUP, DROPOUT = 2, 100, 0.05
LOSS_WINDOW = 20
# base weights are trained, or changed as PiSSA does: what would be saved is no adapter of the base model
NO_ADAPTER = ("full", "bitfit", "pissa")
# a stopped training begins anew: AdaLoRA's ranks and the published hooks are in no optimizer's state
NOT_KEPT = ("adalora", "published", "published-s")
Tests = Mapping[str, Sequence[Question]]


def recipe(options: argparse.Namespace, rows: int, method: str, lr: float, seed: int) -> finetuning.Recipe:
    """The paper's Appendix D, with the options' size; --steps in place of the epochs."""
    steps = options.steps or EPOCHS * (rows // options.batch)
    lr_warmup = min(LR_WARMUP, steps // 10)
    return finetuning.Recipe(
        hub_id(options), method, seed, lr, steps, options.batch, options.length, options.rank, options.alpha, 0.0,
        lr_warmup, arguments.plain_steps(options, method), rows=rows, bfloat16=options.bfloat16,
        targets=options.targets, lora_dropout=DROPOUT,
    )  # fmt: skip


def run(options: argparse.Namespace, train: data.Task, tests: Tests, key: Mapping[str, Any]) -> dict[str, Any]:
    """Train, answer, keep the adapter; what the line of the run holds besides its key."""
    tidy(options)
    folder = options.out / name_of(key)
    folder.mkdir(parents=True, exist_ok=True)
    with checkpoints.alone(folder):
        return make(options, train, tests, key, folder)


def make(
    options: argparse.Namespace, train: data.Task, tests: Tests, key: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    kept = checkpoints.Checkpoint(folder / "checkpoint.pt", options.checkpoint_every)
    bar = harness.bar(key["steps"], f"{folder.name}: train")

    def watch(step: int, trained: finetuning.Trained) -> None:
        bar.update(step - bar.n)

    device = torch.device(options.device)
    made = finetuning.recipe_of(key)
    checkpoint = kept if made.method not in NOT_KEPT else None
    trained = finetuning.train(made, train, device, options.backend, watch, checkpoint, options.micro_batch)
    bar.close()
    scores = {name: test(options, trained, folder, name, questions) for name, questions in tests.items()}
    trained.model.save_pretrained(str(folder / "adapter"))  # type: ignore[operator]
    return {
        "scores": {name: round(score, 4) for name, score in scores.items()},
        "score": round(statistics.fmean(scores.values()), 4),
        "finite": trained.finite,
        "loss": statistics.fmean(trained.losses[-LOSS_WINDOW:]) if trained.finite else None,
        "seconds": round(trained.seconds, 1),
        "folder": folder.name,
    }


def tidy(options: argparse.Namespace) -> None:
    """Remove the checkpoints of runs whose lines are written: not before, or a kill in between would cost the run."""
    for run in jsonl.read(options.out / "runs.jsonl"):
        (options.out / run["folder"] / "checkpoint.pt").unlink(missing_ok=True)


def name_of(key: Mapping[str, Any]) -> str:
    """Of a run's folder: what one looks for, and a digest of all the rest."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:8]
    return f"{key['method']}-lr{key['lr']:g}-seed{key['seed']}-{digest}"


def test(
    options: argparse.Namespace, trained: finetuning.Trained, folder: Path, name: str, questions: Sequence[Question]
) -> float:
    """Accuracy in per cent; every answer is in the folder, and is not asked for again."""
    path = folder / f"answers-{name}.jsonl"
    found = {one["index"]: one["right"] for one in jsonl.read(path)}
    left = [index for index in range(len(questions)) if index not in found]
    prompts = [questions[index].prompt for index in left]
    bar = harness.bar(len(questions), f"{folder.name}: {name}")
    bar.update(len(found))
    made = generation.responses(
        trained.model, trained.tokenizer, prompts, options.eval_batch, options.beams, options.new_tokens
    )
    for batch in made:
        lines = []
        for place, response in batch:
            index, answer = left[place], TASKS[name].extract(response)
            found[index] = answer == questions[index].answer
            lines.append({"index": index, "response": response, "answer": answer, "right": found[index]})
        jsonl.append(path, lines)
        bar.update(len(batch))
    bar.close()
    return 100 * statistics.fmean(found[index] for index in range(len(questions)))


def table(runs: Sequence[Mapping[str, Any]], options: argparse.Namespace) -> str:
    """A method's mean over seeds at its best learning rate, task by task, and below it the paper's line."""
    runs, homes = tables.by_name(runs, options.methods)
    names = {hub_id: name for name, hub_id in models.LLAMA_IDS.items()}
    table_3 = PAPER.get((names.get(runs[0]["model"], ""), runs[0]["rank"]), {})
    theirs = {}
    for method, home in homes.items():
        if home not in table_3:
            continue
        *by_task, average = table_3[home]
        columns = dict(zip(TASKS, by_task))
        whole = set(options.tasks) == set(TASKS)
        chosen = [columns[name] for name in options.tasks]
        theirs[method] = [*chosen, average if whole else statistics.fmean(chosen)]
    own = {}
    for (method, _), (lr, averages) in tuning.best(runs).items():
        at_best = [run["scores"] for run in runs if run["method"] == method and run["lr"] == lr]
        means = [f"{statistics.fmean(scores[name] for scores in at_best):.2f}" for name in options.tasks]
        short = "*" * ((method, "commonsense") in tuning.unequal(runs))
        own[method] = [*means, tables.cell(averages, f" ({lr:g}){short}")]
    return tables.lines(homes, [TASKS[name].label for name in options.tasks], own, theirs)


# ---- the program


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    made = arguments.parser("commonsense", (__doc__ or "").split("\n")[0], METHODS)
    made.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    arguments.add_grid(made, (1e-4, 2e-4, 3e-4, 5e-4))
    made.add_argument("--targets", default=TARGETS, help="layers that LoRA is put on, with commas between")
    made.add_argument("--micro-batch", type=int, help="most examples in memory at once, in training")
    made.add_argument("--checkpoint-every", type=int, default=500, metavar="STEPS")
    made.add_argument("--eval-batch", type=int, default=16, help="prompts answered at once")
    made.add_argument("--beams", type=int, default=4)
    made.add_argument("--new-tokens", type=int, default=32, help="most tokens of an answer")
    made.set_defaults(
        model="llama-7b", seeds=[0], batch=16, alpha=None, length=256, rank=32, bfloat16=True,
        out=Path("benchmarks/results/paper/commonsense"),
    )  # fmt: skip
    options = made.parse_args(argv)
    options.alpha = 2 * options.rank if options.alpha is None else options.alpha
    if options.data is None and not options.table:
        made.error("--data: expected a folder with commonsense_170k.json or train files, and the eight test sets")
    for name in set(options.methods) & set(NO_ADAPTER):
        made.error(f"--methods: expected methods that train an adapter alone, got {name}")
    arguments.check(made, options, ("micro_batch", "checkpoint_every", "eval_batch", "beams", "new_tokens"))
    arguments.check_rates(made, "--lrs", options.lrs)
    harness.make_folder(made, options.out, options.out)
    return options


def load(options: argparse.Namespace, end: str) -> tuple[data.Task, dict[str, Sequence[Question]]]:
    """Training texts and test sets. Raises OSError or ValueError."""
    root = Path(options.data)
    texts = data.drawn(commonsense_tasks.training_texts(root, options.tasks, end), options.train_rows)
    tests = {name: data.drawn(TASKS[name].questions(root), options.eval_rows) for name in options.tasks}
    if len(texts) < options.batch:
        raise ValueError(f"--batch: expected at most the {len(texts)} training texts, got {options.batch}.")
    return data.Task("commonsense", texts, [], 1, "causal"), tests


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    env = harness.environment(torch.device(options.device), torch.bfloat16)
    record = finetuning.Record(options.out / "runs.jsonl", env)
    asked = [run for run in record.runs() if set(options.tasks) <= run["scores"].keys()]
    if options.table and not asked:
        raise SystemExit(f"commonsense: expected runs of {', '.join(options.tasks)} in {record.path}, found none.")
    if not options.table:
        try:
            asked = series(options, record)
        except (OSError, ValueError, ImportError) as error:
            raise SystemExit(f"commonsense: {error}") from error
    for what, runs in tables.settings(asked).items():
        print(f"\n{what}: {len(runs)} runs, the last on {harness.header(runs[-1]['machine'])}")
        print(table(runs, options))


def series(options: argparse.Namespace, record: finetuning.Record) -> list[dict[str, Any]]:
    print(harness.header(record.env), flush=True)
    train, tests = load(options, models.end_of_text(hub_id(options)))
    asked = {name: getattr(options, name) for name in ("beams", "new_tokens")}
    asked["questions"] = {name: len(questions) for name, questions in tests.items()}
    asked["data"] = data.digest(train.train, *tests.values())
    epochs = {} if options.steps else {"epochs": EPOCHS}

    def key(task: str, method: str, lr: float, seed: int) -> dict[str, Any]:
        return {**finetuning.key(task, recipe(options, len(train.train), method, lr, seed)), **epochs, **asked}

    names = ["commonsense"], options.methods, options.lrs, options.seeds
    done = tuning.grid(record, key, names, lambda one: run(options, train, tests, one), options.tune_first_seed)
    tidy(options)
    return done


def hub_id(options: argparse.Namespace) -> str:
    """The names of presets stand for real weights here."""
    return models.LLAMA_IDS.get(options.model, options.model)


if __name__ == "__main__":
    unused.leave_out()
    main()
