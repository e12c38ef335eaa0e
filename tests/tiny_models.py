"""The benchmarks' models with their names, made of two small layers."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import batches, models

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """minilm, vit-base and llama2-7b; nothing is looked up in a hub."""
    import transformers

    def base(classes: int) -> tuple[Any, Any, str, str]:
        config = transformers.BertConfig(**SIZE, vocab_size=200, num_labels=classes)
        model = transformers.AutoModelForSequenceClassification.from_config(config)
        return model, batches.WordHashTokenizer(200), "text", "random weights"

    def absent(*_: object) -> None:
        raise OSError("no checkpoint in a test")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(models, "_pretrained", absent)
    monkeypatch.setattr(models, "_base_of_minilm", base)
    monkeypatch.setattr(models, "_VIT", {**SIZE, "image_size": 32, "patch_size": 8})
    monkeypatch.setitem(models._LLAMA, "llama2-7b", {**SIZE, "vocab_size": 200, "num_key_value_heads": 2})
