"""One fine-tuning run of one method, and files of runs that a stopped series resumes from."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import batches, data, harness, jsonl, methods, models, variants
from .checkpoints import Checkpoint, Trained

EVAL_BATCH = 64


@dataclass(frozen=True)
class Recipe:
    """What makes two runs the same run.

    lr falls linearly to zero after `lr_warmup` rising steps; plain_steps: of AdamW before RefLoRA starts, None for
    the start that it has by itself, 0 also where a method has none; dropout: in front of the head, None for the
    model's own; rows: training examples; bfloat16: autocast, weights and optimizer stay as they are; targets: of
    LoRA, with commas between, the preset's where empty; lora_dropout: in front of A.
    """

    model: str
    method: str
    seed: int
    lr: float
    steps: int
    batch: int
    length: int
    rank: int
    alpha: int
    weight_decay: float = 0.01
    lr_warmup: int = 0
    plain_steps: int | None = 0
    dropout: float | None = None
    rows: int = 0
    bfloat16: bool = False
    targets: str = ""
    lora_dropout: float = 0.0


def build(
    recipe: Recipe, classes: int, device: torch.device, backend: str | None = None, kind: str = "text"
) -> Trained:
    """The model and its optimizer before the first step. Raises ValueError for a model of another kind."""
    preset = models.preset(recipe.model)
    loaded = models.load(recipe.model, classes, device, recipe.seed, preset.dtype, preset.checkpointing, trained=True)
    if loaded.kind != kind:
        raise ValueError(f"--model: expected a {kind} model, got {recipe.model}, a model of {loaded.kind} kind.")
    targets = tuple(recipe.targets.split(",")) if recipe.targets else preset.targets
    adapter = variants.Adapter(recipe.rank, recipe.alpha, targets, recipe.seed, recipe.steps, recipe.lora_dropout)
    method = methods.METHODS[recipe.method]
    model = variants.build(method.variant, loaded, adapter).train()
    _set_dropout(model, recipe.dropout)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    setting = methods.Setting(
        recipe.lr, recipe.plain_steps, recipe.weight_decay, backend, scaling=recipe.alpha / recipe.rank
    )
    subject = methods.Subject(parameters, variants.pairs_of(model), setting, model)
    if method.start:
        method.start(subject)
    optimizer = methods.build(recipe.method, subject)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(recipe, step))
    return Trained(model, loaded.tokenizer, loaded.kind, optimizer, schedule, device, list(subject.pairs))


def train(
    recipe: Recipe,
    task: data.Task,
    device: torch.device,
    backend: str | None = None,
    after_step: Callable[[int, Trained], None] = lambda step, run: None,
    checkpoint: Checkpoint | None = None,
    micro_batch: int | None = None,
) -> Trained:
    """Batches padded to their longest text, an order and dropout masks that depend on the seed alone.

    checkpoint: where the run is kept, and goes on from if it is there. micro_batch: most examples in memory at once.
    """
    run = build(recipe, task.classes, device, backend, task.kind)
    torch.manual_seed(recipe.seed)
    if checkpoint:
        checkpoint.load(run)
    done = len(run.losses)
    draws = itertools.islice(batches.batches(task.train, recipe.batch, recipe.seed), done, None)
    began = time.perf_counter() - run.seconds
    for step in range(done + 1, recipe.steps + 1):
        run.losses.append(_backward(run, recipe, next(draws), micro_batch or recipe.batch))
        run.optimizer.step()
        run.schedule.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.seconds = time.perf_counter() - began
        after_step(step, run)
        if checkpoint and checkpoint.due(step, recipe.steps):
            checkpoint.save(run)
    return run


def _backward(run: Trained, recipe: Recipe, examples: Sequence[data.Example], most: int) -> float:
    """The mean loss of the examples, its gradients added up over parts of at most so many."""
    total = 0.0
    for start in range(0, len(examples), most):
        part = examples[start : start + most]
        batch = batches.encode(run.tokenizer, part, recipe.length, False, run.kind == "causal")
        with torch.autocast(run.device.type, torch.bfloat16, enabled=recipe.bfloat16):
            loss = run.model(**{key: value.to(run.device) for key, value in batch.items()}).loss
        share = len(part) / len(examples)
        (loss if share == 1 else loss * share).backward()
        total += share * loss.item()
    return total


def _rate(recipe: Recipe, step: int) -> float:
    if step < recipe.lr_warmup:
        return (step + 1) / recipe.lr_warmup
    return max(0.0, (recipe.steps - step) / max(1, recipe.steps - recipe.lr_warmup))


def _set_dropout(model: nn.Module, rate: float | None) -> None:
    """The dropout in front of the classification head: at the top of the model, or in the head (RoBERTa's)."""
    for path, module in model.named_modules():
        *above, name = path.removeprefix("base_model.model.").split(".")
        if (
            rate is not None
            and isinstance(module, nn.Dropout)
            and name == "dropout"
            and above[:1] in ([], ["classifier"])
        ):
            module.p = rate


@torch.no_grad()
def outputs(run: Trained, examples: Sequence[data.Example], length: int, device: torch.device) -> Tensor:
    """Logits of the head, `[examples, classes]`, float32 on the CPU, in the order of the examples."""
    run.model.eval()
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].text))
    found: list[Tensor] = []
    for start in range(0, len(order), EVAL_BATCH):
        chosen = [examples[index] for index in order[start : start + EVAL_BATCH]]
        batch = batches.encode(run.tokenizer, chosen, length, False, False)
        batch.pop("labels")
        found.append(run.model(**{key: value.to(device) for key, value in batch.items()}).logits.float().cpu())
    back = torch.empty(len(order), dtype=torch.long)
    back[torch.tensor(order)] = torch.arange(len(order))
    return torch.cat(found)[back]


