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
import yaml
from transformers import Trainer

import reflora
from reflora.optim.wrapper import Wrapped

ROOT = Path(__file__).parents[2]


class AxolotlTrainer(Trainer):
    """Creates its optimizer as axolotl's mixin does: a factory is also given the training arguments."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        factory, options = self.optimizer_cls_and_kwargs
        self.optimizer = factory()(self.model if model is None else model, self.args, **options)
        return self.optimizer


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
    page = (ROOT / "docs/howto/config.md").read_text()
    return dict(yaml.safe_load(page.split("```yaml\n")[1].split("```")[0]))


def trainer(folder: Path) -> AxolotlTrainer:
    args = page_cases.arguments(learning_rate=2e-3, weight_decay=0.3, adam_beta2=0.95, adam_epsilon=1e-7)
    args.output_dir = str(folder)
    return AxolotlTrainer(page_cases.adapted(), args, train_dataset=page_cases.rows())


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
        ({"loraplus_lr_ratio": 16}, "loraplus_lr_ratio"),
        ({"optim_args": "scalar"}, "name=value"),
    ],
)
def test_what_it_would_silently_undo_is_refused(
    plugin: Any, tmp_path: Path, changed: dict[str, Any], word: str
) -> None:
    with pytest.raises(ValueError, match=word):
        plugin.post_trainer_create({**config(), **changed}, trainer(tmp_path))


def test_the_factory_prefers_what_it_is_told(tmp_path: Path) -> None:
    args, model = trainer(tmp_path).args, page_cases.adapted()
    told: Any = reflora.OptimizerFactory()(model, args, lr=0.5, optimizer_cls=torch.optim.NAdam)
    assert isinstance(told, Wrapped) and told.param_groups[0]["lr"] == 0.5
    assert told.param_groups[0]["weight_decay"] == 0.3
