"""RefTrainer and PEFTArguments with transformers' own Trainer and parser."""

import dataclasses
import warnings

import pytest
import torch
from distributed_cases import trainable
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim import SGD
from transformers import HfArgumentParser, TrainingArguments

from reflora import PEFTArguments, Refactorer, RefTrainer


def data(count=24):
    return [{"tokens": torch.randint(9, (7,)), "labels": torch.randint(5, ())} for _ in range(count)]


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(9, 6), nn.Linear(42, 5)

    def forward(self, tokens, labels=None):
        logits = self.linear(self.embedding(tokens).flatten(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("scalar", [False, True], ids=["RefLoRA", "RefLoRA-S"])
def test_trainer(scalar, tmp_path):
    model = get_peft_model(Classifier(), LoraConfig(r=3, target_modules=["linear"]))
    refactorer = Refactorer(model, warmup_steps=2, use_scalar=scalar)
    arguments = TrainingArguments(
        tmp_path, max_steps=6, per_device_train_batch_size=8, save_steps=3, report_to=[], use_cpu=True,
        remove_unused_columns=False, label_names=["labels"], disable_tqdm=True,
    )  # fmt: skip
    trainer = RefTrainer(model=model, args=arguments, train_dataset=data(), refactorer=refactorer)
    optimizer = trainer.create_optimizer()
    assert refactorer.integrated_into(optimizer)
    refactorer.skip_steps = 1
    trainer.create_optimizer()
    assert refactorer.skip_steps == 1 and len(optimizer._optimizer_step_pre_hooks) == 1
    refactorer.skip_steps = 2
    trainer.train()
    saved = torch.load(tmp_path / "checkpoint-3/optimizer.pt", weights_only=True)
    assert saved["param_groups"][0]["reflora_skip_steps"] == 0

    again = Refactorer(model, warmup_steps=2, use_scalar=scalar)
    resumed = RefTrainer(model=model, args=arguments, train_dataset=data(), refactorer=again)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.skip_steps == 0 and resumed.state.global_step == 6


def test_trainer_takes_both_signatures(monkeypatch, tmp_path):
    """create_optimizer() of transformers 4, create_optimizer(model=None) of transformers 5."""
    model = get_peft_model(Classifier(), LoraConfig(r=3, target_modules=["linear"]))
    trainer = RefTrainer(
        model=model, args=TrainingArguments(tmp_path, use_cpu=True, report_to=[]), refactorer=Refactorer(model)
    )
    parent = RefTrainer.__mro__[1]
    optimizer = SGD(trainable(model), lr=0.1)
    monkeypatch.setattr(parent, "create_optimizer", lambda self: optimizer)
    assert trainer.create_optimizer() is optimizer
    monkeypatch.setattr(parent, "create_optimizer", lambda self, model=None: optimizer)
    assert trainer.create_optimizer(model) is optimizer and trainer.create_optimizer(model=model) is optimizer


def test_arguments():
    fields = {field.name: field.default for field in dataclasses.fields(PEFTArguments)}
    assert fields == {
        "lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": None, "init_lora_weights": True,
        "refactor": False, "use_scalar": False, "reflora_warmup": 100, "reflora_interval": 1,
    }  # fmt: skip
    line = "--lora_r 4 --target_modules query,key --refactor True --use_scalar False --reflora_warmup 7"
    (parsed,) = HfArgumentParser(PEFTArguments).parse_args_into_dataclasses(line.split())
    assert (parsed.lora_r, parsed.target_modules, parsed.refactor, parsed.use_scalar) == (4, "query,key", True, False)
    assert parsed.reflora_warmup == 7 and parsed.init_lora_weights is True
