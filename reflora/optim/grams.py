"""Second moments of a factor as one `[r, r]` matrix in place of a number for each element: state `exp_avg_gram`.

`E[gA gA^T] / n_in` and `E[gB^T gB] / n_out`, in float64: a Gram squares the condition number, so it takes twice the
digits of the gradients. A factor whose partner has no gradient takes AdamW's own steps, with `exp_avg_sq` beside it,
and comes back from there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..pairs import LoRAPair
from .state import GRAM, SQUARES, Storage, gram_shape, zeros_like


def init_gram(state: dict[str, Any], pair: LoRAPair, factor: Tensor) -> None:
    """The factor's entry, where it is missing zeros or what AdamW's moments say; fitted to the factor's device."""
    found = state.get(GRAM)
    if found is not None:
        state[GRAM] = found.to(factor.device, torch.float64).resolve_neg().contiguous()
        return
    state[GRAM] = torch.zeros(gram_shape(pair), dtype=torch.float64, device=factor.device)
    rejoin(state, pair, factor)


def rejoin(state: dict[str, Any], pair: LoRAPair, factor: Tensor) -> None:
    """Take over AdamW's second moments, which have no elements off the diagonal. Nothing where there are none."""
    squares = state.pop(SQUARES, None)
    if squares is None:
        return
    matrices = list(zip(matrices_of(state[GRAM], pair), rows_of(pair, factor, squares)))
    if all(torch.equal(view, squares_of(matrix, squares.dtype).expand_as(view)) for matrix, view in matrices):
        return  # the factor has taken no step meanwhile
    for matrix, view in matrices:
        matrix.copy_(torch.diag_embed(view.double().mean(1)))


def part(state: dict[str, Any], pair: LoRAPair, factor: Tensor, storage: Storage) -> None:
    """Give the factor AdamW's second moments, from the diagonal, if it has none yet."""
    if GRAM not in state or SQUARES in state:
        return
    state[SQUARES] = zeros_like(factor, storage.dtype(factor))
    for matrix, view in zip(matrices_of(state[GRAM], pair), rows_of(pair, factor, state[SQUARES])):
        view.copy_(squares_of(matrix, state[SQUARES].dtype).expand_as(view))


def squares_of(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """AdamW's second moments from the diagonal, `[r, 1]`.

    What a narrow type has no room for is its smallest number: 0 would make the next step one by eps.
    """
    own, limits = matrix.diagonal()[:, None], torch.finfo(dtype)
    least = limits.smallest_normal * limits.eps
    return own.where(own <= 0, own.clamp_min(least)).to(dtype)


def matrices_of(gram: Tensor, pair: LoRAPair) -> Tensor:
    """`[experts, r, r]`."""
    return gram.view(-1, pair.rank, pair.rank)


def rows_of(pair: LoRAPair, factor: Tensor, tensor: Tensor) -> list[Tensor]:
    """`[r, n]` of a tensor like the factor, or like its part along n, one per expert."""
    return pair.views_A(tensor) if factor is pair.A else [view.mT for view in pair.views_B(tensor)]
