"""Labelled real text for the benchmarks: a task from Python's own sources, GLUE-like files, or a hub data set.

The default needs no download: tell which part of the standard library a docstring was written for. It is English prose
by many authors, the same on every machine that has the same Python version, and learnable but not trivial.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import json
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import hub

# a family is several modules, so that none vanishes where a distribution leaves one out or a later Python drops it
FAMILIES: dict[str, tuple[str, ...]] = {
    "network": ("http", "urllib", "socket", "socketserver", "ssl", "smtplib", "ftplib", "imaplib", "poplib", "nntplib",
                "xmlrpc", "wsgiref", "cgi", "selectors", "ipaddress", "webbrowser", "telnetlib", "asyncore"),
    "concurrency": ("asyncio", "threading", "multiprocessing", "concurrent", "queue", "subprocess", "sched"),
    "mail": ("email", "mailbox", "mailcap", "mimetypes", "quopri", "base64"),
    "numbers": ("_pydecimal", "fractions", "statistics", "random", "numbers", "_pydatetime", "datetime", "calendar",
                "colorsys", "heapq", "bisect", "uuid", "zoneinfo", "graphlib"),
    "testing": ("unittest", "doctest", "pdb", "bdb", "trace", "tracemalloc", "cProfile", "profile", "pstats", "timeit",
                "warnings", "traceback", "faulthandler"),
    "imports": ("importlib", "pkgutil", "zipimport", "runpy", "modulefinder", "imp", "site", "sysconfig", "ensurepip",
                "venv", "zipapp", "compileall", "py_compile"),
    "language": ("ast", "dis", "inspect", "tokenize", "symtable", "code", "codeop", "typing", "types", 
                 "pyclbr", "opcode", "annotationlib", "dataclasses", "enum", "abc", "functools", "contextlib"),
    "files": ("os", "posixpath", "ntpath", "pathlib", "shutil", "tempfile", "glob", "fnmatch", "tarfile", "zipfile",
              "gzip", "bz2", "lzma", "_compression", "_pyio", "fileinput", "filecmp", "linecache", "stat"),
    "options": ("logging", "argparse", "configparser", "optparse", "getopt", "cmd", "shlex", "getpass", "netrc",
                "platform"),
    "markup": ("xml", "html", "json", "csv", "plistlib", "_markupbase", "pickle", "pickletools", "shelve", "copyreg"),
    "text": ("string", "textwrap", "difflib", "re", "sre_parse", "sre_compile", "codecs", "encodings", "locale",
             "gettext", "pprint", "reprlib", "stringprep", "pydoc"),
}  # fmt: skip

DEFAULT = "stdlib"
ROWS_PER_FAMILY = 300
EVAL_SHARE = 5  # one row in five is held out where a source has no split of its own
_TEXT_FIELDS = (
    ("sentence1", "sentence2"), ("question1", "question2"), ("question", "sentence"), ("premise", "hypothesis"),
    ("sentence",), ("text",), ("content",),
)  # fmt: skip


@dataclass(frozen=True)
class Example:
    """One labelled text; `pair` is the second sentence of a two-sentence task."""

    text: str
    label: int | float
    pair: str | None = None

    @classmethod
    def of(cls, row: dict[str, Any], label: int | float) -> Example:
        """From a row in the layout of GLUE or of LLM-Adapters. Raises ValueError where no text field is known."""
        if "instruction" in row:
            made = cls(" ".join(filter(None, [row["instruction"], row.get("input")])), label)
        else:
            fields = next((fields for fields in _TEXT_FIELDS if fields[0] in row), None)
            if fields is None:
                raise ValueError(f"expected a text field such as sentence1, got a row with {', '.join(row)}.")
            made = cls(row[fields[0]], label, row.get(fields[1]) if len(fields) > 1 else None)
        if not isinstance(made.text, str) or not isinstance(made.pair, (str, type(None))):
            raise ValueError(f"expected texts, got {made.text!r} and {made.pair!r}.")
        return made


@dataclass(frozen=True)
class Task:
    """train and eval examples, the number of classes (1: a regression), and the kind of model that it is for."""

    name: str
    train: list[Example]
    eval: list[Example]
    classes: int
    kind: str = "text"


def digest(*parts: Iterable[Any]) -> str:
    """Of examples, in their order: short, and another one wherever a text or a label is."""
    made = hashlib.sha256()
    for part in parts:
        for item in part:
            made.update(repr(item).encode())
        made.update(b"\0")
    return made.hexdigest()[:12]


def drawn(items: Sequence[Any], count: int | None) -> list[Any]:
    """`count` of them, drawn once and for all: some files are in an order. All where there are no more, or None."""
    if count is None or count >= len(items):
        return list(items)
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(0))
    return [items[index] for index in order[:count].tolist()]


def load(source: str = DEFAULT) -> Task:
    """The task `source`: "stdlib", a file or folder in the GLUE layout, or a hub data set, "name" or "name:config".

    Raises FileNotFoundError for a path that is not there and ValueError for rows without text or label.
    """
    if source == DEFAULT:
        return stdlib_docstrings()
    if Path(source).exists():
        return from_path(Path(source))
    if re.search(r"\.jsonl?(\.gz)?$", source) or source.startswith((".", "/", "~")):
        raise FileNotFoundError(f"--data: no file or folder {source!r}. Pass a .jsonl(.gz) file, or {DEFAULT!r}.")
    return from_hub(source)


# ---- the task that every Python carries


def stdlib_docstrings(root: Path | None = None) -> Task:
    """Which family of standard-library modules does this docstring come from? The sources are parsed, never imported.

    Deterministic for a Python version: texts are ordered by their hash, which also splits them.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    by_family = {family: _family_texts(root, modules) for family, modules in FAMILIES.items()}
    if not all(by_family.values()):
        missing = ", ".join(family for family, texts in by_family.items() if not texts)
        raise FileNotFoundError(f"no standard-library sources under {root} for: {missing}. Pass --data FILE.jsonl.")
    shared = _repeated(by_family.values())
    train: list[Example] = []
    held_out: list[Example] = []
    for label, texts in enumerate(by_family.values()):
        chosen = sorted(texts - shared, key=_digest)[:ROWS_PER_FAMILY]
        for text in chosen:
            (held_out if _digest(text) % EVAL_SHARE == 0 else train).append(Example(text, label))
    return Task("stdlib docstrings", sorted(train, key=_order), sorted(held_out, key=_order), len(FAMILIES))


