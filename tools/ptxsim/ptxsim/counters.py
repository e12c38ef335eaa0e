"""Counters of a module's launches as a table: warp instructions by class, sectors, passes of shared memory."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from .module import Module


def _unit(side: str) -> str:
    return "sectors" if side.endswith("global") else "passes"


def summary(module: Module, clear: bool = True) -> dict[str, Any]:
    """Of all launches since the last clear. `least` is what the best layout of the same accesses would need."""
    by_class: dict[str, int] = defaultdict(int)
    out: dict[str, Any] = {"classes": by_class, "total": 0, "lanes": 0}
    for side in ("ld.global", "st.global", "ld.shared", "st.shared"):
        out[side] = {"instructions": 0, _unit(side): 0, "least": 0, "bytes": 0}
    for _line, cls, opcode, times, lanes, got, least, size, _loc, _text in module.stats(clear):
        by_class[cls] += times
        out["total"] += times
        out["lanes"] += lanes
        if cls in ("global", "shared"):
            row = out[f"{'st' if opcode.startswith('st') else 'ld'}.{cls}"]
            row["instructions"] += times
            row[_unit(cls)] += got
            row["least"] += least
            row["bytes"] += size
    return out


def lines(module: Module, top: int = 15) -> list[tuple[int, str]]:
    """Warp instructions by innermost source line, the most first."""
    by_line: dict[str, int] = defaultdict(int)
    for row in module.stats():
        by_line[row[8].split(" @")[0].rsplit(":", 1)[0]] += row[3]
    return sorted(((times, line) for line, times in by_line.items()), reverse=True)[:top]


def text(name: str, table: dict[str, Any]) -> str:
    """A summary in words."""
    mean = table["lanes"] / max(1, table["total"])
    rows = [f"{name}: {table['total']} warp instructions, {mean:.1f} lanes active"]
    ordered = sorted(table["classes"].items(), key=lambda entry: -entry[1])
    rows.append("  " + ", ".join(f"{cls} {times}" for cls, times in ordered))
    for side in ("ld.global", "st.global", "ld.shared", "st.shared"):
        row, unit = table[side], _unit(side)
        ratio = row[unit] / max(1, row["least"])
        cost = f"{row[unit]} {unit} (least {row['least']}, x{ratio:.2f})"
        rows.append(f"  {side}: {row['instructions']} instructions, {cost}, {row['bytes']} bytes")
    return "\n".join(rows)
