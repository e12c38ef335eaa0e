"""From examples to tensors: batches of token ids of one fixed length, so that every iteration costs the same."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .data import Example


class WordHashTokenizer:
    """Words to ids by hash, for models with random weights: real text, real lengths, nothing to download.

    Ids 0, 1 and 2 are padding, start and separator.
    """

    pad_token_id = 0

    def __init__(self, vocabulary: int):
        self.vocabulary = vocabulary

    def ids(self, text: str) -> list[int]:
        words = re.findall(r"\w+|[^\w\s]", text.lower())
        return [3 + zlib.crc32(word.encode()) % (self.vocabulary - 3) for word in words]

    def __call__(
        self, text: Sequence[str], text_pair: Sequence[str] | None = None, *, max_length: int, padding: Any, **_: Any
    ) -> dict[str, Tensor]:
        rows = []
        for index, first in enumerate(text):
            tokens = [1, *self.ids(first), 2]
            if text_pair is not None:
                tokens += [*self.ids(text_pair[index]), 2]
            rows.append(tokens[:max_length])
        width = max_length if padding == "max_length" else max(map(len, rows))
        ids = torch.tensor([row + [self.pad_token_id] * (width - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": (ids != self.pad_token_id).long()}


def encode(tokenizer: Any, examples: Sequence[Example], length: int, fixed: bool, causal: bool) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels`, each `[batch, length]` but for class labels `[batch]`.

    fixed: pad to `length`, else to the longest of the batch. causal: the labels are the tokens, -100 at padding.
    """
    pairs = [example.pair or "" for example in examples] if any(example.pair for example in examples) else None
    encoded = tokenizer(
        [example.text for example in examples],
        pairs,
        max_length=length,
        padding="max_length" if fixed else "longest",
        truncation=True,
        return_tensors="pt",
    )
    batch = dict(encoded)
    if causal:
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    else:
        batch["labels"] = torch.tensor([example.label for example in examples])
    return batch


def batches(examples: Sequence[Example], size: int, seed: int) -> Iterator[list[Example]]:
    """Endless batches of `size`, each epoch in a new order drawn from `seed`; what is left of an epoch is dropped."""
    if len(examples) < size:
        raise ValueError(f"--batch: expected at most the {len(examples)} examples of the data, got {size}.")
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(examples), generator=generator).tolist()
        for start in range(0, len(order) - size + 1, size):
            yield [examples[index] for index in order[start : start + size]]


def images(size: int, side: int, classes: int, count: int, seed: int) -> list[dict[str, Tensor]]:
    """`count` batches of random `pixel_values [size, 3, side, side]` and class `labels [size]`."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "pixel_values": torch.randn(size, 3, side, side, generator=generator),
            "labels": torch.randint(classes, (size,), generator=generator),
        }
        for _ in range(count)
    ]
