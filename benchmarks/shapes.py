"""True shapes of the layers that LoRA adapts in known models, and random pairs of those shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# (n_in, n_out) of the adapted layers of one block, and the number of blocks
_BERT_LIKE = {"minilm": (6, 384, 1536), "deberta-v3-base": (12, 768, 3072)}
# hidden size, key/value size, intermediate size; adapted as in the paper: q, k, v, up, down
_LLAMA_LIKE = {
    "llama-7b": (32, 4096, 4096, 11008),
    "llama2-7b": (32, 4096, 4096, 11008),
    "llama3-8b": (32, 4096, 1024, 14336),
}
NAMES = (*_BERT_LIKE, *_LLAMA_LIKE)


def layers(name: str) -> list[tuple[int, int]]:
    """`(n_in, n_out)` of every adapted layer of a model of NAMES: 72 for deberta-v3-base, 160 for llama-7b.

    Raises ValueError for a name that is not in NAMES.
    """
    if name in _BERT_LIKE:
        blocks, hidden, inner = _BERT_LIKE[name]
        return blocks * [*4 * [(hidden, hidden)], (hidden, inner), (inner, hidden)]
    if name in _LLAMA_LIKE:
        blocks, hidden, cached, inner = _LLAMA_LIKE[name]
        return blocks * [(hidden, hidden), *2 * [(hidden, cached)], (hidden, inner), (inner, hidden)]
    raise ValueError(f"shapes: expected one of {', '.join(NAMES)}, got {name!r}.")


def size(layers: Sequence[tuple[int, int]], rank: int) -> int:
    """How many parameters the LoRA factors of `layers` have."""
    return rank * sum(n_in + n_out for n_in, n_out in layers)


def random_pairs(
    layers: Sequence[tuple[int, int]],
    rank: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    condition: float = 100.0,
) -> list[tuple[Tensor, Tensor]]:
    """Leaf pairs `A [r, n_in]`, `B [n_out, r]` as they are some way into training.

    A is drawn as PEFT does, B is smaller and has singular values spread over about `condition`.
    """
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for n_in, n_out in layers:
        A = (2 * torch.rand(rank, n_in, generator=generator) - 1) / math.sqrt(n_in)
        B = torch.randn(n_out, rank, generator=generator) * torch.logspace(0, -math.log10(condition), rank)
        basis = torch.linalg.qr(torch.randn(rank, rank, generator=generator)).Q
        pairs.append((_leaf(A, dtype, device), _leaf(0.02 * B @ basis, dtype, device)))
    return pairs


def _leaf(tensor: Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    return tensor.to(device=device, dtype=dtype).contiguous().requires_grad_()
