"""What the baselines share: small matrices of all pairs at once, and the two ways to build on torch's fused AdamW."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def by_rank(pairs: Iterable[Pair]) -> list[list[Pair]]:
    """The pairs in groups of one rank, so that the `[r, r]` matrices of a group can be stacked."""
    groups: dict[int, list[Pair]] = {}
    for A, B in pairs:
        groups.setdefault(A.shape[0], []).append((A, B))
    return list(groups.values())


def grams(pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """`A A^T` and `B^T B` of pairs of one rank, each `[pairs, r, r]`."""
    return torch.stack([A @ A.T for A, _ in pairs]), torch.stack([B.T @ B for _, B in pairs])


def damped_inverse(X: Tensor, damping: float) -> Tensor:
    """`(X + damping I)^-1` of symmetric `[..., r, r]`, without `inv`'s wait for the device to look at its success."""
    return torch.linalg.inv_ex(X + damping * torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)).inverse


class AdjustedAdamW(torch.optim.AdamW):
    """torch's fused AdamW over `parameters`, with `adjust` in front of each step to rewrite the gradients of `pairs`.

    scaling: of the update. Options are AdamW's. A pair with a side that has no gradient is left to plain AdamW.
    """

    def __init__(self, parameters: Iterable[Tensor], pairs: Iterable[Pair], scaling: float = 1.0, **options: Any):
        super().__init__(parameters, fused=True, **options)
        self.pairs, self.scaling = list(pairs), scaling

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        live = [pair for pair in self.pairs if all(side.grad is not None for side in pair)]
        for group in by_rank(live):
            self.adjust(group)
        super().step()
        return loss

    def adjust(self, pairs: Sequence[Pair]) -> None:
        """Rewrite `.grad` of pairs of one rank, in place or by a new tensor."""
        raise NotImplementedError


class PairOptimizer(torch.optim.AdamW):
    """A step of its own for `pairs`, in `move`, and torch's fused AdamW for the other parameters.

    Options are AdamW's; the factors have the last parameter group, of which `move` gets the options.
    """

    def __init__(self, parameters: Iterable[Tensor], pairs: Iterable[Pair], **options: Any):
        self.pairs = list(pairs)
        self.step_count = 0
        paired = {id(factor) for pair in self.pairs for factor in pair}
        every = list(parameters)
        super().__init__([{"params": [p for p in every if id(p) not in paired]}], fused=True, **options)
        self.add_param_group({"params": [p for p in every if id(p) in paired]})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        own = self.param_groups.pop()  # AdamW must not see the factors
        try:
            loss = super().step(closure)
        finally:
            self.param_groups.append(own)
        self.step_count += 1
        self.move(by_rank(self.pairs), own)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """torch's, with the number of steps in each factor's state under AdamW's name, which its loading asks for."""
        for parameter in self.param_groups[-1]["params"]:
            if self.state.get(parameter):
                self.state[parameter]["step"] = torch.tensor(float(self.step_count))
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        steps = {int(self.state[p]["step"]) for p in self.param_groups[-1]["params"] if self.state.get(p)}
        self.step_count = max(steps, default=0)

    def move(self, groups: Sequence[Sequence[Pair]], options: dict[str, Any]) -> None:
        """Step all pairs, given in groups of one rank."""
        raise NotImplementedError
