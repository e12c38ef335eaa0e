"""PEFT's MetaMathQA script, as it is, on a CPU: a small LLaMA, made-up problems, no hub.

    PYTHONPATH=PEFT/src python contrib/peft/check/tiny_metamathqa.py PEFT [--steps N] [--lr LR] [EXPERIMENT ...]

PEFT: a checkout with the contribution in it. Its method_comparison/MetaMathQA is copied and run from the copy. The
experiments' files are used unchanged, except for the learning rate if --lr is given. What differs from a real run:
default_training_params.json (model, steps, evaluation), "cpu" among the permitted devices, `torch.cpu`'s memory
counters, which are 0, and `load_dataset`.
"""

import argparse
import inspect
import json
import os
import random
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock


os.environ["HF_HUB_OFFLINE"] = "1"

import datasets
import tokenizers
import torch
import transformers


EXPERIMENTS = ["rank32", "rank32-riemannian", "rank32-reflora", "rank128", "rank128-reflora"]
SIZE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
SETTINGS = {
    "batch_size_eval": 50,
    "eval_steps": 250,
    "generation_kwargs": {"max_length": 200, "max_new_tokens": 40},
}
COUNTERS = ["max_memory_reserved", "memory_allocated", "memory_reserved"]
ACTIONS = ["reset_peak_memory_stats", "manual_seed_all", "empty_cache"]


def problem(draw: random.Random) -> tuple[str, str, int]:
    """A question, the way to its answer, and the answer."""
    name, thing = draw.choice(["Tom", "Ada", "Kim", "Lea"]), draw.choice(["apples", "books", "coins", "pens"])
    a, b, verb = draw.randint(2, 9), draw.randint(2, 9), draw.choice(["buys", "is given", "wins"])
    question = f"{name} has {a} {thing} and {verb} {b} more. How many {thing} does {name} have?"
    return question, f"{name} has {a} + {b} = {a + b} {thing}.", a + b


def prose() -> list[str]:
    """In place of Wikipedia: the longest docstrings of two modules."""
    members = [value for module in (argparse, inspect) for _, value in sorted(vars(module).items())]
    texts = {inspect.getdoc(value) for value in members if inspect.isclass(value) or inspect.isfunction(value)}
    return sorted((text[:300] for text in texts if text), key=lambda text: (-len(text), text))[:40]


def load_dataset(path: str, *args, **kwargs):
    """The columns that the script reads, of problems drawn from a seed."""
    draw = random.Random(path)
    if "finewiki" in path:
        return datasets.Dataset.from_dict({"text": prose()})
    if "gsm8k" in path:
        rows = [problem(draw) for _ in range(100)]
        answers = [f"{steps}\n#### {result}" for _, steps, result in rows]
        split = datasets.Dataset.from_dict({"question": [row[0] for row in rows], "answer": answers})
        return datasets.DatasetDict(train=split, test=split)
    rows = [problem(draw) for _ in range(12000)]
    columns = {
        "type": ["made up"] * len(rows),
        "query": [row[0] for row in rows],
        "original_question": [row[0] for row in rows],
        "response": [f" {steps}\nThe answer is: {result}" for _, steps, result in rows],
    }
    return datasets.DatasetDict(train=datasets.Dataset.from_dict(columns))


def save_model(folder: Path) -> None:
    """A LLaMA trained on the prose until the script's check of the base model, a loss from 1 to 2, holds."""
    texts = prose()
    tokens = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokens.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    tokens.train_from_iterator(texts, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokens, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.save_pretrained(str(folder))

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZE, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1)
    model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for _ in range(500):
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        if loss < 1.5:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(str(folder))


def copy_scripts(peft: Path, folder: Path, model: Path, steps: int, lr: float | None) -> None:
    shutil.copytree(peft / "method_comparison/MetaMathQA", folder)
    for path in folder.glob("*results/*.json"):
        path.unlink()
    utils = folder / "utils.py"
    text, check = utils.read_text(), 'not in ["cuda", "xpu"]'
    if text.count(check) != 1:
        raise SystemExit(f"{utils} does not have its check of the device, {check}: adapt copy_scripts.")
    utils.write_text(text.replace(check, 'not in ["cuda", "xpu", "cpu"]'))
    defaults = folder / "default_training_params.json"
    settings = {**json.loads(defaults.read_text()), **SETTINGS, "model_id": str(model), "max_steps": steps}
    for path in [defaults, *folder.glob("experiments/lora/*/training_params.json")] if lr else []:
        own = settings if path == defaults else json.loads(path.read_text())
        own["optimizer_kwargs"]["lr"] = lr
        path.write_text(json.dumps(own))
    defaults.write_text(json.dumps(settings))


def run(experiment: str) -> None:
    """What `python run.py -v EXPERIMENT` does, in the working directory."""
    for name in COUNTERS:
        setattr(torch.cpu, name, lambda *_: 0)
    for name in ACTIONS:
        setattr(torch.cpu, name, lambda *_: None)
    torch.cpu.get_device_name = lambda *_: "cpu"
    sys.path.insert(0, os.getcwd())
    sys.argv = ["run.py", "-v", experiment]
    with mock.patch.object(datasets, "load_dataset", load_dataset):
        runpy.run_path("run.py", run_name="__main__")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peft", type=Path, help="a checkout of PEFT with the contribution")
    parser.add_argument("experiments", nargs="*", default=EXPERIMENTS, help="experiments/lora/llama-3.2-3B-...")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--lr", type=float, help="in place of the experiments' own")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args()
    if args.run:
        return run(args.experiments[0])

    with tempfile.TemporaryDirectory() as place:
        scripts, model = Path(place, "MetaMathQA"), Path(place, "model")
        save_model(model)
        copy_scripts(args.peft, scripts, model, args.steps, args.lr)
        print("experiment | loss of the last 250 steps | test accuracy | forgetting | training time")
        for name in args.experiments:
            path = f"experiments/lora/llama-3.2-3B-{name}"
            command = [sys.executable, os.path.abspath(__file__), "--run", str(args.peft), path]
            done = subprocess.run(command, check=False, cwd=scripts, capture_output=True, text=True)
            results = list(scripts.glob("*results/*.json"))
            info = json.loads(results[0].read_text())["train_info"] if results else {"status": "no result"}
            if done.returncode or info["status"] != "success":
                raise SystemExit(f"{name}: {info['status']}\n{done.stderr[-2000:]}")
            results[0].unlink()
            last = info["metrics"][-1]
            loss, accuracy, forgetting = last["train loss"], last["test accuracy"], last["forgetting"]
            print(f"{name} | {loss:.5f} | {accuracy:.2f} | {forgetting:+.3f} | {info['train_time']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
