"""TRL's DPO and GRPO trainers take the steps of a plain loop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import trainer_cases as cases
from distributed_cases import assert_equal, trained

import reflora

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("ignore")


def different_letters(completions: Sequence[str], **_: Any) -> list[float]:
    return [float(len(set(completion))) for completion in completions]


KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, list[str]]]] = {
    "DPO": ("DPO", {"max_length": 32}, {}, {"chosen": [" and slept"] * 24, "rejected": [" nor"] * 24}),
    "GRPO": ("GRPO", {"max_completion_length": 8, "num_generations": 4}, {"reward_funcs": different_letters}, {}),
}


@pytest.mark.parametrize("options", [{}, {"scalar": True}], ids=["RefLoRA", "RefLoRA-S"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_a_plain_loop(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    name, config, given, columns = KINDS[kind]

    def make() -> Any:
        model, tokenizer = cases.build(tmp_path / "model")
        return getattr(trl, f"{name}Trainer")(
            model=model, processing_class=tokenizer,
            args=getattr(trl, f"{name}Config")(str(tmp_path / "out"), **cases.OPTIONS, **config),
            train_dataset=datasets.Dataset.from_dict({"prompt": cases.TEXTS, **columns}),
            optimizers=(reflora.create_reflora_optimizer(model, lr=cases.LR, **options), None), **given,
        )  # fmt: skip

    trainer, other = make(), make()
    start = trained(other.model)
    calls = cases.recorded(trainer)
    assert len(calls) == 3
    cases.replay(other, other.optimizer, calls)
    found = trained(trainer.model)
    assert_equal(found, trained(other.model))
    assert all(float((found[name] - start[name]).abs().max()) > cases.LR / 2 for name in start)
