"""transformers' Trainer and TRL's: every way to hand them RefLoRA, exact resumes, and what the callback logs."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_cases import assert_equal, trained
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_trainer import Classifier
from torch import nn
from torch.utils.data import default_collate
from transformers import Trainer, TrainerCallback, TrainingArguments

import reflora
from reflora import OptimizerFactory, Refactorer, RefLoRACallback, RefTrainer, create_reflora_optimizer


def build() -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(Classifier(), LoraConfig(r=3, target_modules=["linear", "embedding"]))


def rows(count: int = 48) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"tokens": torch.randint(9, (7,), generator=generator), "labels": torch.randint(5, (), generator=generator)}
        for _ in range(count)
    ]


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    default: dict[str, Any] = {
        "max_steps": 6, "per_device_train_batch_size": 8, "save_steps": 3, "report_to": [], "use_cpu": True,
        "remove_unused_columns": False, "label_names": ["labels"], "disable_tqdm": True, "logging_steps": 1, "seed": 3,
        "learning_rate": 1e-2,
    }  # fmt: skip
    return TrainingArguments(folder, **{**default, **more})


def _factory(model: nn.Module, **options: Any) -> dict[str, Any]:
    return {"optimizer_cls_and_kwargs": (OptimizerFactory, {"lr": 1e-2, **options})}


WAYS: dict[str, Callable[[nn.Module], dict[str, Any]]] = {
    "optimizers": lambda model: {"optimizers": (create_reflora_optimizer(model, lr=1e-2), None)},
    "factory": _factory,
    "RefLoRA-S": lambda model: _factory(model, scalar=True),
    "warm-up and interval": lambda model: _factory(model, warmup_steps=2, interval=3),
    "invariant": lambda model: _factory(model, optimizer_cls=reflora.InvariantAdamW, metric="scaled"),
    "riemannian": lambda model: _factory(model, optimizer_cls=reflora.RiemannianAdamW, reg=1e-3),
    "over NAdam": lambda model: _factory(model, optimizer_cls=torch.optim.NAdam),
    "over SGD": lambda model: _factory(model, optimizer_cls=torch.optim.SGD, momentum=0.9),
    "Refactorer": lambda model: {"refactorer": Refactorer(model)},
    "Refactorer, scalar": lambda model: {"refactorer": Refactorer(model, use_scalar=True, warmup_steps=2)},
}


def trainer_of(way: str, folder: Path, **more: Any) -> Trainer:
    model = build()
    given = WAYS[way](model)
    cls = RefTrainer if "refactorer" in given else Trainer
    return cls(model=model, args=arguments(folder, **more), train_dataset=rows(), **given)


def logged(trainer: Trainer) -> list[dict[str, Any]]:
    """What was told of the training, not of its end."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("way", WAYS)
