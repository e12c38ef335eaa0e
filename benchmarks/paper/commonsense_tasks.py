"""Commonsense reasoning as LLM-Adapters lays it out: prompt, eight test sets, answers, and the figures of Table 3."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import data

TRAIN_FILES = ("commonsense_170k",)  # else the train files of the eight folders together
FIELDS = ("instruction", "output", "answer")
TARGETS = "q_proj,k_proj,v_proj,up_proj,down_proj"


@dataclass(frozen=True)
class Question:
    prompt: str
    answer: str


@dataclass(frozen=True)
class CommonsenseTask:
    """label: in the table. folders: of a data root, the first that is there. answers: a pattern of all there are."""

    label: str
    folders: tuple[str, ...]
    answers: str

    def extract(self, response: str) -> str:
        """The first answer that the response names, letter for letter; "" where there is none.

        What follows where a model goes on to answer again is not of the response.
        """
        found = re.search(self.answers, response.partition("### Response:")[0])
        return found.group() if found else ""

    def questions(self, root: Path) -> list[Question]:
        """The test set. Raises FileNotFoundError where it is not in `root`, ValueError for rows of another layout."""
        return [Question(prompt(row), row["answer"]) for row in rows(self.folder(root), ("test",))]

    def folder(self, root: Path) -> Path:
        for name in self.folders:
            if (root / name).is_dir():
                return root / name
        raise FileNotFoundError(f"--data: expected a folder {' or '.join(self.folders)} in {root}, found none.")


_FROM_1_TO_5 = "answer[1-5]"
TASKS = {
    "boolq": CommonsenseTask("BoolQ", ("boolq",), "true|false"),
    "piqa": CommonsenseTask("PIQA", ("piqa",), "solution[12]"),
    "siqa": CommonsenseTask("SIQA", ("social_i_qa",), _FROM_1_TO_5),
    "hellaswag": CommonsenseTask("HS", ("hellaswag",), "ending[1-4]"),
    "winogrande": CommonsenseTask("WG", ("winogrande",), "option[12]"),
    "arc-e": CommonsenseTask("ARCe", ("ARC-Easy", "arc_easy"), _FROM_1_TO_5),
    "arc-c": CommonsenseTask("ARCc", ("ARC-Challenge", "arc_challenge"), _FROM_1_TO_5),
    "obqa": CommonsenseTask("OBQA", ("openbookqa",), _FROM_1_TO_5),
}


def prompt(row: Mapping[str, Any]) -> str:
    """Alpaca's prompt, which LLM-Adapters uses; here without its stray blanks, and the same in training and test."""
    task = "Below is an instruction that describes a task"
    write = "Write a response that appropriately completes the request."
    if row.get("input"):
        task += ", paired with an input that provides further context"
        more = f"### Input:\n{row['input']}\n\n"
    else:
        more = ""
    return f"{task}. {write}\n\n### Instruction:\n{row['instruction']}\n\n{more}### Response:\n"


