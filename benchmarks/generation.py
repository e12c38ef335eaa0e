"""Answers of a causal model, in batches of prompts of like length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def responses(
    model: nn.Module, tokenizer: Any, prompts: Sequence[str], batch: int, beams: int, new_tokens: int
) -> Iterator[list[tuple[int, str]]]:
    """Batches of `(index of the prompt, response)`, the longest prompts first: what is short of memory fails at once.

    Beam search without sampling; padded on the left, and the padding masked.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))
    tokenizer.padding_side = "left"
    model.eval()
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        encoded = tokenizer([prompts[index] for index in chosen], padding="longest", return_tensors="pt")
        inputs = {name: encoded[name].to(device) for name in ("input_ids", "attention_mask")}
        made = _generate(model, inputs, tokenizer, beams, new_tokens)
        texts = tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        yield [(index, text.strip()) for index, text in zip(chosen, texts)]


@torch.no_grad()
def _generate(model: nn.Module, inputs: dict[str, Tensor], tokenizer: Any, beams: int, new_tokens: int) -> Tensor:
    from transformers import GenerationConfig

    # a config of its own: that of a checkpoint may ask for sampling
    config = GenerationConfig(
        max_new_tokens=new_tokens,
        num_beams=beams,
        do_sample=False,
        use_cache=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model.generate(**inputs, generation_config=config)  # type: ignore[operator]
