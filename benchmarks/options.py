"""Options that `throughput` and `memory` share, and the model, batches and methods that they ask for."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import batches, data, harness, methods, models, variants
from .training import Bench

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MOST_RANK = 4096  # a larger one is a slip, and takes the memory of a model
BATCHES = 2  # that the memory measurement reads in any case


def parser(program: str, summary: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.{program}", description=summary)
    known = ", ".join(models.PRESETS)
    made.add_argument("--model", help=f"{known}, a hub id or a folder (default: minilm, on a GPU deberta-v3-base)")
    made.add_argument("--data", default=data.DEFAULT, help="stdlib, FILE.jsonl[.gz], a GLUE folder or a hub data set")
    made.add_argument(
        "--methods",
        default=",".join(methods.DEFAULT),
        help=f"all, or some of {', '.join(methods.METHODS)} (default: {','.join(methods.DEFAULT)})",
    )
    made.add_argument("--rank", type=int)
    made.add_argument("--targets", help="all-linear, or names with commas (default: the model's preset)")
    made.add_argument("--batch", type=int)
    made.add_argument("--length", type=int, help="tokens a sequence, padded")
    made.add_argument("--lr", type=float)
    made.add_argument("--dtype", choices=list(DTYPES), help="of the frozen weights (default: the model's preset)")
    made.add_argument(
        "--checkpointing",
        action=argparse.BooleanOptionalAction,
        help="gradient checkpointing (default: the model's preset)",
    )
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--backend", choices=("triton", "cpp", "torch"), help="of reflora (default: its own choice)")
    made.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    made.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the CSV and the PNG")
    return made


def complete(made: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Fill in what the model's preset says and check the rest. Leaves with one clear line where an option is bad."""
    options.device = harness.pick_device(made, options.device)
    gpu = options.device.type == "cuda"
    if gpu and options.device.index is not None:
        torch.cuda.set_device(options.device)
    options.model = options.model or ("deberta-v3-base" if gpu else "minilm")
    preset = models.preset(options.model)
    for name in ("rank", "batch", "length", "lr", "checkpointing"):
        if getattr(options, name) is None:
            setattr(options, name, getattr(preset, name))
    options.dtype = DTYPES[options.dtype] if options.dtype else preset.dtype
    options.alpha = max(1, options.rank * preset.alpha // preset.rank)
    targets = options.targets or preset.targets
    split = isinstance(targets, str) and targets != "all-linear"
    options.targets = tuple(name.strip() for name in targets.split(",")) if split else targets
    options.methods = chosen_methods(made, options.methods, options.model)
    reason = methods.unserved(options.backend, options.device) or methods.missing(options.methods)
    if reason:
        made.error(reason)
    for name, least in (("rank", 1), ("batch", 1), ("length", 3)):
        if getattr(options, name) < least:
            made.error(f"--{name}: expected at least {least}, got {getattr(options, name)}")
    if not 0 <= options.lr < math.inf:
        made.error(f"--lr: expected a number from 0 up, got {options.lr}")
    if options.rank > MOST_RANK:
        made.error(f"--rank: expected at most {MOST_RANK}, got {options.rank}")
    harness.make_folder(made, options.out, options.out)


def chosen_methods(made: argparse.ArgumentParser, text: str, model: str) -> list[str]:
    """Names with commas; "all" for every method that can be built and that a LLaMA has biases and room for."""
    llama = model in models.LLAMAS
    if text == "all":
        left_out = ("bitfit", "full", "pissa", "lora-pro-full") if llama else ()
        return methods.available([n for n in methods.METHODS if n not in (*methods.EXPERIMENTS, *left_out)])
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    unknown = [name for name in names if name not in methods.METHODS]
    if unknown:
        known = ", ".join(methods.METHODS)
        made.error(f"--methods: expected all, alone, or some of {known}, got {', '.join(map(repr, unknown))}")
    if llama and "bitfit" in names:
        made.error(f"--methods: expected methods that {model} can train, got bitfit: it has no biases")
    return names


@dataclass(frozen=True)
class Prepared:
    """A bench, the lines that describe it, and how its CSV calls the case."""

    bench: Bench
    head: str
    case: str


def prepare(options: argparse.Namespace, steps: int, warmup: int) -> Prepared:
    """What the options ask for, with `steps` batches.

    Raises OSError, ValueError or ImportError for a model or data that cannot be had.
    """
    task = data.load(options.data)
    loaded = models.load(
        options.model, task.classes, options.device, options.seed, options.dtype, options.checkpointing
    )
    models.check_length(loaded, options.length)
    adapter = variants.Adapter(options.rank, options.alpha, options.targets, options.seed, steps)
    setting = methods.Setting(options.lr, warmup, backend=options.backend, scaling=options.alpha / options.rank)
    bench = Bench(loaded, adapter, _feed(options, task, loaded, max(steps, BATCHES)), setting, options.device)
    source = "random images" if loaded.kind == "image" else task.name
    size = "" if loaded.kind == "image" else f", length {options.length}"
    dtype = str(next(loaded.model.parameters()).dtype).removeprefix("torch.")
    checkpointed = ", gradient checkpointing" if options.checkpointing else ""
    count = len(variants.pairs_of(bench.places("lora").model))
    head = "\n".join([
        harness.header(harness.environment(options.device, torch.float32)),
        f"{options.model}, {loaded.weights}, frozen in {dtype}{checkpointed}; {count} LoRA pairs, r={options.rank}",
        f"batch {options.batch}{size}; {source}, {task.classes} classes; reflora backend {_served(options)}",
    ])  # fmt: skip
    return Prepared(bench, head, f"{options.model} r={options.rank} on {source}")


def _feed(options: argparse.Namespace, task: data.Task, loaded: models.Loaded, count: int) -> list[dict[str, Tensor]]:
    if loaded.kind == "image":
        feed = batches.images(options.batch, loaded.model.config.image_size, task.classes, count, options.seed)
    else:
        draws = batches.batches(task.train, options.batch, options.seed)
        causal = loaded.kind == "causal"
        feed = [batches.encode(loaded.tokenizer, next(draws), options.length, True, causal) for _ in range(count)]
    return [{key: value.to(options.device) for key, value in batch.items()} for batch in feed]


def _served(options: argparse.Namespace) -> str:
    from reflora.backends import resolve

    return resolve(options.backend, options.device).NAME


def announce(program: str, options: argparse.Namespace, length: str) -> None:
    """One line about what is to come, before a model and the libraries around it are loaded."""
    names = [methods.LABELS[name] for name in options.methods]
    which = ", ".join(names) if len(names) <= len(methods.DEFAULT) else f"{len(names)} methods"
    case = f"{options.model}, r = {options.rank}, {length} on {options.device}"
    print(f"{program}: {which}; {case}; results go to {options.out}", flush=True)


def finish(
    program: str,
    options: argparse.Namespace,
    rows: Sequence[harness.Measurement],
    text: str,
    draw: Callable[[Path, Sequence[harness.Measurement], Mapping[str, str]], bool],
) -> None:
    """Print the table, write CSV and figure, and say where. Where nothing was measured earlier results stay."""
    print(text)
    if not rows:
        raise SystemExit(f"{program}: no method came through, nothing written")
    path = options.out / f"{program}_{options.model.replace('/', '_')}_{options.device.type}.csv"
    env = harness.environment(options.device, torch.float32)
    harness.write_csv(path, rows, env)
    drawn = draw(path.with_suffix(".png"), rows, env)
    print(f"\nwrote {path}" + (f" and {path.with_suffix('.png').name}" if drawn else "; no figure without matplotlib"))
