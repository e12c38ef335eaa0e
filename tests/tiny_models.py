"""The benchmarks' models with their names, made of two small layers."""

from __future__ import annotations

import functools
import importlib.metadata
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import batches, data, models

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


@functools.cache
def texts() -> data.Task:
    """In place of the standard library's docstrings, whose parsing takes 2 s."""
    made = [data.Example(f"returns the {'abcdefghijk'[i % 11]} of {i}, or nothing", i % 11) for i in range(440)]
    return data.Task("texts", made[88:], made[:88], 11)


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """minilm, deberta-v3-base, vit-base, llama-7b and llama2-7b; no hub is asked, no docstring read."""
    import transformers

    def base(name: str, classes: int) -> tuple[Any, Any, str, str]:
        config = transformers.BertConfig(**SIZE, vocab_size=200, num_labels=classes)
        model = transformers.AutoModelForSequenceClassification.from_config(config)
        return model, batches.WordHashTokenizer(200), "text", "pretrained"

    def absent(*_: object) -> None:
        raise OSError("no checkpoint in a test")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(data, "stdlib_docstrings", texts)
    monkeypatch.setattr(models, "_pretrained", absent)
    monkeypatch.setattr(models, "_packaged", base)
    monkeypatch.setattr(models, "_VIT", {**SIZE, "image_size": 32, "patch_size": 8})
    monkeypatch.setattr(models, "_DEBERTA", {**models._DEBERTA, **SIZE, "vocab_size": 200})
    for name in ("llama-7b", "llama2-7b"):
        monkeypatch.setitem(models._LLAMA, name, {**SIZE, "vocab_size": 200, "num_key_value_heads": 2})


def needs_its_kernels() -> None:
    """Skips a test of `from_pretrained` where that needs a `kernels` which is not installed (transformers 5.25)."""
    import transformers

    needs = importlib.metadata.requires("transformers") or []
    needed = [one for one in needs if re.match(r"kernels\b(?!.*extra)", one)]
    if needed and not transformers.utils.is_kernels_available():
        pytest.skip(f"transformers {transformers.__version__} needs {needed[0]}")


def save_causal(folder: Path, texts: Sequence[str]) -> Path:
    """A LLaMA of two small layers with random weights and a tokenizer of its own, as `from_pretrained` reads them."""
    import tokenizers
    import transformers

    tokens = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    tokens.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    tokens.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokens.train_from_iterator(texts, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokens, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(str(folder))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **SIZE, vocab_size=len(tokenizer), num_key_value_heads=2, bos_token_id=1, eos_token_id=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(str(folder))
    return folder
