"""Second moments of a factor as one `[r, r]` matrix in place of a number for each element.

State `exp_avg_gram`: `E[gA gA^T] / n_in` and `E[gB^T gB] / n_out`; with moments="momentum" `gram_of_exp_avg`, the Grams
of the mean gradients without their bias, which can be computed anew from `exp_avg`. In float64: a Gram squares the
condition number, so it takes twice the digits of the gradients. A factor whose partner has no gradient takes AdamW's
own steps, with `exp_avg_sq` beside it, and comes back from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..pairs import LoRAPair
from .state import GRAM, MEAN_GRAM, SQUARES, Storage, gram_shape, zeros_like


def init_gram(state: dict[str, Any], pair: LoRAPair, factor: Tensor, name: str) -> None:
    """The factor's entry, where it is missing zeros or what AdamW's moments say; fitted to the factor's device."""
    found = state.get(name)
    if name == MEAN_GRAM:
        state.pop(GRAM, None)
    if found is not None:
        state[name] = found.to(factor.device, torch.float64).resolve_neg().contiguous()
        return
    state[name] = torch.zeros(gram_shape(pair), dtype=torch.float64, device=factor.device)
    if name == GRAM:
        rejoin(state, pair, factor, name)


def rejoin(state: dict[str, Any], pair: LoRAPair, factor: Tensor, name: str) -> None:
    """Take over AdamW's second moments, which have no elements off the diagonal. Nothing where there are none.

    A Gram of the mean gradient becomes 0: the next step, to which 0 tells nothing, takes it from the mean.
    """
    squares = state.pop(SQUARES, None)
    if squares is None:
        return
    if name == MEAN_GRAM:
        state[name].zero_()
        return
    matrices = list(zip(matrices_of(state[name], pair), rows_of(pair, factor, squares)))
    parted = (squares_of(matrix.diagonal(), squares.dtype).expand_as(view) for matrix, view in matrices)
    if all(torch.equal(view, own) for own, (_, view) in zip(parted, matrices)):
        return  # the factor has taken no step meanwhile
    for matrix, view in matrices:
        matrix.copy_(torch.diag_embed(view.double().mean(1)))


def part(
    state: dict[str, Any], pair: LoRAPair, factor: Tensor, storage: Storage, groups: Sequence[dict[str, Any]]
) -> None:  # fmt: skip
    """Give the factor AdamW's second moments, from the diagonal, if it has none yet. groups: with the factor's own."""
    if storage.grams not in state or SQUARES in state:
        return
    state[SQUARES] = zeros_like(factor, storage.dtype(factor))
    if storage.grams == GRAM:
        seconds = matrices_of(state[GRAM], pair).diagonal(dim1=1, dim2=2)
    else:
        group = next((g for g in groups if any(p is factor for p in g["params"])), groups[0])
        means = torch.stack([view.double().square().mean(1) for view in rows_of(pair, factor, state["exp_avg"])])
        seconds = means * of_mean(state["step"], group["betas"])
    for second, view in zip(seconds, rows_of(pair, factor, state[SQUARES])):
        view.copy_(squares_of(second, view.dtype).expand_as(view))


def of_mean(step: Tensor, betas: tuple[Any, Any]) -> Tensor:
    """What turns the square of exp_avg into an exp_avg_sq, each with its bias: float64 `[E, 1]`. step: one or `[E]`."""
    t, (beta1, beta2) = step.double().view(-1, 1), map(float, betas)
    return ((1 - beta2**t) / (1 - beta1**t) ** 2).where(t > 0, 0.0)


def squares_of(second: Tensor, dtype: torch.dtype) -> Tensor:
    """AdamW's second moments `[r, 1]` from those of rows, float64 `[r]`.

    What a narrow type has no room for is its smallest number: 0 would make the next step one by eps.
    """
    own, limits = second[:, None], torch.finfo(dtype)
    least = limits.smallest_normal * limits.eps
    return own.where(own <= 0, own.clamp_min(least)).to(dtype)


def matrices_of(gram: Tensor, pair: LoRAPair) -> Tensor:
    """`[experts, r, r]`."""
    return gram.view(-1, pair.rank, pair.rank)


def rows_of(pair: LoRAPair, factor: Tensor, tensor: Tensor) -> list[Tensor]:
    """`[r, n]` of a tensor like the factor, or like its part along n, one per expert."""
    return pair.views_A(tensor) if factor is pair.A else [view.mT for view in pair.views_B(tensor)]
