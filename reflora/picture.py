"""Where the pictures of the commands go, and how they are written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .adapters import below_a_file, shown
from .checks import fail


def picture_path(path: Path) -> Path:
    """`path`, with .png if it has no suffix; raises ValueError where no picture can be written."""
    what, remedy = f"--png {shown(path)}", "Pass another FILE, such as adapter.png."
    if path.suffix.lower() not in ("", ".png"):
        fail(what, "a name that ends in .png", shown(path.suffix), remedy)
    named = path if path.suffix or not path.name else path.with_name(f"{path.name}.png")
    for place in (path, named):
        if os.path.exists(place) and not os.path.isfile(place):
            got = "a folder that is there" if os.path.isdir(place) else "a pipe or device that is there"
            fail(what, "a file to write", got, remedy)
    if below_a_file(named):
        fail(what, "a file to write", "a file on the way to it", remedy)
    return named


def pyplot() -> Any:
    """matplotlib's, without a window; raises ModuleNotFoundError where it is not installed."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("a picture needs matplotlib: pip install matplotlib") from error

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, path: Path) -> None:
    """Write it as PNG and close it; raises OSError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, format="png")
    except OSError as error:
        fail(f"--png {shown(path)}", "a file to write", error.strerror or error, "Pass another FILE.", OSError)
    finally:
        pyplot().close(figure)
