"""Pairs of which every process holds a part (FSDP2, tensor parallelism, Megatron's splits); all compute the same S.

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
from ..pairs import LoRAPair, is_split, local
from .pairs import Counts, Outcome, multiply, scale_sides

HALF = (torch.bfloat16, torch.float16)


class ShardedOps:
    """As PairOps, for pairs some of which are sharded. `active` must be the same in every process.

    Raises ValueError where Megatron has split a factor and does not say over which processes.
    """

    def __init__(self, pairs: Sequence[LoRAPair], backend: str | None = None, precision: str = "float64"):
        check_backend(backend)
        check_precision(precision)
        self.pairs, self.backend, self.precision = list(pairs), backend, precision
        # by pair, its rows of the last solve's result table
        self._reports: dict[int, Tensor] = {}
        self._votes = voters(self.pairs)

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
        for (_, device), own in alike.items():
            of_A, of_B = (torch.cat(side) for side in zip(*(grams[i] for i in own)))
            steps = None if counts is None else torch.cat([counts[i] for i in own])
            sides = sides_of([self.pairs[i] for i in own], device)
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
        for group, device in self._votes:
            vote = torch.tensor(votes, dtype=torch.float32, device=device)
            dist.all_reduce(vote, dist.ReduceOp.MIN, group=group)
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


def sides_of(pairs: Sequence[LoRAPair], device: torch.device) -> tuple[Tensor, Tensor]:
    """n_in and n_out of every row: of the whole factors, not of this process's part."""
    rows = [(width(pair, pair.A), width(pair, pair.B)) for pair in pairs for _ in range(pair.experts)]
    sides = torch.tensor(rows, dtype=torch.int64, device=device)
    return sides[:, 0], sides[:, 1]


def width(pair: LoRAPair, factor: Tensor) -> int:
    """n of the whole factor: of a DTensor's shape, or of the parts that Megatron split it into, which are alike."""
    parts = split_group(factor).size() if is_split(factor) else 1
    return parts * factor.numel() // (pair.experts * pair.rank)


def _own_grams(pair: LoRAPair) -> list[tuple[int, Tensor]]:
    """By side, `[experts, r, r]` in float64: this process's part of the sums `A A^T` and `B^T B`."""
    rows_A = [row.double() for row in pair.views_A(along(pair.A, 1))]
    rows_B = [row.mT.double() for row in pair.views_B(along(pair.B, 0))]
    return [(side, torch.stack([row @ row.mT for row in rows])) for side, rows in ((1, rows_A), (0, rows_B))]


def summed(parts: Sequence[tuple[LoRAPair, int, Tensor]]) -> list[Tensor]:
    """The parts summed over the processes, in one all-reduce for all that are cut over the same ones."""
    together: dict[tuple[dist.ProcessGroup, ...], list[int]] = {}
    for number, (pair, side, _) in enumerate(parts):
        together.setdefault(groups_of(pair.A if side == 1 else pair.B), []).append(number)
    found = [gram for _, _, gram in parts]
    for groups, numbers in together.items():
        if not groups:
            continue
        buffer = torch.cat([found[number].flatten() for number in numbers])
        for group in groups:
            dist.all_reduce(buffer, group=group)
        for number, piece in zip(numbers, buffer.split([found[number].numel() for number in numbers])):
            found[number] = piece.view_as(found[number])
    return found


def groups_of(factor: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """The groups among whose processes a factor is cut, one after another; none where each holds it whole."""
    if isinstance(factor, DTensor):
        mesh = factor.device_mesh
        return tuple(mesh.get_group(dim) for dim, placed in enumerate(factor.placements) if is_cut(placed))
    return (split_group(factor),) if is_split(factor) else ()


def is_cut(placed: Any) -> bool:
    """Whether a placement gives each process a part. `is_shard` is false of FSDP2's on top of tensor parallelism."""
    return not (placed.is_replicate() or placed.is_partial())


def split_group(factor: Tensor) -> dist.ProcessGroup:
    """Among whose processes Megatron has split a factor."""
    try:
        from megatron.core.parallel_state import get_tensor_model_parallel_group

        return get_tensor_model_parallel_group()
    except (ImportError, AssertionError) as error:  # the latter where it has not been initialised
        remedy = "Import and initialise Megatron first: Grams are summed over its tensor-parallel group."
        wanted = "the group of megatron.core.parallel_state"
        fail(f"a factor {tuple(factor.shape)} that Megatron split", wanted, error, remedy)


def voters(pairs: Sequence[LoRAPair]) -> list[tuple[dist.ProcessGroup, Any]]:
    """Every group whose processes hold a pair, cut or replicated, with the device of its messages.

    In the order of the pairs, which all processes share.
    """
    found: dict[dist.ProcessGroup, Any] = {}
    for factor in (factor for pair in pairs for factor in (pair.A, pair.B)):
        if isinstance(factor, DTensor):
            mesh = factor.device_mesh
            found.update({mesh.get_group(dim): mesh.device_type for dim in range(mesh.ndim)})
        elif is_split(factor):
            found[split_group(factor)] = factor.device
    return list(found.items())


def along(tensor: Tensor, dim: int, factor: Tensor | None = None) -> Tensor:
    """This process's part when cut along `dim`: its own memory where it is cut so already, else a new tensor.

    factor: over which processes it is to be cut, if not as it is.
    """
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    like = factor if isinstance(factor, DTensor) else tensor
    return tensor.redistribute(placements=_cut_along(like, dim)).to_local()


def _cut_along(tensor: DTensor, dim: int) -> list[Any]:
    placements: tuple[Any, ...] = tensor.placements
    return [Shard(dim) if is_cut(placed) and placed.dim != dim else placed for placed in placements]


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