# ---- files of runs


class Record:
    """A file of JSON lines, one a run; a run whose line is there is not made again."""

    def __init__(self, path: Path, env: Mapping[str, str]):
        self.path, self.env = path, dict(env)

    def runs(self) -> Iterator[dict[str, Any]]:
        return jsonl.read(self.path)

    def find(self, keys: Sequence[Mapping[str, Any]]) -> list[dict[str, Any] | None]:
        """The first run of each key, None where there is none; the file is read once.

        What a line does not say of its recipe had the value that a recipe has by itself.
        """
        silent = {one.name: one.default for one in fields(Recipe) if one.default is not MISSING}
        runs = [{**silent, **run} for run in self.runs()]
        return [next((run for run in runs if key.items() <= run.items()), None) for key in keys]

    def add(self, run: Mapping[str, Any]) -> dict[str, Any]:
        """One line more; returns what it holds."""
        whole = {**run, "machine": self.env}
        jsonl.append(self.path, [whole])
        return whole


def series(
    record: Record,
    keys: Sequence[Mapping[str, Any]],
    make: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    label: str,
) -> list[dict[str, Any]]:
    """The runs of `keys`, those made that the record lacks, with a progress bar over all."""
    found = record.find(keys)
    try:
        for turn in harness.progress(range(len(keys)), label):
            # looked up again: another process may have made it by now
            if found[turn] is None and (new := record.find(keys[turn : turn + 1])[0]) is not None:
                found[turn] = new
            if found[turn] is None:
                found[turn] = record.add({**keys[turn], **make(keys[turn])})
    except KeyboardInterrupt:
        raise SystemExit(f"\nstopped; the same command goes on from {record.path}") from None
    return [run for run in found if run is not None]


def key(task: str, recipe: Recipe) -> dict[str, Any]:
    return {"task": task, **asdict(recipe)}


def recipe_of(key: Mapping[str, Any]) -> Recipe:
    """The recipe that a key was made of."""
    return Recipe(**{one.name: key[one.name] for one in fields(Recipe)})
