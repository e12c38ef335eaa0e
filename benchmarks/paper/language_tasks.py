"""Text to fine-tune a causal model on: the commonsense questions, or Python's own sources."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from .. import data
from . import commonsense_tasks

TASKS = ("commonsense", "python")
# drawn once and for all; the held-out ones are never trained on, whatever --eval-rows says
HELD_OUT = 1024
CHUNK = 240  # characters of source in an example, about 64 tokens and more


def load(task: str, root: Path | None) -> data.Task:
    """Raises OSError or ValueError where the texts cannot be had; `root` is a folder of commonsense sets."""
    if task == "python":
        texts = list(sources(Path(sysconfig.get_paths()["stdlib"])))
    elif root is None:
        raise ValueError("--data: expected a folder with the commonsense sets, got none. Or pass --task python.")
    else:
        texts = questions(root)
    found = [data.Example(text, 0) for text in data.drawn(texts, len(texts))]
    if len(found) <= HELD_OUT:
        raise ValueError(f"{task}: expected more than {HELD_OUT} texts, got {len(found)}.")
    return data.Task(task, found[HELD_OUT:], found[:HELD_OUT], 1, "causal")


def questions(root: Path) -> list[str]:
    """Instruction and answer, without Alpaca's prompt, which is the same in every row."""
    found: dict[str, None] = {}
    for task in commonsense_tasks.TASKS.values():
        folder = task.folder(root)
        if any(folder.glob("train.*")):
            rows = commonsense_tasks.rows(folder, ("train",))
            found.update(dict.fromkeys(f"{row['instruction']}\n{row['output']}" for row in rows))
        else:
            print(f"no train file in {folder}: training is on the other sets", file=sys.stderr)
    return list(found)


def sources(root: Path) -> Iterator[str]:
    """Runs of whole lines of the standard library."""
    for file in data.python_files(root):
        chunk = ""
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            chunk += line
            if len(chunk) >= CHUNK:
                yield chunk
                chunk = ""