def rows(folder: Path, stems: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of one file. Raises FileNotFoundError or ValueError."""
    found = data.rows(data.find(folder, stems))
    for row in found:
        if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in FIELDS):
            got = ", ".join(row) if isinstance(row, dict) else repr(row)
            raise ValueError(f"{folder}: expected rows with texts {', '.join(FIELDS)}, got {got}.")
    return found


def training_texts(root: Path, names: Sequence[str], end: str) -> list[data.Example]:
    """Prompt, response and `end`: commonsense_170k where it is in `root`, else the train files of the tasks `names`."""
    try:
        found = rows(root, TRAIN_FILES)
    except FileNotFoundError:
        found = []
        for name in names:
            folder = TASKS[name].folder(root)
            if any(folder.glob("train.*")):  # one set has none in some collections
                found += rows(folder, ("train",))
            else:
                print(f"no train file in {folder}: training is on the other sets", file=sys.stderr)
    if not found:
        raise FileNotFoundError(f"--data: expected {TRAIN_FILES[0]}.json or train files in {root}, found none.")
    return [data.Example(prompt(row) + row["output"] + end, 0) for row in found]


# Table 3: by (model, rank) and method, in the order of TASKS; the last figure is the table's own average
PAPER: dict[tuple[str, int], dict[str, tuple[float, ...]]] = {
    ("llama-7b", 32): {
        "lora": (66.42, 80.03, 77.84, 82.88, 81.85, 79.92, 63.40, 77.20, 76.19),
        "preclora": (68.96, 80.95, 77.43, 81.54, 80.27, 78.83, 64.16, 79.20, 76.42),
        "nora+": (69.85, 81.83, 77.38, 82.09, 80.03, 79.67, 64.25, 78.60, 76.71),
        "dora": (69.7, 83.4, 78.6, 87.2, 81.0, 81.9, 66.2, 79.2, 78.4),
        "reflora": (69.60, 82.48, 79.53, 88.25, 82.56, 81.57, 66.64, 80.20, 78.85),
        "reflora-s": (70.18, 82.48, 78.15, 87.41, 82.08, 81.52, 65.36, 81.60, 78.60),
    },
    ("llama-7b", 16): {
        "dora": (70.0, 82.6, 79.7, 83.2, 80.6, 80.6, 65.4, 77.6, 77.5),
        "reflora": (69.66, 82.43, 79.43, 87.38, 81.22, 80.68, 65.44, 78.60, 78.11),
        "reflora-s": (67.65, 81.50, 79.07, 88.28, 81.77, 81.23, 64.59, 78.60, 77.84),
    },
    ("llama2-7b", 32): {
        "lora": (69.8, 79.9, 79.5, 83.6, 82.6, 79.8, 64.7, 81.0, 77.6),
        "preclora": (71.47, 81.50, 78.81, 85.97, 80.43, 81.14, 66.55, 81.00, 78.36),
        "nora+": (70.52, 81.94, 79.07, 87.66, 82.24, 82.70, 67.06, 80.20, 78.92),
        "dora": (71.8, 83.7, 76.0, 89.1, 82.6, 83.7, 68.2, 82.4, 79.7),
        "reflora": (72.54, 83.79, 80.04, 86.94, 84.85, 86.36, 71.50, 80.20, 80.78),
        "reflora-s": (73.36, 83.84, 80.76, 90.02, 82.48, 84.55, 67.92, 82.60, 80.69),
    },
    ("llama2-7b", 16): {
        "dora": (72.0, 83.1, 79.9, 89.1, 83.0, 84.5, 71.0, 81.2, 80.5),
        "reflora": (71.38, 82.43, 80.35, 90.49, 83.43, 84.05, 69.28, 82.00, 80.43),
        "reflora-s": (72.08, 83.03, 80.45, 85.89, 83.27, 84.30, 69.88, 82.00, 80.11),
    },
    ("llama3-8b", 32): {
        "lora": (70.8, 85.2, 79.9, 91.7, 84.3, 84.2, 71.2, 79.0, 80.8),
        "preclora": (70.73, 85.80, 78.86, 91.87, 83.66, 85.10, 71.08, 82.40, 81.19),
        "nora+": (71.16, 85.10, 79.48, 92.22, 83.35, 85.86, 72.27, 83.20, 81.58),
        "dora": (74.6, 89.3, 79.9, 95.5, 85.6, 90.5, 80.4, 85.8, 85.2),
        "reflora": (75.35, 88.74, 80.91, 95.71, 86.66, 90.49, 80.20, 87.40, 85.68),
        "reflora-s": (75.50, 89.72, 81.11, 95.59, 87.29, 90.99, 79.78, 86.00, 85.75),
    },
    ("llama3-8b", 16): {
        "dora": (74.5, 88.8, 80.3, 95.5, 84.7, 90.1, 79.1, 87.2, 85.0),
        "reflora": (75.26, 88.79, 81.37, 95.85, 85.64, 90.11, 80.55, 86.60, 85.52),
        "reflora-s": (74.92, 89.01, 80.60, 95.75, 85.24, 90.45, 80.89, 86.40, 85.41),
    },
}  # fmt: skip
