"""Pairs whose factors are DTensors (FSDP2): every process holds a part of them, and all compute the same S.

S depends on the factors only through their r x r Grams. These are sums over what the processes hold, so one all-reduce
of `[pairs, 2, r, r]` per step is all that S needs; the gradients are multiplied in place. A factor that is cut along r,
as `fully_shard` cuts A by default, is first resharded along its other side, by an all-to-all of it and of its gradient:
`reflora.shard_placement` avoids both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from ..ambient import independent
from ..backends import resolve
from ..checks import check_backend, check_precision, fail
from ..columns import DEGENERATE
from ..diagnostics import Diagnostics, row_names
from ..pairs import LoRAPair, local
from .pairs import Counts, Outcome, multiply, scale_sides

HALF = (torch.bfloat16, torch.float16)


class ShardedOps:
    """As PairOps, for pairs some of which are sharded. `active` must be the same in every process."""

    def __init__(self, pairs: Sequence[LoRAPair], backend: str | None = None, precision: str = "float64"):
        check_backend(backend)
        check_precision(precision)
        self.pairs, self.backend, self.precision = list(pairs), backend, precision
        # by pair, its rows of the last solve's result table
        self._reports: dict[int, Tensor] = {}

    def diagnostics(self) -> Diagnostics:
        """What the last call did, layer by layer, with the layers of its pairs only."""
        names = row_names([self.pairs[index] for index in self._reports])
        return Diagnostics(names, list(self._reports.values()), list(range(len(names))))

    def outcome(self) -> dict[int, Outcome]:
        """Outcome of the last call by pair."""
        return {index: Outcome.of(report) for index, report in self._reports.items()}

    def started(self) -> dict[int, Tensor]:
        """By pair, 0 where the last call found a factor at 0, else 1, float32 `[experts]`."""
        return {index: outcome.started for index, outcome in self.outcome().items()}

    def norms(self, indices: Iterable[int]) -> dict[int, Tensor]:
        """Frobenius norms of A and B of some pairs, float64 `[2, experts]`, in one all-reduce."""
        chosen = list(indices)
        parts = []
        for pair in (self.pairs[index] for index in chosen):
            for side, views in ((1, pair.views_A(local(pair.A))), (0, pair.views_B(local(pair.B)))):
                parts.append((pair, side, torch.stack([view.double().square().sum() for view in views])))
        sums = summed(parts)
        return {index: torch.stack(sums[2 * place : 2 * place + 2]).sqrt() for place, index in enumerate(chosen)}

    @independent()
    def solve(self, indices: Iterable[int], counts: Counts | None = None) -> dict[int, Tensor]:
        """S and S^-1 of some pairs, `[experts, 2, r, r]`."""
        chosen = list(indices)
        if not chosen:
            return {}
        sums = summed([(self.pairs[i], side, gram) for i in chosen for side, gram in _own_grams(self.pairs[i])])
        grams = dict(zip(chosen, zip(sums[::2], sums[1::2])))
        alike: dict[tuple, list[int]] = {}
        for index, (of_A, _) in grams.items():
            alike.setdefault((of_A.shape[-1], of_A.device), []).append(index)
        found: dict[int, Tensor] = {}
        reports: dict[int, Tensor] = {}
        for (r, device), own in alike.items():
            of_A, of_B = (torch.cat(side) for side in zip(*(grams[i] for i in own)))
            steps = None if counts is None else torch.cat([counts[i] for i in own])
            sides = sides_of([self.pairs[i] for i in own], r, device)
            both, results = resolve(self.backend, device).means((of_A, of_B), sides, self.precision, steps)
            sizes = [self.pairs[i].experts for i in own]
            found.update(zip(own, both.split(sizes)))
            reports.update(zip(own, results.split(sizes)))
        self._reports = {index: reports[index] for index in chosen}
        return {index: found[index] for index in chosen}

    def precondition(self, active: Sequence[bool], scalar: bool = False, counts: Counts | None = None) -> None:
        """`gA <- S^-1 gA`, `gB <- gB S` of each active pair's `.grad`."""
        if scalar:
            fail("scalar", "False for a sharded preconditioning", True, "RefLoRA-S refactors: call refactor().")
        self.apply(self.solve((index for index, on in enumerate(active) if on), counts))

    def apply(self, saved: Mapping[int, Tensor]) -> None:
        """The same with the matrices that `solve` returned."""
        views: list[Tensor] = []
        matrices: list[Tensor] = []
        back: list[tuple[Tensor, int, Tensor]] = []
        for index, both in saved.items():
            pair = self.pairs[index]
            if pair.A.grad is None or pair.B.grad is None:
                continue
            for grad, side in ((pair.A.grad, 1), (pair.B.grad, 0)):
                whole = along(grad, side)
                rows = pair.views_A(whole) if side == 1 else [view.mT for view in pair.views_B(whole)]
                views += rows
                matrices += both[:, side].unbind()
                back.append((grad, side, whole))
        multiply(views, matrices)
        for grad, side, whole in back:
            put_back(grad, side, whole)

    def scale_grads(self, index: int, unit: Tensor) -> None:
        """`gA` times A's unit, `gB` over B's, `[experts, 2]`."""
        pair = self.pairs[index]
        if pair.A.grad is not None and pair.B.grad is not None:
            scale_sides(pair, local(pair.A.grad), local(pair.B.grad), unit)

    def with_finite_grads(self, active: Sequence[bool]) -> list[bool]:
        """The active pairs whose gradients are finite in every process; syncs."""
        found = []
        for pair, on in zip(self.pairs, active):
            for side, factor in ((1, pair.A), (0, pair.B)):
                bad = torch.zeros(1, dtype=torch.float64, device=local(factor).device)
                if on and factor.grad is not None:
                    bad = bad.maximum((~local(factor.grad).isfinite().all()).to(bad))
                found.append((pair, side, bad))
        bads = torch.cat(summed(found)).tolist() if found else []
        return [on and not (of_A or of_B) for on, of_A, of_B in zip(active, bads[::2], bads[1::2])]

    def agree(self, finite: bool, moving: bool) -> tuple[bool, bool]:
        """Whether every process that holds a part of the pairs says finite, and whether any says moving."""
        votes: tuple[float, ...] = float(finite), float(not moving)
        # in the order of the pairs, which all processes share
        sharded = (factor for pair in self.pairs for factor in (pair.A, pair.B) if isinstance(factor, DTensor))
        for mesh in dict.fromkeys(factor.device_mesh for factor in sharded):
            for dim in range(mesh.ndim):
                vote = torch.tensor(votes, dtype=torch.float32, device=mesh.device_type)
                dist.all_reduce(vote, dist.ReduceOp.MIN, group=mesh.get_group(dim))
                votes = (*vote.tolist(),)
        return bool(votes[0]), not votes[1]

    @torch.no_grad()
    def refactor(self, active: Sequence[bool], scalar: bool) -> list[Tensor]:
        """RefLoRA-S: A times sqrt(s), B over it. Returns sqrt(s), float64 `[experts]` per pair, 1 where left alone."""
        if not scalar:
            remedy = "Precondition the gradients instead, as the optimizers do: the step is the same."
            fail("refactoring sharded factors", "scalar=True", scalar, remedy, NotImplementedError)
        self.solve(index for index, on in enumerate(active) if on)
        outcome = self.outcome()
        roots = []
        for index, pair in enumerate(self.pairs):
            if index not in outcome:
                roots.append(torch.ones(pair.experts, dtype=torch.float64, device=local(pair.A).device))
                continue
            status, scale = outcome[index].status, outcome[index].scale
            root = scale.sqrt()
            if pair.A.dtype in HALF:
                root = torch.exp2(root.log2().round())  # exact
            fits = torch.finfo(torch.float32)
            # where the full S is degenerate the scalar one is not
            sound = (status <= DEGENERATE) & (scale >= fits.tiny) & (scale <= fits.max)
            roots.append(root.where(sound, 1.0))
            scale_sides(pair, local(pair.A), local(pair.B), roots[-1])
        return roots


