"""Build a notebook from a script of cells, `# %%` and `# %% [markdown]`, with what it prints and draws.

python .ci/notebook.py examples/tour.py examples/tour.ipynb

The cells run in this process, in a folder of their own, without Jupyter: text and pictures are kept as a notebook's.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CELL = re.compile(r"^# %%( \[markdown\])?\n", re.MULTILINE)
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def cells(source: str) -> list[tuple[str, str]]:
    """("markdown" or "code", text) of each cell."""
    _, *parts = CELL.split(source)
    found = []
    for mark, body in zip(parts[::2], parts[1::2]):
        text = re.sub(r"^# ?", "", body, flags=re.MULTILINE) if mark else body
        found.append(("markdown" if mark else "code", text.strip("\n")))
    return found


def picture(png: bytes) -> dict[str, Any]:
    data = {"image/png": base64.b64encode(png).decode(), "text/plain": ["<picture>"]}
    return {"output_type": "display_data", "metadata": {}, "data": data}


@contextlib.contextmanager
def shown(outputs: list[dict[str, Any]]) -> Iterator[None]:
    """`pyplot.show()` and IPython's `display(Image(...))` add to `outputs`; packages that talk are not installed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def show() -> None:
        for number in pyplot.get_fignums():
            png = io.BytesIO()
            pyplot.figure(number).savefig(png, dpi=110, format="png")
            outputs.append(picture(png.getvalue()))
        pyplot.close("all")

    module = types.ModuleType("IPython.display")
    module.Image = lambda path, width: Path(path).read_bytes()  # type: ignore[attr-defined]
    module.display = lambda png: outputs.append(picture(png))  # type: ignore[attr-defined]
    kept = {name: sys.modules.get(name) for name in ("IPython", "IPython.display", "deepspeed")}, pyplot.show
    sys.modules["IPython.display"], pyplot.show = module, show
    sys.modules["deepspeed"] = None  # type: ignore[assignment]
    package = sys.modules["IPython"] = types.ModuleType("IPython")
    package.get_ipython, package.version_info = (lambda: None), (9, 0)  # type: ignore[attr-defined]  # matplotlib asks
    try:
        yield
    finally:
        pyplot.show = kept[1]
        for name, found in kept[0].items():
            sys.modules.pop(name)
            if found:
                sys.modules[name] = found


def build(source: str) -> dict[str, Any]:
    """The notebook, with its cells run from first to last in a new folder."""
    made, names, before, screen = [], {"__name__": "__main__"}, Path.cwd(), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as place, shown(screen):
        os.chdir(place)
        try:
            for number, (kind, text) in enumerate(cells(source)):
                cell: dict[str, Any] = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}}
                cell["source"] = text.splitlines(keepends=True)
                if kind == "code":
                    cell |= {"execution_count": number, "outputs": run(text, names, screen)}
                made.append(cell)
        finally:
            os.chdir(before)
    return {"cells": made, "metadata": {"kernelspec": KERNEL}, "nbformat": 4, "nbformat_minor": 5}


def run(text: str, names: dict[str, Any], screen: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a notebook would show below the cell: text first, pictures after it."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(text, "<cell>", "exec"), names)
    lines, pictures = printed.getvalue().splitlines(keepends=True), [*screen]
    screen.clear()
    return ([{"output_type": "stream", "name": "stdout", "text": lines}] if lines else []) + pictures


def main(script: str, out: str) -> None:
    source = Path(script).read_text(encoding="utf-8")
    Path(out).write_text(json.dumps(build(source), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
