"""A Trainer's run and the plain loop that it must equal: its own losses, over the inputs that they were given."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

Call = tuple[tuple[Any, ...], dict[str, Any]]
LR = 1e-2
TEXTS = [f"the {word} sat on mat {i}" for i in range(12) for word in ("cat", "dog")]
# a plain loop has no schedule, and none of these asks a hub
OPTIONS: dict[str, Any] = {
    "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": LR, "lr_scheduler_type": "constant",
    "use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1,
}  # fmt: skip


def build(folder: Path, **config: Any) -> tuple[nn.Module, Any]:
    """LoRA on a causal model of two small layers, and its tokenizer."""
    import transformers
    from tiny_models import save_causal

    if not folder.exists():
        save_causal(folder, TEXTS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    base = transformers.AutoModelForCausalLM.from_pretrained(str(folder))
    torch.manual_seed(0)
    default: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return get_peft_model(base, LoraConfig(**{**default, **config})), tokenizer


def recorded(trainer: Any) -> list[Call]:
    """Trains; what each call of `compute_loss` was given besides the model."""
    calls: list[Call] = []
    compute = trainer.compute_loss

    def recording(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(copy.deepcopy((args, kwargs)))
        return compute(model, *args, **kwargs)

    trainer.compute_loss = recording
    trainer.train()
    return calls


def replay(trainer: Any, optimizer: torch.optim.Optimizer, calls: list[Call]) -> None:
    """The plain loop, with the losses of a trainer that does not train."""
    model = trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    for args, kwargs in calls:
        optimizer.zero_grad()
        trainer.compute_loss(model, *args, **kwargs).backward()
        nn.utils.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        optimizer.step()
