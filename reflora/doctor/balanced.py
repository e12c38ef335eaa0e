"""A copy of a saved adapter whose factors are balanced, with the same B A."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..adapters import Adapter, Copied, Stored, shown
from ..checks import fail
from ..columns import REFACTORED, SKIPPED
from ..functional import refactor_
from ..pairs import LoRAPair
from .effect import allowed, moved
from .layers import STATUS, copy_of


@dataclass(frozen=True)
class Written:
    """balanced: how many layers are. moved: how far B A has moved in the worst of them, relative to its norm.
    kept: status -> names of unchanged layers.
    """

    balanced: int
    moved: float
    kept: Mapping[str, list[str]]
    copied: Copied


def write_balanced(adapter: Adapter, out: Path) -> Written:
    """The adapter again, with `A A^T = B^T B` in every layer that can be refactored, and the same B A.

    Raises FileExistsError if `out` exists, and ValueError, with nothing written, if the folder holds something that
    cannot be copied, or a layer would move by more than the rounding of the stored dtype.
    """
    adapter.check_out(out, "--refactor")
    copies = [copy_of(pair) for pair in adapter.pairs]
    report = refactor_(copies)
    statuses = iter(zip(report.names, report.status.tolist()))
    tensors, kept = dict(adapter.tensors), defaultdict[str, list[str]](list)
    balanced, worst, renewed = 0, 0.0, iter(copies)
    for one in adapter.stored:
        if one.pair is None:
            kept[one.reason].append(one.name)
            continue
        new, own = next(renewed), [next(statuses) for _ in range(one.pair.experts)]
        if any(status == SKIPPED for _, status in own):  # for experts: all of them
            kept[STATUS[SKIPPED]].append(one.name)
            continue
        sound = sum(status == REFACTORED for _, status in own)
        for (name, status), factors, old in zip(own, new.factors, one.pair.factors):
            if status != REFACTORED:  # refactor_ has only scaled it
                kept[STATUS[int(status)]].append(name)
                factors[0].copy_(old[0])
                factors[1].copy_(old[1])
        balanced += sound
        worst = max(worst, _replace(tensors, adapter.tensors, one, new) if sound else 0.0)
    return Written(balanced, worst, dict(kept), adapter.write(out, tensors, "--refactor"))


def _replace(tensors: dict[str, Tensor], old: Mapping[str, Tensor], one: Stored, new: LoRAPair) -> float:
    """Round the factors of `new` to the stored dtypes and put them into `tensors`. Returns how far B A moves."""
    old_A, old_B = old[one.key_A], old[one.key_B]
    A, B = new.A.to(old_A.dtype).contiguous(), new.B.to(old_B.dtype).contiguous()
    apart = moved((old_A.double(), old_B.double()), (A.double(), B.double()), new.experts)
    if not apart <= allowed(old_A, old_B, new.rank):
        got = f"{apart:.1e} of it in {str(old_A.dtype).removeprefix('torch.')}"
        remedy = "Nothing is written. Save the adapter in float32 and try again."
        fail(shown(one.name), "B A that moves by no more than rounding", got, remedy)
    tensors.update({one.key_A: A, one.key_B: B})
    return apart
