"""A saved PEFT adapter: its LoRA pairs, what they are like, and a balanced copy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..checks import fail
from ..columns import DEGENERATE, REFACTORED, SKIPPED
from ..functional import refactor_
from ..pairs import LoRAPair
from .effect import allowed, moved
from .folder import WEIGHTS, adapters_in, check_folder, check_place, contents, read_tensors, write_copy
from .rules import CONFIG, read_config, read_rules, shown
from .stored import Stored, read_stored

STATUS = {REFACTORED: "", DEGENERATE: "degenerate", SKIPPED: "not finite"}
NAN = float("nan")


@dataclass(frozen=True)
class Layer:
    """A row of the table; an experts layer has one per expert.

    stable_rank: `||B A||_F^2 / ||B A||_2^2`; effective_rank: exp of the entropy of the singular values of B A over
    their sum; both 0 for B A = 0. balance: `||A A^T - B^T B||_F / ||A A^T||_F`. condition_A, condition_B: as in
    `Diagnostics`. scale: `||B||_F / ||A||_F`. status: "" for a layer that can be balanced. `rank` is 0 and the rest NaN
    where A and B could not be read as such; `status` says why.
    """

    name: str
    rank: int
    stable_rank: float
    effective_rank: float
    condition_A: float
    condition_B: float
    balance: float
    scale: float
    norm: float
    status: str


@dataclass(frozen=True)
class Written:
    """balanced: how many layers are. moved: how far B A has moved in the worst of them, relative to its norm.
    kept: status -> names of unchanged layers. left_out: files of a training run. adapters: subfolders with adapters of
    their own, copied as they are.
    """

    balanced: int
    moved: float
    kept: Mapping[str, list[str]]
    left_out: list[str]
    adapters: list[str]


class Adapter:
    """The tensors of a folder written by `PeftModel.save_pretrained`.

    `stored` are its layers; `pairs` those whose update is known to be B A.

    Raises ValueError where the folder has no safetensors file (a pickle is not read: it can run code), no config, no
    LoRA pair, or an adapter whose update is not known to be B A.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        check_folder(folder)
        self.config = read_config(folder)
        self.rules = read_rules(self.config, shown(folder / CONFIG))
        self.tensors, self.metadata = read_tensors(folder / WEIGHTS)
        self.stored = read_stored(self.tensors, self.rules)
        self.pairs = [one.pair for one in self.stored if one.pair]
        if not self.stored:
            got = f"{len(self.tensors)} tensors, none named lora_A and lora_B"
            fail(shown(folder), "a LoRA adapter", got, "Other kinds of adapters have no such factors.")
        if not self.pairs:
            first = self.stored[0]
            got = f"none of {len(self.stored)} ({shown(first.name, 40)}: {shown(first.reason)})"
            fail(shown(folder), "layers whose update is B A", got, "Leave this adapter as it is.")

    def layers(self) -> list[Layer]:
        """Measured in float64."""
        copies = [_copy(pair) for pair in self.pairs]
        spectra = [_spectrum(A, B) for pair in copies for A, B in _factors(pair)]
        report = refactor_(copies)  # on copies: it reports what they were like
        columns = (report.condition_A, report.condition_B, report.balance, report.scale, report.status)
        rows = zip(report.names, spectra, *(column.tolist() for column in columns))
        found = []
        for one in self.stored:
            if one.pair is None:
                found.append(Layer(one.name, 0, NAN, NAN, NAN, NAN, NAN, NAN, NAN, one.reason))
                continue
            for _ in range(one.pair.experts):
                name, (stable, effective, norm), k_A, k_B, balance, scale, status = next(rows)
                state = STATUS[int(status)]
                found.append(Layer(name, one.pair.rank, stable, effective, k_A, k_B, balance, scale, norm, state))
        return found

    def write_balanced(self, out: Path) -> Written:
        """The folder again, with `A A^T = B^T B` in every layer that can be refactored, and the same B A.

        Raises FileExistsError if `out` exists, and ValueError, with nothing written, if the folder holds something that
        cannot be copied, or a layer would move by more than the rounding of the stored dtype.
        """
        check_place(self.folder, out)
        contents(self.folder)  # what cannot be copied is reported before the work
        copies = [_copy(pair) for pair in self.pairs]
        report = refactor_(copies)
        statuses = iter(zip(report.names, report.status.tolist()))
        tensors, kept = dict(self.tensors), defaultdict[str, list[str]](list)
        balanced, worst, renewed = 0, 0.0, iter(copies)
        for one in self.stored:
            if one.pair is None:
                kept[one.reason].append(one.name)
                continue
            new, own = next(renewed), [next(statuses) for _ in range(one.pair.experts)]
            if any(status == SKIPPED for _, status in own):  # for experts: all of them
                kept[STATUS[SKIPPED]].append(one.name)
                continue
            sound = sum(status == REFACTORED for _, status in own)
            for (name, status), factors, old in zip(own, _factors(new), _factors(one.pair)):
                if status != REFACTORED:  # refactor_ has only scaled it
                    kept[STATUS[int(status)]].append(name)
                    factors[0].copy_(old[0])
                    factors[1].copy_(old[1])
            balanced += sound
            worst = max(worst, self._replace(tensors, one, new) if sound else 0.0)
        left_out = write_copy(self.folder, out, tensors, self.metadata)
        others = [name for name in adapters_in(self.folder) if name not in left_out]
        return Written(balanced, worst, dict(kept), left_out, others)

    def _replace(self, tensors: dict[str, Tensor], one: Stored, new: LoRAPair) -> float:
        """Round the factors of `new` to the stored dtypes and put them into `tensors`. Returns how far B A moves."""
        old_A, old_B = self.tensors[one.key_A], self.tensors[one.key_B]
        A, B = new.A.to(old_A.dtype).contiguous(), new.B.to(old_B.dtype).contiguous()
        apart = moved((old_A.double(), old_B.double()), (A.double(), B.double()), new.experts)
        if not apart <= allowed(old_A, old_B, new.rank):
            got = f"{apart:.1e} of it in {str(old_A.dtype).removeprefix('torch.')}"
            remedy = "Nothing is written. Save the adapter in float32 and try again."
            fail(shown(one.name), "B A that moves by no more than rounding", got, remedy)
        tensors.update({one.key_A: A, one.key_B: B})
        return apart


def _copy(pair: LoRAPair) -> LoRAPair:
    A, B = (t.to(torch.float64, copy=True) for t in (pair.A, pair.B))
    return LoRAPair(pair.name, A, B, pair.layout)


def _factors(pair: LoRAPair) -> list[tuple[Tensor, Tensor]]:
    return list(zip(pair.views_A(pair.A), pair.views_B(pair.B)))


def _spectrum(A: Tensor, B: Tensor) -> tuple[float, float, float]:
    """Stable rank, effective rank and Frobenius norm of B A, which is never formed."""
    if not (A.isfinite().all() and B.isfinite().all()):
        return NAN, NAN, NAN
    scales = [float(t.abs().max()) for t in (A, B)]
    if min(scales) == 0:
        return 0.0, 0.0, 0.0
    # so that squares of the largest entries are finite
    A, B = A / scales[0], B / scales[1]
    values = torch.linalg.svdvals(torch.linalg.qr(B).R @ torch.linalg.qr(A.mT).R.mT)
    if float(values.sum()) == 0:
        return 0.0, 0.0, 0.0
    share = values / values.sum()
    entropy = -torch.special.xlogy(share, share).sum()
    norm = float(values.norm()) * scales[0] * scales[1]
    return float((values / values[0]).square().sum()), float(entropy.exp()), norm