def _family_texts(root: Path, modules: Iterable[str]) -> set[str]:
    """Docstrings of 30 characters or more, white space squeezed."""
    texts = set()
    for module in modules:
        folder = root / module
        files = folder.rglob("*.py") if folder.is_dir() else [root / f"{module}.py"]
        for file in files:
            if file.is_file() and not {"test", "tests"} & set(file.relative_to(root).parts):
                texts.update(text for text in _docstrings(file) if len(text) >= 30)
    return texts


def docstrings(root: Path) -> Iterator[str]:
    """Every docstring of 30 characters or more below a folder of sources, once, in the order of the files."""
    seen = set()
    for file in python_files(root):
        for text in _docstrings(file):
            if len(text) >= 30 and text not in seen:
                seen.add(text)
                yield text


def python_files(root: Path) -> Iterator[Path]:
    """The sources of a standard library without its tests and what pip has put there, in a fixed order."""
    for file in sorted(root.rglob("*.py")):
        if not {"test", "tests", "site-packages", "lib2to3", "idlelib"} & set(file.relative_to(root).parts):
            yield file


def _docstrings(file: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        tree = ast.parse(file.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield " ".join((ast.get_docstring(node) or "").split())


def _repeated(groups: Iterable[set[str]]) -> set[str]:
    """Texts that more than one family has: no label would be right."""
    seen: set[str] = set()
    twice: set[str] = set()
    for texts in groups:
        twice |= seen & texts
        seen |= texts
    return twice


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _order(example: Example) -> int:
    return _digest("order" + example.text)


# ---- files and hub data sets


def from_path(path: Path, regression: bool | None = None) -> Task:
    """A folder with `train` and `dev` (or `test`) files, or one file, of which one row in five is held out.

    regression: labels are numbers to predict, or classes; None: numbers where one of them is no whole number's type.
    """
    if path.is_dir():
        train = rows(find(path, ("train",)))
        held_out = rows(find(path, ("dev", "validation", "test")))
    else:
        every = rows(path)
        train = [row for index, row in enumerate(every) if index % EVAL_SHARE]
        held_out = every[::EVAL_SHARE]
    return _task(path.parent.name if path.is_file() else path.name, train, held_out, regression)


def from_hub(source: str, regression: bool | None = None) -> Task:
    """A data set of the Hugging Face hub, "name" or "name:config". Needs the package `datasets` and a network.

    Held out is its first validation split (of MNLI the matched one), or where there is none one called dev or test.
    """
    hub.prepare(needed=True)
    try:
        import datasets
    except ImportError as error:
        raise ImportError("a hub data set needs the package `datasets`: pip install datasets") from error
    name, _, config = source.partition(":")
    splits = datasets.load_dataset(name, config or None)
    held_out: list[Any] = next(
        (list(splits[key]) for stem in ("validation", "dev", "test") for key in splits if key.startswith(stem)), []
    )
    if not held_out or "train" not in splits:
        raise ValueError(f"{source}: expected splits train and validation, got {', '.join(splits)}.")
    return _task(source, list(splits["train"]), held_out, regression)


def find(folder: Path, stems: Sequence[str]) -> Path:
    for stem in stems:
        for suffix in (".jsonl.gz", ".jsonl", ".json.gz", ".json"):
            if (folder / (stem + suffix)).is_file():
                return folder / (stem + suffix)
    raise FileNotFoundError(f"{folder}: expected a file {' or '.join(stems)}.jsonl(.gz), found none.")


def rows(path: Path) -> list[dict[str, Any]]:
    """JSON lines, or one JSON array, of objects; gzip by the name. Raises ValueError for anything else."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            content = file.read()
        if content.lstrip().startswith("["):
            found = json.loads(content)
        else:
            found = [json.loads(line) for line in content.split("\n") if line.strip()]
    except (json.JSONDecodeError, UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: expected JSON lines or a JSON array, got {error}.") from error
    if not found:
        raise ValueError(f"{path}: expected labelled rows, got an empty file.")
    for number, row in enumerate(found, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}: expected JSON objects, got {row!r} in row {number}.")
    return found


def _task(
    name: str, train: list[dict[str, Any]], held_out: list[dict[str, Any]], regression: bool | None = None
) -> Task:
    first = (train or held_out)[0]
    label = "label" if "label" in first else "answer"
    values = {_label(row, label, name) for row in train + held_out}
    kinds = {isinstance(value, str) for value in values}
    if len(kinds) > 1:
        raise ValueError(f"{name}: expected labels of one kind, got both numbers and texts.")
    codes: dict[Any, int | float]
    if regression or (regression is None and any(isinstance(value, float) for value in values)):
        if kinds == {True}:
            raise ValueError(f"{name}: expected numbers to predict, got labels such as {first[label]!r}.")
        codes, classes = {value: float(value) for value in values}, 1
    else:
        codes = {value: index for index, value in enumerate(sorted(values))}
        classes = len(codes)
    parts = [[Example.of(row, codes[row[label]]) for row in some] for some in (train, held_out)]
    return Task(name, *parts, classes)


def _label(row: dict[str, Any], field: str, name: str) -> str | int | float:
    if row.get(field) is None:
        raise ValueError(f"{name}: expected a label in every row, got rows with {', '.join(row)}.")
    if not isinstance(row[field], (str, int, float)):
        raise ValueError(f"{name}: expected a number or a text as a label, got {row[field]!r}.")
    return row[field]
