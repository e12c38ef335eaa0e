"""axolotl's plugin under what axolotl 0.19.0 does with one: import by name, a hook, a factory with arguments."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import page_cases
import pytest
import torch
import trainer_cases
import yaml
from distributed_cases import assert_equal, trained
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer

import reflora
from reflora.optim.wrapper import Wrapped

ROOT = Path(__file__).parents[2]


# arguments of axolotl's own that its trainer reads, with their defaults
GROUPS = {"loraplus_lr_ratio": None, "loraplus_lr_embedding": 1e-6, "lr_groups": None}
GROUPS |= {"embedding_lr": None, "embedding_lr_scale": None}


class StandIn(Trainer):
    """Creates its optimizer as axolotl's mixin does: a factory is also given the training arguments."""

    def create_optimizer_grouped_parameters(self, model: Any, options: dict[str, Any]) -> list[dict[str, Any]]:
        """What has embed_tokens or lm_head in its name at a rate of its own, without decay, and rates by module."""
        args: Any = self.args
        rates = {module: group["lr"] for group in args.lr_groups or () for module in group["modules"]}
        embedding = options["lr"] * args.embedding_lr_scale if args.embedding_lr_scale else args.embedding_lr
        groups: dict[tuple[float, float], list[Any]] = {}
        for name, param in model.named_parameters():
            if "embed_tokens" in name or "lm_head" in name:
                rate, decay = embedding or options["lr"], 0.0
            else:
                rate, decay = next((rates[word] for word in rates if word in name), options["lr"]), args.weight_decay
            if param.requires_grad:
                groups.setdefault((rate, decay), []).append(param)
        return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        factory, options = self.optimizer_cls_and_kwargs
        self.optimizer = factory()(self.model if model is None else model, self.args, **options)
        return self.optimizer


def trainer_class() -> type[Trainer]:
    """axolotl's own code where it is installed."""
    try:
        return import_module("axolotl.core.trainers.mixins.optimizer").OptimizerMixin
    except ImportError:
        return StandIn


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Loaded from the name in the how-to's YAML; the base class stands in where axolotl is not installed."""
    try:
        import_module("axolotl.integrations.base")
    except ImportError:
        for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        sys.modules["axolotl.integrations.base"].BasePlugin = object  # type: ignore[attr-defined]
    monkeypatch.delitem(sys.modules, "reflora.integrations.axolotl", raising=False)
    (path,) = config()["plugins"]
    module, name = path.rsplit(".", 1)
    return getattr(import_module(module), name)()


def config() -> dict[str, Any]:
    """The first YAML block of the page."""
    page = (ROOT / "docs/howto/trainers_by_name.md").read_text()
    return dict(yaml.safe_load(page.split("```yaml\n")[1].split("```")[0]))


def trainer(folder: Path, model: Any = None, **options: Any) -> Any:
    args = page_cases.arguments(
        learning_rate=2e-3, weight_decay=0.3, adam_beta2=0.95, adam_epsilon=1e-7, lr_scheduler_type="constant"
    )
    args.output_dir = str(folder)
    vars(args).update({**GROUPS, **options})
    return trainer_class()(model or page_cases.adapted(), args, train_dataset=page_cases.rows())


def test_a_run(plugin: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = trainer(tmp_path)
    with caplog.at_level("INFO"):
        plugin.post_trainer_create(config(), made)
    assert "reflora: trains with" in caplog.text
    made.train()
    optimizer: Any = getattr(made.optimizer, "optimizer", made.optimizer)
    assert isinstance(optimizer, reflora.RefLoRAAdamW) and optimizer.diagnostics().refactored == len(optimizer.pairs)
    group = optimizer.param_groups[0]
    assert (group["weight_decay"], group["betas"], group["eps"]) == (0.3, (0.9, 0.95), 1e-7)
    assert group["initial_lr"] == 2e-3


THREE = {"scalar": True, "interval": 3, "backend": "torch"}
WORDS = [(f"warmup_steps={word}", {"warmup_steps": None}) for word in ("null", "none", "None", "~")]


@pytest.mark.parametrize(
    "given, wanted", [("scalar = true, interval=3,backend= torch", THREE), (THREE, THREE), *WORDS], ids=str
)
def test_optim_args_as_text_or_mapping(plugin: Any, tmp_path: Path, given: Any, wanted: dict[str, Any]) -> None:
    made = trainer(tmp_path)
    plugin.post_trainer_create({**config(), "optim_args": given}, made)
    optimizer = made.create_optimizer()
    assert {name: getattr(optimizer, name) for name in wanted} == wanted


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"optimizer": "adamw_bnb_8bit"}, "adamw_torch"),
        ({"optim_args": "scalar"}, "name=value"),
    ],
)
def test_what_it_cannot_follow_is_refused(plugin: Any, tmp_path: Path, changed: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        plugin.post_trainer_create({**config(), **changed}, trainer(tmp_path))


def embedded() -> nn.Module:
    """LoRA, and an embedding and a head that are trained whole."""
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["embed_tokens", "lm_head"])
    torch.manual_seed(0)
    return get_peft_model(page_cases.causal(), config)


def rate_of(name: str, changed: dict[str, Any]) -> tuple[float, float]:
    """Learning rate and weight decay of a parameter; LoRA+ is PEFT's, without decay."""
    if ratio := changed.get("loraplus_lr_ratio"):
        return 2e-3 * (ratio if "lora_B" in name else 1), 0.0
    if "embed_tokens" in name or "lm_head" in name:
        return changed.get("embedding_lr") or 2e-3 * changed.get("embedding_lr_scale", 1), 0.0
    return 5e-4 if "lr_groups" in changed and "v_proj" in name else 2e-3, 0.3


@pytest.mark.parametrize("scalar", [False, True], ids=["RefLoRA", "RefLoRA-S"])
@pytest.mark.parametrize(
    "changed",
    [
        {"loraplus_lr_ratio": 16},
        {"embedding_lr": 1e-4},
        {"embedding_lr_scale": 0.5},
        {"lr_groups": [{"name": "values", "modules": ["v_proj"], "lr": 5e-4}]},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_rates_by_group(plugin: Any, tmp_path: Path, changed: dict[str, Any], scalar: bool) -> None:
    """LoRA+, embedding rates and lr_groups: the steps of RefLoRAAdamW over one group per parameter."""
    made, other = (trainer(tmp_path, embedded(), **changed) for _ in range(2))
    plugin.post_trainer_create({**config(), **changed, "optim_args": {"scalar": scalar}}, made)
    calls = trainer_cases.recorded(made)
    groups = [
        {"params": [param], **dict(zip(("lr", "weight_decay"), rate_of(name, changed)))}
        for name, param in other.model.named_parameters() if param.requires_grad
    ]  # fmt: skip
    options: dict[str, Any] = {"lr": 1.0, "betas": (0.9, 0.95), "eps": 1e-7, "scalar": scalar}
    plain = reflora.RefLoRAAdamW(groups, pairs=reflora.find_pairs(other.model), **options)
    trainer_cases.replay(other, plain, calls)
    assert len(calls) == 3
    assert_equal(trained(made.model), trained(other.model))


def test_the_factory_prefers_what_it_is_told(tmp_path: Path) -> None:
    args, model = trainer(tmp_path).args, page_cases.adapted()
    told: Any = reflora.OptimizerFactory()(model, args, lr=0.5, optimizer_cls=torch.optim.NAdam)
    assert isinstance(told, Wrapped) and told.param_groups[0]["lr"] == 0.5
    assert told.param_groups[0]["weight_decay"] == 0.3
