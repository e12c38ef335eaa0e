"""InvariantAdamW for pairs that several processes hold: one all-reduce of four Grams a pair, and torch's operations.

Whatever a step depends on is an r x r sum over what the processes hold: the Grams of both factors and of both
gradients. With these every process computes the same frames and whitens its own part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ambient import independent
from ..backends.torch_frames import frames, whitener
from ..backends.torch_groups import reported, saturated
from ..backends.torch_invariant import MOST
from ..backends.torch_solve import gram_of_sums
from ..checks import check_whitening
from ..columns import RESULTS, SKIPPED
from ..pairs import LoRAPair, PairLike, local
from .grams import matrices_of, of_mean, rows_of, squares_of
from .groups import check_amsgrad
from .sharded import ShardedOps, along, put_back, sides_of, summed, width
from .state import GRAM, MEAN_GRAM, SQUARES, check_kept_moments, check_names, gram_shape, grams_of
from .wrapper import Wrapped, entries_of, reflora_class


class Side(NamedTuple):
    """One factor of a pair in a step: this process's parts, cut along `dim`, and the options of its group.

    kept: the mean of the gradients before the step, mean: after it.
    """

    pair: LoRAPair
    factor: Tensor
    dim: int
    weights: Tensor
    gradient: Tensor
    kept: Tensor
    mean: Tensor
    state: dict[str, Any]
    group: dict[str, Any]

    @property
    def computed(self) -> torch.dtype:
        return torch.float64 if self.factor.dtype == torch.float64 else torch.float32

    def rows(self, tensor: Tensor) -> list[Tensor]:
        return rows_of(self.pair, self.factor, tensor)

    def gram(self, tensor: Tensor) -> Tensor:
        """This process's part of the sums, float64 `[experts, r, r]`."""
        return torch.stack([row.double() @ row.double().mT for row in self.rows(tensor)])