def sides_of(pairs: Sequence[LoRAPair], r: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """n_in and n_out of every row: of the whole factors, not of this process's part."""
    rows = [(pair.A.numel(), pair.B.numel(), pair.experts * r) for pair in pairs for _ in range(pair.experts)]
    sides = torch.tensor([(of_A // size, of_B // size) for of_A, of_B, size in rows], dtype=torch.int64, device=device)
    return sides[:, 0], sides[:, 1]


def _own_grams(pair: LoRAPair) -> list[tuple[int, Tensor]]:
    """By side, `[experts, r, r]` in float64: this process's part of the sums `A A^T` and `B^T B`."""
    rows_A = [row.double() for row in pair.views_A(along(pair.A, 1))]
    rows_B = [row.mT.double() for row in pair.views_B(along(pair.B, 0))]
    return [(side, torch.stack([row @ row.mT for row in rows])) for side, rows in ((1, rows_A), (0, rows_B))]


def summed(parts: Sequence[tuple[LoRAPair, int, Tensor]]) -> list[Tensor]:
    """The parts summed over the processes, in one all-reduce for all that are cut over the same ones."""
    together: dict[Any, list[int]] = {}
    for number, (pair, side, _) in enumerate(parts):
        factor = pair.A if side == 1 else pair.B
        if isinstance(factor, DTensor):
            cut = tuple(dim for dim, placement in enumerate(factor.placements) if placement.is_shard())
            together.setdefault((factor.device_mesh, cut), []).append(number)
    found = [gram for _, _, gram in parts]
    for (mesh, cut), numbers in together.items():
        buffer = torch.cat([found[number].flatten() for number in numbers])
        for dim in cut:
            dist.all_reduce(buffer, group=mesh.get_group(dim))
        for number, piece in zip(numbers, buffer.split([found[number].numel() for number in numbers])):
            found[number] = piece.view_as(found[number])
    return found


def along(tensor: Tensor, dim: int) -> Tensor:
    """This process's part when cut along `dim`: its own memory where it is cut so already, else a new tensor."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.redistribute(placements=_cut_along(tensor, dim)).to_local()


def _cut_along(tensor: DTensor, dim: int) -> list[Any]:
    return [Shard(dim) if placement.is_shard() else placement for placement in tensor.placements]


def put_back(tensor: Tensor, dim: int, part: Tensor) -> None:
    """Write `part`, from `along`, back into the tensor."""
    if not isinstance(tensor, DTensor):
        return
    wanted = _cut_along(tensor, dim)
    if list(tensor.placements) != wanted:
        whole = DTensor.from_local(
            part, tensor.device_mesh, wanted, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )
        local(tensor).copy_(whole.redistribute(placements=tensor.placements).to_local())
