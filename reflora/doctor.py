"""What the factors of a saved PEFT adapter are like, layer by layer, and a balanced copy of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .contract import DEGENERATE, KAPPA_MAX, REFACTORED, SKIPPED, LoRAPair, fail
from .functional import refactor_

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
NAMES = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))
# a median stable rank up to this, of layers of at least this rank, is a collapse: of tuned trainings it is 1.5 to 10
COLLAPSED, COLLAPSED_OF = 1.1, 4
STATUS = {REFACTORED: "", DEGENERATE: "degenerate", SKIPPED: "not finite"}


@dataclass(frozen=True)
class Layer:
    """A row of the table; an experts layer has one an expert.

    stable_rank: `||B A||_F^2 / ||B A||_2^2`; effective_rank: exp of the entropy of the singular values of B A over
    their sum; both 0 for B A = 0. balance: `||A A^T - B^T B||_F / ||A A^T||_F`. condition_A, condition_B: of
    `Diagnostics`. scale: `||B||_F / ||A||_F`.
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


class Adapter:
    """The tensors of a folder that `PeftModel.save_pretrained` has written.

    Raises ValueError where the folder has no safetensors file (a pickle is not read: it can run code), no config, or
    no LoRA pair.
    """

    def __init__(self, folder: Path):
        from safetensors import safe_open

        for name in (WEIGHTS, CONFIG):
            if not (folder / name).is_file():
                remedy = "Pass what PeftModel.save_pretrained(FOLDER) has written, with safetensors."
                fail(str(folder), f"a folder with {name}", "none there", remedy)
        self.folder = folder
        self.config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        with safe_open(str(folder / WEIGHTS), framework="pt") as file:
            self.metadata = file.metadata()
            self.tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.pairs = [self._pair(*names) for names in _paired(self.tensors)]
        if not self.pairs:
            got = f"{len(self.tensors)} tensors, none named lora_A and lora_B"
            fail(str(folder), "a LoRA adapter", got, "Other kinds of adapters have no such factors.")

    def _pair(self, name: str, key_A: str, key_B: str) -> LoRAPair:
        A, B = self.tensors[key_A], self.tensors[key_B]
        r = self.config.get("r")
        layout = "conv" if A.dim() > 2 else "linear"
        if self.config.get("target_parameters") and r and A.dim() == 2 and A.shape[0] > r and A.shape[0] % r == 0:
            layout = f"experts({A.shape[0] // r})"
        return LoRAPair(name, A, B, layout)

    def layers(self) -> list[Layer]:
        """Measured in float64."""
        copies = [_copy(pair) for pair in self.pairs]
        spectra = [_spectrum(A, B) for pair in copies for A, B in _factors(pair)]
        report = refactor_(copies)  # of the copies: it says what they were like
        columns = (report.condition_A, report.condition_B, report.balance, report.scale, report.status)
        ranks = [pair.rank for pair in copies for _ in range(pair.experts)]
        return [
            Layer(name, rank, stable, effective, k_A, k_B, balance, scale, norm, STATUS[int(status)])
            for name, rank, (stable, effective, norm), k_A, k_B, balance, scale, status in zip(
                report.names, ranks, spectra, *(column.tolist() for column in columns)
            )
        ]

    def write_balanced(self, out: Path) -> float:
        """The folder again, with `A A^T = B^T B` in every layer that can be refactored, and the same B A.

        Returns by how much B A has moved in the worst layer, relative to its norm: the rounding of the stored type.
        Raises FileExistsError where `out` is there.
        """
        from safetensors.torch import save_file

        shutil.copytree(self.folder, out)
        copies = [_copy(pair) for pair in self.pairs]
        refactor_(copies)
        tensors, moved = dict(self.tensors), 0.0
        for (_, *keys), old, new in zip(_paired(self.tensors), self.pairs, copies):
            kept = _copy(old)
            for key, factor, stored in zip(keys, (new.A, new.B), (kept.A, kept.B)):
                tensors[key] = factor.to(self.tensors[key].dtype).contiguous()
                stored.copy_(tensors[key])
            for (A, B), (new_A, new_B) in zip(_factors(_copy(old)), _factors(kept)):
                apart = _singular_values(torch.cat([new_A, A]), torch.cat([new_B, -B], 1)).norm()
                moved = max(moved, float(apart / _singular_values(A, B).norm().clamp_min(1e-300)))
        save_file(tensors, str(out / WEIGHTS), self.metadata)
        return moved