class ShardedInvariantAdamW(reflora_class(torch.optim.AdamW)):  # type: ignore[misc]
    """Built by `create_reflora_optimizer(model, reflora.InvariantAdamW, ...)` where the model is sharded.

    Its options are InvariantAdamW's. A gradient that is not finite skips the whole step, in every process.
    """

    OWN = ("metric", "moments", "damping", "grams")

    def __init__(
        self, params: Any, pairs: Sequence[PairLike], *, metric: str = "reflora", moments: str = "gradients",
        damping: float = 1e-4, **options: Any,
    ):  # fmt: skip
        check_whitening(metric, moments, damping)
        self.metric, self.moments, self.damping = metric, moments, float(damping)
        self.grams = grams_of(moments)
        super().__init__(params, pairs, **options)
        self._check_written()

    def _check_written(self) -> None:
        super()._check_written()
        check_whitening(self.metric, self.moments, self.damping)
        check_kept_moments(self.grams, self.moments)
        for group in self.param_groups:
            check_amsgrad(group, group["params"], self.pairs)

    def _make_ops(self) -> ShardedOps:
        return ShardedOps(self.pairs, self.backend, self.precision)

    def _preconditioned(self, active: list[bool], steps: int) -> dict[Tensor, dict[str, Tensor]]:
        self._stepped = [pair for pair, on in zip(self.pairs, active) if on]
        self._numbers = [number for number, on in enumerate(active) if on]
        return {}

    def _base_step(self, *loss: Any) -> None:
        """The base class's step without the pairs, and theirs."""
        self._part()
        hidden = [(factor, factor.grad) for pair in self._stepped for factor in (pair.A, pair.B)]
        for factor, _ in hidden:
            factor.grad = None
        try:
            super()._base_step(*loss)
        finally:
            for factor, grad in hidden:
                factor.grad = grad
        self._whitened_step()

    def _part(self) -> None:
        """AdamW's second moments for a factor whose partner has no gradient (grams.part)."""
        lone = []
        for pair in self.pairs:
            if (pair.A.grad is None) == (pair.B.grad is None):
                continue
            factor, dim = (pair.A, 1) if pair.B.grad is None else (pair.B, 0)
            state = self.state.get(factor, {})
            if self.grams in state and SQUARES not in state:
                lone.append((pair, factor, dim, state))
        for (pair, factor, dim, state), seconds in zip(lone, self._seconds(lone)):
            squares = torch.zeros_like(factor.detach())
            part = along(squares, dim)
            for row, second in zip(rows_of(pair, factor, part), seconds):
                row.copy_(squares_of(second, part.dtype).expand_as(row))
            put_back(squares, dim, part)
            state[SQUARES] = squares

    def _seconds(self, lone: list[tuple[LoRAPair, Tensor, int, dict[str, Any]]]) -> list[Tensor]:
        """AdamW's second moments of rows, float64 `[experts, r]` each (grams.part)."""
        if self.grams == GRAM:
            return [matrices_of(state[GRAM], pair).diagonal(dim1=1, dim2=2) for pair, _, _, state in lone]
        betas = {param: group["betas"] for group in self.param_groups for param in group["params"]}
        parts = []
        for pair, factor, dim, state in lone:
            rows = rows_of(pair, factor, along(state["exp_avg"], dim))
            parts.append((pair, dim, torch.stack([row.double().square().sum(1) for row in rows])))
        result = []
        for (pair, factor, _, state), found in zip(lone, summed(parts)):
            result.append(found / width(pair, factor) * of_mean(state["step"].to(found.device), betas[factor]))
        return result

    def _rejoin(self, sides: list[Side]) -> None:
        """Take over AdamW's second moments, of factors that have taken its steps (grams.rejoin)."""
        parts = []
        sides = [side for side in sides if SQUARES in side.state]
        if self.grams == MEAN_GRAM:
            for side in sides:
                del side.state[SQUARES]
            return
        for side in sides:
            rows = side.rows(along(side.state[SQUARES], side.dim))
            matrices = matrices_of(side.state[GRAM], side.pair)
            total = torch.stack([row.double().sum(1) for row in rows])
            changed = [(row != squares_of(matrix.diagonal(), row.dtype)).sum() for row, matrix in zip(rows, matrices)]
            parts.append((side.pair, side.dim, torch.cat([total, torch.stack(changed).double()[:, None]], 1)))
        for side, found in zip(sides, summed(parts)):
            if found[:, -1].any():
                n = width(side.pair, side.factor)
                side.state[GRAM].copy_(torch.diag_embed(found[:, :-1] / n).view_as(side.state[GRAM]))
            del side.state[SQUARES]

    @independent()
    def _whitened_step(self) -> None:
        group_of = {param: group for group in self.param_groups for param in group["params"]}
        sides = [
            (self._side(pair, pair.A, 1, group_of[pair.A]), self._side(pair, pair.B, 0, group_of[pair.B]))
            for pair in self._stepped
        ]
        self._rejoin([side for both in sides for side in both])
        parts = []
        for both in sides:
            for side in both:
                of = side.mean if self.moments == "momentum" else side.gradient
                parts += [(side.pair, side.dim, side.gram(side.weights)), (side.pair, side.dim, side.gram(of))]
        sums = summed(parts)
        alike: dict[tuple, list[int]] = {}
        for number, pair in enumerate(self._stepped):
            alike.setdefault((pair.rank, local(pair.A).device, sides[number][0].computed), []).append(number)
        self._ops._reports = {}
        for (r, device, computed), chosen in alike.items():
            own = [sums[4 * number : 4 * number + 4] for number in chosen]
            self._step_alike([sides[number] for number in chosen], own, r, device, computed)

    def _step_alike(
        self, sides: list[tuple[Side, Side]], sums: list[list[Tensor]], r: int, device: torch.device,
        computed: torch.dtype,
    ) -> None:  # fmt: skip
        """Pairs of one rank, device and type; sums: of each the Grams of A, gA, B and gB."""
        of_A, of_gA, of_B, of_gB = (torch.cat(some) for some in zip(*sums))
        n = sides_of([a.pair for a, _ in sides], device)
        compute = getattr(torch, self.precision)
        a, b = gram_of_sums(of_A, n[0], compute), gram_of_sums(of_B, n[1], compute)
        found = frames(a, b, self.metric, computed, self.precision)
        sizes = [side.pair.experts for side, _ in sides]
        results = torch.full((len(of_A), RESULTS), torch.nan, dtype=torch.float64, device=device)
        values = reported(a, b, found)
        results[:, : values.shape[1]] = values
        numbers = {id(pair): number for pair, number in zip(self._stepped, self._numbers)}
        for (side, _), report in zip(sides, results.split(sizes)):
            self._ops._reports[numbers[id(side.pair)]] = report
        done = (found.status < SKIPPED).split(sizes)
        some = torch.stack([stepped.any() for stepped in done]).tolist()
        for place, (G, of_side, P) in enumerate(((of_gA, n[0], found.of_A), (of_gB, n[1], found.of_B))):
            per_row = (G / of_side.view(-1, 1, 1)).split(sizes)
            for both, own, frame, stepped, moves in zip(sides, per_row, P.split(sizes), done, some):
                if moves:
                    self._move(both[place], own, frame, stepped, compute)

    def _side(self, pair: LoRAPair, factor: Tensor, dim: int, group: dict[str, Any]) -> Side:
        state = self.state[factor]
        if "exp_avg" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            state["exp_avg"] = torch.zeros_like(factor)
        if self.grams == MEAN_GRAM:
            state.pop(GRAM, None)
        if self.grams not in state:
            state[self.grams] = torch.zeros(gram_shape(pair), dtype=torch.float64, device=local(factor).device)
        assert factor.grad is not None
        gradient = along(factor.grad, dim, factor)
        scale = getattr(self, "grad_scale", None)
        sign = -1 if group["maximize"] else 1
        wide = torch.float64 if factor.dtype == torch.float64 else torch.float32
        gradient = sign * gradient.to(wide) / (1 if scale is None else scale.to(gradient.device))
        gradient = saturated(gradient, MOST[wide])
        weights, kept = along(factor, dim), along(state["exp_avg"], dim)
        mean = kept.to(wide).lerp(gradient, 1 - float(group["betas"][0])).to(kept.dtype)
        return Side(pair, factor, dim, weights, gradient, kept, mean, state, group)

    def _move(self, side: Side, G: Tensor, P: Tensor, done: Tensor, compute: torch.dtype) -> None:
        """One factor; G `[experts, r, r]` over n, of the gradient or of its mean; done: experts that are stepped."""
        group, state = side.group, side.state
        beta1, beta2 = map(float, group["betas"])
        state["step"] += 1
        t = float(state["step"])
        kept = state[self.grams].view(G.shape)
        if self.moments == "momentum":
            V = second = G / (1 - beta1**t) ** 2
        else:
            V = beta2 * kept + (1 - beta2) * G
            second = V / (1 - beta2**t)
        kept.copy_(V.where(done.view(-1, 1, 1), kept))
        K = whitener(second, P, self.damping, float(group["eps"]), compute).to(side.computed)
        lr, decay = group["lr"], float(group["weight_decay"])
        top = torch.finfo(side.factor.dtype).max
        rows = (side.rows(part) for part in (side.weights, side.kept, side.mean))
        for w, old, m, k, on in zip(*rows, K, done):
            old.copy_(m.where(on, old))
            wide = w.to(side.computed)
            moved = wide * (1 - lr * decay) - lr / (1 - beta1**t) * (k @ m.to(side.computed))
            w.copy_(saturated(moved, top).where(on, wide))
        for tensor, part in ((side.factor, side.weights), (state["exp_avg"], side.kept)):
            put_back(tensor, side.dim, part)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what state_dict() gave, or the state of a torch.optim.AdamW over the same parameters.

        Raises:
            ValueError: Another optimizer's state. Nothing has changed then.
        """
        factors = {factor for pair in self.pairs for factor in (pair.A, pair.B)}
        for param, entries in entries_of(self, state_dict):
            if param in factors:
                check_names(entries, self.grams)
        for group, own in zip(state_dict["param_groups"], self.param_groups):
            check_amsgrad(group, own["params"], self.pairs)
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self.OWN}}

    def __reduce__(self) -> tuple[Any, ...]:
        _, _, state = super().__reduce__()
        return _blank, (), state


def _blank() -> Wrapped:
    return ShardedInvariantAdamW.__new__(ShardedInvariantAdamW)
