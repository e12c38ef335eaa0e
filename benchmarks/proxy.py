"""A causal language model of 2 M parameters, pretrained once on the English of Python's own docstrings.

A real model, small enough that fine-tuning it takes two minutes on one core, of text that every machine has.
`folder()` makes it where it is not there yet, in a quarter of an hour, as a folder that transformers loads.
"""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import data, harness

VOCABULARY, LENGTH, BATCH, STEPS, LR, LR_WARMUP = 2048, 128, 16, 1500, 2e-3, 100
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 6, "intermediate_size": 512, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
END = "<|end|>"


def folder(root: Path) -> Path:
    """Where the proxy lies in `root`; pretrained there if it is not yet."""
    texts = _texts()
    recipe = json.dumps([SHAPE, LENGTH, BATCH, STEPS, LR, LR_WARMUP])
    path = root / f"proxy-{data.digest(texts, [recipe])}"
    if not (path / "config.json").exists():
        _make(path, texts)
    return path


@functools.cache
def _texts() -> list[str]:
    return list(data.docstrings(Path(sysconfig.get_paths()["stdlib"])))


def _make(path: Path, texts: list[str]) -> None:
    """Written beside and moved into place, so that a run which was stopped leaves nothing half made."""
    tokenizer = _tokenizer(texts)
    model = _pretrained(tokenizer, texts)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    if path.exists():  # another process was faster
        shutil.rmtree(unfinished)
    else:
        unfinished.rename(path)


def _tokenizer(texts: Iterable[str]) -> Any:
    """Byte-level BPE."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    made = ByteLevelBPETokenizer()
    made.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, eos_token=END, pad_token=END)


def _pretrained(tokenizer: Any, texts: list[str]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, use_cache=False, eos_token_id=0, bos_token_id=None, pad_token_id=0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _rate)
    blocks = _blocks(tokenizer, texts)
    for _ in harness.progress(range(STEPS), "pretraining the proxy"):
        ids = next(blocks)
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def _rate(step: int) -> float:
    rising = min(1.0, (step + 1) / LR_WARMUP)
    return rising * (0.5 + 0.5 * math.cos(math.pi * step / STEPS))


def _blocks(tokenizer: Any, texts: list[str]) -> Iterator[Tensor]:
    """Endless batches `[BATCH, LENGTH]` of token ids: all texts one after another, cut into rows, in new orders."""
    ids = tokenizer([text + END for text in texts])["input_ids"]
    stream = torch.tensor([token for text in ids for token in text])
    rows = stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)
    generator = torch.Generator().manual_seed(0)
    while True:
        for chosen in torch.randperm(len(rows), generator=generator).split(BATCH):
            yield rows[chosen]
