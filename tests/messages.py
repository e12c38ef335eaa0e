"""Every error and warning of the package, as the tests provoke it.

`install` (conftest.py) holds each to its length and, where MESSAGES names a folder, writes it there. `make messages`
puts them on one page to be read from top to bottom, and fails where the code has one that no test has provoked.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import sys
from pathlib import Path
from types import CodeType, FrameType, FunctionType, SimpleNamespace
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1] / "reflora"
LONGEST = 300
WARNING = ("reflora.optim.membership", "reflora.optim.step", "reflora.optim.wrapper", "reflora.integrations.hooks")
# by file and a word of the call: what only a GPU provokes
ELSEWHERE = (
    ("pairs.py", "B on {pair.A.device}"), ("optim/step.py", "CUDA graph capture"),
    ("optim/groups.py", "of one element"), ("optim/adamw_engine.py", "CUDA graph capture"),
)  # fmt: skip
Site = tuple[str, int]


class Recorder:
    def __init__(self, folder: str):
        self.folder, self.seen = folder and os.path.abspath(folder), set[Site]()  # a test may change the working one

    def __call__(self, kind: str, said: str, frame: FrameType) -> None:
        assert len(said) < LONGEST, f"{len(said)} characters: {said}"
        path = Path(frame.f_code.co_filename)
        if not path.is_relative_to(PACKAGE):  # a test's own
            return
        site = path.relative_to(PACKAGE).as_posix(), frame.f_lineno
        if self.folder and site not in self.seen:
            self.seen.add(site)
            Path(self.folder).mkdir(parents=True, exist_ok=True)
            with open(Path(self.folder) / f"{os.getpid()}.jsonl", "a") as file:
                file.write(json.dumps([*site, kind, said]) + "\n")


def install() -> None:
    """Listen to `reflora.checks.fail`, whoever has imported it, and to the warnings of the package."""
    import warnings

    from reflora.checks import fail

    if "_recorded" in fail.__globals__:
        return
    record = Recorder(os.environ.get("MESSAGES", ""))
    original = FunctionType(fail.__code__, fail.__globals__, "fail", fail.__defaults__)

    def recorded(*arguments: Any) -> None:
        try:
            original(*arguments)
        except Exception as error:
            record(type(error).__name__, str(error), sys._getframe(2))
            raise

    def replacement(what, expected, got, remedy, error=ValueError):  # type: ignore[no-untyped-def]
        _recorded(what, expected, got, remedy, error)  # type: ignore[name-defined]  # noqa: F821

    def warn(message: str, *, stacklevel: int) -> None:
        frame = sys._getframe(1)
        if frame.f_code.co_name == "say_plain" and frame.f_back is not None:
            frame = frame.f_back
        record("UserWarning", message, frame)
        warnings.warn(message, stacklevel=stacklevel + 1)

    fail.__globals__["_recorded"] = recorded
    code: CodeType = replacement.__code__
    fail.__code__ = code
    for name in WARNING:
        importlib.import_module(name).warnings = SimpleNamespace(warn=warn)  # type: ignore[attr-defined]


def places() -> dict[Site, tuple[str, int]]:
    """By file and first line of each call that tells something: its text, and its last line."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("fail", "say_plain", "warnings.warn"):
                around = [f for f in functions if f.lineno <= node.lineno <= (f.end_lineno or 0)]
                inner = max(around, key=lambda f: f.lineno).name
                if inner != "say_plain":
                    found[name, node.lineno] = ast.unparse(node), node.end_lineno or node.lineno
    return found


def main(folder: Path, page: Path) -> int:
    said: dict[Site, tuple[str, str]] = {}
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text().splitlines():
            name, number, kind, text = json.loads(line)
            said.setdefault((name, number), (kind, text))
    lines, missing, last = ["# What reflora says"], [], ""
    for (name, first), (call, end) in places().items():
        found = next((said[name, number] for number in range(first, end + 1) if (name, number) in said), None)
        if found is None:
            if not any(name == file and word in call for file, word in ELSEWHERE):
                missing.append(f"{name}:{first}: {call[:100]}")
            continue
        if name != last:
            lines += ["", f"## {name}", ""]
            last = name
        lines.append(f"- {found[0]}: {found[1]}")
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{page}: {sum(line.startswith('- ') for line in lines)} errors and warnings")
    for place in missing:
        print(f"no test has provoked reflora/{place}")
    return int(bool(missing))


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), Path(sys.argv[2])))
