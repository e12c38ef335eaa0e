"""Files of JSON lines that a killed program leaves readable."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Every whole line; one that was cut off while it was written counts for nothing. None where there is no file."""
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                found = json.loads(line)
                if isinstance(found, dict):
                    yield found


def other_content(path: Path) -> bool:
    """Whether there is a file that is none of these."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(1) not in (b"", b"{", b"\n")


def append(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """In one write, on lines of their own also after one that was cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 1))
        cut = size > 0 and file.read(1) != b"\n"
        text = "".join(json.dumps(line) + "\n" for line in lines)
        file.write((b"\n" if cut else b"") + text.encode())