def table(layers: Sequence[Layer], width: int = 48) -> str:
    """Aligned columns; long names lose their beginning."""
    heads = ("layer", "r", "stable rank", "eff. rank", "cond. A", "cond. B", "balance", "|B|/|A|", "|BA|", "")
    rows = [
        (
            one.name if len(one.name) <= width else f"...{one.name[3 - width :]}",
            str(one.rank), f"{one.stable_rank:.1f}", f"{one.effective_rank:.1f}", f"{one.condition_A:.1e}",
            f"{one.condition_B:.1e}", f"{one.balance:.1e}", f"{one.scale:.2g}", f"{one.norm:.2g}", one.status,
        ) for one in layers
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(heads, *rows)]
    lines = [
        "  ".join(
            cell.ljust(w) if place in (0, 9) else cell.rjust(w) for place, (cell, w) in enumerate(zip(row, widths))
        )
        for row in (heads, tuple("-" * w for w in widths), *rows)
    ]
    return "\n".join(line.rstrip() for line in lines)


def advice(layers: Sequence[Layer]) -> str:
    """What the stable ranks say of the training; "" where they say nothing."""
    ranks = [one.stable_rank for one in layers if one.stable_rank > 0 and one.rank >= COLLAPSED_OF]
    median = sorted(ranks)[len(ranks) // 2] if ranks else float("inf")
    if median > COLLAPSED:
        return ""
    return (
        f"stable rank {median:.2f} in the median: nearly all of B A is one direction. The learning rate was low or the "
        "training short; with RefLoRA, warmup_steps=0 does this from B = 0 under Adam, and the default does not."
    )


def draw(layers: Sequence[Layer], path: Path) -> None:
    """Condition numbers, balance and effective rank over the layers, as a picture. Raises ImportError."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("a picture needs matplotlib: pip install matplotlib") from error

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, middle, bottom) = pyplot.subplots(3, 1, sharex=True, figsize=(9, 6.5), layout="constrained")
    place = range(len(layers))
    top.semilogy(place, [one.condition_A for one in layers], ".", label="A", color="tab:blue")
    top.semilogy(place, [one.condition_B for one in layers], ".", label="B", color="tab:orange")
    top.axhline(KAPPA_MAX["float64"], color="grey", lw=0.8, ls="--", label="degenerate past this")
    top.set(ylabel="condition number")
    top.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    middle.semilogy(place, [one.balance for one in layers], ".", color="tab:green")
    low, high = middle.get_ylim()
    middle.set_ylim(min(low, 1e-2), max(high, 2.0))
    middle.set(ylabel=r"$\|AA^\top - B^\top B\|\,/\,\|AA^\top\|$")
    bottom.bar(place, [one.rank for one in layers], color="0.85", width=1.0, label="r")
    bottom.bar(place, [one.effective_rank for one in layers], color="tab:blue", width=0.7, label="effective rank of BA")
    bottom.set(xlabel="layer", ylabel="rank", xlim=(-0.7, len(layers) - 0.3))
    bottom.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _paired(tensors: Mapping[str, Tensor]) -> list[tuple[str, str, str]]:
    """(layer, key of A, key of B), by name, numbers in it as numbers."""
    found = []
    for left, right in NAMES:
        for key in tensors:
            parts = key.split(".")
            if left in parts:
                other = ".".join(right if part == left else part for part in parts)
                name = ".".join(parts[: parts.index(left)]).removeprefix("base_model.model.")
                if other in tensors:
                    found.append((name, key, other))
    return sorted(found, key=lambda one: [part.zfill(9) if part.isdigit() else part for part in one[0].split(".")])


def _copy(pair: LoRAPair) -> LoRAPair:
    A, B = (t.to(torch.float64, copy=True) for t in (pair.A, pair.B))
    return LoRAPair(pair.name, A, B, pair.layout)


def _factors(pair: LoRAPair) -> list[tuple[Tensor, Tensor]]:
    return list(zip(pair.views_A(pair.A), pair.views_B(pair.B)))


def _singular_values(A: Tensor, B: Tensor) -> Tensor:
    """Of B A, which is never formed."""
    return torch.linalg.svdvals(torch.linalg.qr(B).R @ torch.linalg.qr(A.mT).R.mT)


def _spectrum(A: Tensor, B: Tensor) -> tuple[float, float, float]:
    """Stable rank, effective rank and Frobenius norm of B A."""
    if not (A.isfinite().all() and B.isfinite().all()):
        return float("nan"), float("nan"), float("nan")
    values = _singular_values(A, B)
    share = values / values.sum().clamp_min(1e-300)
    entropy = -torch.special.xlogy(share, share).sum()
    if float(values.sum()) == 0:
        return 0.0, 0.0, 0.0
    return float((values / values[0]).square().sum()), float(entropy.exp()), float(values.norm())
