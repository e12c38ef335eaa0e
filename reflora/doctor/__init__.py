"""What the factors of a saved PEFT adapter are like, layer by layer, and a balanced copy of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan
from pathlib import Path

from ..contract import KAPPA_MAX, fail
from .adapter import Adapter, Layer, Written
from .folder import WEIGHTS
from .rules import CONFIG, shown

__all__ = ["CONFIG", "WEIGHTS", "Adapter", "Layer", "Written", "advice", "draw", "measured", "outcome", "summary"]
__all__ += ["table"]

# a median stable rank up to this, of layers of at least this rank, is a collapse: of tuned trainings it is 1.5 to 10
COLLAPSED, COLLAPSED_OF = 1.1, 4


def table(layers: Sequence[Layer], width: int = 48) -> str:
    """Aligned columns; long names lose their beginning."""
    heads = ("layer", "r", "stable rank", "eff. rank", "cond. A", "cond. B", "balance", "|B|/|A|", "|BA|", "")
    rows = [
        (
            shown(one.name, width), str(one.rank or "-"), _cell(one.stable_rank, ".1f"),
            _cell(one.effective_rank, ".1f"), _cell(one.condition_A, ".1e"), _cell(one.condition_B, ".1e"),
            _cell(one.balance, ".1e"), _cell(one.scale, ".2g"), _cell(one.norm, ".2g"), one.status,
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


def _cell(value: float, form: str) -> str:
    return "-" if isnan(value) else format(value, form)


def measured(layers: Sequence[Layer]) -> list[Layer]:
    """Those whose factors could be read and are finite."""
    return [one for one in layers if one.rank and not isnan(one.norm)]


def summary(layers: Sequence[Layer]) -> list[str]:
    """Lines below the table: how many layers, the worst of them, and which could not be read."""
    good = measured(layers)
    said = f"{len(layers)} layers"
    if good:
        worst = max(good, key=lambda one: max(one.condition_A, one.condition_B))
        said += f"; the worst conditioned is {shown(worst.name)}"
    unread: dict[str, list[str]] = {}
    for one in layers:
        if not one.rank:
            unread.setdefault(one.status, []).append(one.name)
    return [said, *listed("not read", unread)]


def outcome(written: Written, out: Path) -> list[str]:
    """What a balanced copy has kept and left out, a line each."""
    lines = [
        f"wrote {shown(out)}: {written.balanced} layers balanced, B A moved by at most {written.moved:.1e} of its norm",
        *listed("copied as they are", written.kept),
    ]
    if written.left_out:
        lines.append(f"not copied, of a training run or of the old factors: {_some(written.left_out)}")
    if written.adapters:
        lines.append(f"adapters of their own, copied as they are: {_some(written.adapters)}")
    return lines


def listed(what: str, names: Mapping[str, Sequence[str]]) -> list[str]:
    """A line for each reason, with the first of its layers."""
    return [f"{what} ({reason}): {_some(some)}" for reason, some in names.items()]


def _some(names: Sequence[str]) -> str:
    return ", ".join(shown(name, 50) for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


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
    """Condition numbers, balance and effective rank over the layers, as a picture.

    Raises ImportError without matplotlib and ValueError without layers.
    """
    if not layers:
        fail(f"--png {shown(path)}", "layers with finite factors", "none", "There is nothing to draw.")
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