def test_stop_and_resume_is_bit_equal(way: str, tmp_path: Path) -> None:
    whole = trainer_of(way, tmp_path / "whole")
    start = trained(whole.model)
    whole.train()
    assert any(not torch.equal(value, start[name]) for name, value in trained(whole.model).items())
    resumed = trainer_of(way, tmp_path / "resumed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.state.global_step == 6
    assert_equal(trained(resumed.model), trained(whole.model))


def test_factory_is_the_optimizer_and_both_are_a_plain_loop(tmp_path: Path) -> None:
    given, made = (trainer_of(way, tmp_path / way, lr_scheduler_type="constant") for way in ("optimizers", "factory"))
    for trainer in (given, made):
        trainer.train()
        assert type(trainer.optimizer.optimizer) is reflora.RefLoRAAdamW  # type: ignore[union-attr]
    assert_equal(trained(made.model), trained(given.model))
    model = build()
    optimizer = create_reflora_optimizer(model, lr=1e-2)
    for batch in trainer_of("optimizers", tmp_path / "other").get_train_dataloader():
        optimizer.zero_grad()
        model(**batch)["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    # the loader of another trainer has an order of its own: the first epoch of the same seed
    assert_equal(trained(model), trained(given.model), rtol=1e-4, atol=1e-5)


def test_a_factory_before_transformers_5_says_what_to_do() -> None:
    with pytest.raises(TypeError, match=r"Pass optimizers=\(reflora"):
        OptimizerFactory([nn.Parameter(torch.zeros(2))], lr=1e-3)


# ---- the callback


class Reporter(TrainerCallback):
    """What TensorBoard or W&B would get."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen.append(dict(logs))


KEYS = {"reflora/balance", "reflora/condition", "reflora/degenerate", "reflora/skipped"}


@pytest.mark.parametrize("way", ["factory", "over NAdam", "Refactorer"])
def test_callback_reports_to_history_and_reporters(way: str, tmp_path: Path) -> None:
    trainer = trainer_of(way, tmp_path)
    reporter = Reporter()
    trainer.add_callback(reporter)
    RefLoRACallback().install(trainer)
    trainer.train()
    steps = logged(trainer)
    assert len(steps) == 6 and all(entry.keys() >= KEYS for entry in steps[1:])
    assert all(entry.keys() >= KEYS for entry in [entry for entry in reporter.seen if "loss" in entry][1:])
    # B = 0 at first, which has neither; then both layers have their S
    assert KEYS - steps[0].keys() == {"reflora/balance", "reflora/condition"}
    assert steps[0]["reflora/degenerate"] == 2 and steps[-1]["reflora/degenerate"] == 0
    assert steps[-1]["reflora/skipped"] == 0 and 1 <= steps[-1]["reflora/condition"] < 1e6
    written = (tmp_path / "checkpoint-6" / "trainer_state.json").read_text()
    assert json.loads(written, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))["log_history"]


class Spoil(TrainerCallback):
    """Makes a gradient NaN in these steps."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            reflora.find_pairs(model)[0].B.grad.fill_(torch.nan)  # type: ignore[union-attr]


@pytest.mark.parametrize("way, skipped", [("factory", 2), ("over NAdam", 2 * 2)])
def test_callback_counts_the_layers_skipped_since_the_last_log(way: str, skipped: int, tmp_path: Path) -> None:
    """Around another optimizer a bad gradient skips the step of both layers."""
    trainer = trainer_of(way, tmp_path, logging_steps=3, max_grad_norm=0.0)
    trainer.add_callback(Spoil(1, 2))
    trainer.add_callback(RefLoRACallback())
    trainer.train()
    assert [entry["reflora/skipped"] for entry in logged(trainer)] == [skipped, 0]


def test_callback_counts_a_skipped_layer_once_where_an_interval_leaves_it_standing(tmp_path: Path) -> None:
    model = build()
    trainer = RefTrainer(
        model=model, args=arguments(tmp_path, logging_steps=3, max_grad_norm=0.0), train_dataset=rows(),
        refactorer=Refactorer(model, interval=3), callbacks=[Spoil(0)],
    )  # fmt: skip
    RefLoRACallback().install(trainer)
    trainer.train()
    assert logged(trainer)[0]["reflora/skipped"] == 1


def test_callback_hears_an_evaluation_before_the_training(tmp_path: Path) -> None:
    trainer = trainer_of("factory", tmp_path)
    RefLoRACallback().install(trainer)
    assert "eval_loss" in trainer.evaluate(rows(8))


def test_callback_without_reflora_says_what_to_do(tmp_path: Path) -> None:
    trainer = Trainer(model=build(), args=arguments(tmp_path), train_dataset=rows(), callbacks=[RefLoRACallback()])
    with pytest.raises(ValueError, match="RefLoRACallback: expected an optimizer with diagnostics"):
        trainer.train()


# ---- what comes out


def test_adapter_loads_in_plain_peft_and_merges_and_the_base_is_untouched(tmp_path: Path) -> None:
    trainer = trainer_of("factory", tmp_path)
    base = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    assert_equal({name: p.detach() for name, p in trainer.model.named_parameters() if name in base}, base)
    trainer.model.save_pretrained(tmp_path / "adapter")
    assert set(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Classifier(), str(tmp_path / "adapter"))
    batch = default_collate(rows(4))
    wanted = trainer.model.eval()(**batch)["logits"]
    assert_equal(loaded.eval()(**batch)["logits"], wanted)
    assert_equal(loaded.merge_and_unload()(**batch)["logits"], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scalar", [False, True], ids=["RefLoRA", "RefLoRA-S"])
def test_resume_from_an_adapter_is_bit_equal(scalar: bool, tmp_path: Path) -> None:
    """What a plain loop saves: the adapter by PEFT, in safetensors, and the optimizer by torch."""

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            model(**default_collate(rows()[8 * step : 8 * step + 8]))["loss"].backward()
            optimizer.step()

    model = build()
    optimizer = create_reflora_optimizer(model, lr=1e-2, scalar=scalar)
    train(model, optimizer, range(3))
    model.save_pretrained(str(tmp_path))  # type: ignore[operator]
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    train(model, optimizer, range(3, 6))
    torch.manual_seed(0)
    resumed = PeftModel.from_pretrained(Classifier(), str(tmp_path), is_trainable=True)
    again = create_reflora_optimizer(resumed, lr=1e-2, scalar=scalar)
    again.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train(resumed, again, range(3, 6))
    assert_equal(list(model.parameters()), list(resumed.parameters()))


# ---- TRL


def test_sft_trainer(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    import transformers
    from tiny_models import needs_its_kernels, save_causal

    needs_its_kernels()
    texts = [f"the {word} sat on mat {i}" for i in range(12) for word in ("cat", "dog")]
    folder = save_causal(tmp_path / "model", texts)

    torch.manual_seed(0)
    config = trl.SFTConfig(
        str(tmp_path / "out"), max_steps=4, per_device_train_batch_size=4, report_to=[], use_cpu=True, bf16=False,
        disable_tqdm=True, max_length=32, save_strategy="no", learning_rate=1e-2, logging_steps=1,
        gradient_checkpointing=False,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(str(folder)), args=config,
        train_dataset=datasets.Dataset.from_dict({"text": texts}),
        processing_class=transformers.AutoTokenizer.from_pretrained(str(folder)),
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        optimizer_cls_and_kwargs=(OptimizerFactory, {"lr": 1e-2}),
    )  # fmt: skip
    RefLoRACallback().install(trainer)
    trainer.train()
    steps = logged(trainer)
    assert len(steps) == 4 and all(entry.keys() >= KEYS for entry in steps[1:])
    assert all(pair.B.abs().sum() > 0 and pair.B.isfinite().all() for pair in reflora.find_pairs(trainer.model))
