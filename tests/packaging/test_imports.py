"""Who may import whom: the layers of the package, and what `import reflora` must not load."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import ROOT, run

# a module imports its own top-level name and the rows above, nothing beside it or below; imports inside functions
# count, imports for type checkers alone do not
LAYERS = (
    ("overlap", "columns", "constants", "ambient", "_C", "_ops"),
    ("reference", "checks"),
    ("pairs",),
    ("plan",),
    ("diagnostics",),
    ("kernels",),
    ("backends",),
    ("engine", "linalg"),
    ("direct",),
    ("operators",),
    ("functional",),
    ("optim",),
    ("integrations",),
    ("adapters", "lowrank"),
    ("report", "picture"),
    ("doctor", "resize"),
    ("extract",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
HEAVY = ["triton", "peft", "transformers"]
MODULES = sorted((ROOT / "reflora").rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT / "reflora").as_posix()


def imported(node: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """(line, absolute name) of every import in `node`, of a module of `package`; `from x import y` gives `x.y`."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    if isinstance(node, ast.Import):
        yield from ((node.lineno, alias.name) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = package[: len(package) + 1 - node.level] if node.level else ()
        stem = ".".join([*base, *filter(None, [node.module])])
        yield from ((node.lineno, f"{stem}.{alias.name}") for alias in node.names)
    for child in ast.iter_child_nodes(node):
        yield from imported(child, package)


def refused(source: str, name: str) -> list[str]:
    """The imports in `source`, the text of the file `name` under reflora/, that the layers do not allow."""
    package = ("reflora", *Path(name).parts[:-1])
    own = Path(name).parts[0].removesuffix(".py")
    found = []
    for line, target in imported(ast.parse(source), package):
        parts = target.split(".")
        if parts[0] == "reflora" and parts[1] != own and LEVEL.get(parts[1], len(LAYERS)) >= LEVEL[own]:
            found.append(f"reflora/{name}:{line}: {own} imports {target}")
    return found


@pytest.mark.parametrize("path", [p for p in MODULES if relative(p) != "__init__.py"], ids=relative)
def test_imports_run_one_way(path: Path) -> None:
    assert refused(path.read_text(), relative(path)) == []


@pytest.mark.parametrize(
    ("name", "source", "count"),
    [
        ("plan.py", "from .backends import resolve", 1),
        ("optim/wrapper.py", "def f():\n    from ..integrations.peft import find_pairs", 1),
        ("kernels/pair.py", "from ..backends import FRESH", 1),
        ("pairs.py", "import reflora.plan", 1),
        ("engine.py", "from reflora import linalg", 1),
        ("backends/__init__.py", "from .. import surprise", 1),
        ("kernels/adamw.py", "if TYPE_CHECKING:\n    from ..backends import AdamWStep", 0),
    ],
)
def test_imports_the_other_way_are_refused_but_for_type_checkers(name: str, source: str, count: int) -> None:
    assert len(refused(source, name)) == count


def test_names_only_in_init() -> None:
    tree = ast.parse((ROOT / "reflora" / "__init__.py").read_text())
    assert {name.split(".")[0] for _, name in imported(tree, ("reflora",))} <= sys.stdlib_module_names


def test_modules_are_looked_up_by_name_in_two_places_only() -> None:
    """There ast cannot follow."""
    found = {relative(p) for p in MODULES if re.search(r"\b(import_module|__import__)\(", p.read_text())}
    assert found == {"__init__.py", "backends/__init__.py"}


def test_core_never_includes_torch() -> None:
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.is_file()]
    assert sources
    pattern = re.compile(r'#\s*include\s*[<"](torch|ATen|c10|caffe2)\b')
    assert [p.name for p in sources if pattern.search(p.read_text())] == []


def test_baselines_never_import_reflora() -> None:
    """Nor what is beside them, which may."""
    for path in (ROOT / "benchmarks" / "baselines").rglob("*.py"):
        names = [name for _, name in imported(ast.parse(path.read_text()), ("benchmarks", "baselines"))]
        ours = {name for name in names if name.split(".")[0] in ("reflora", "benchmarks")}
        assert all(name.startswith("benchmarks.baselines.") for name in ours), path.name


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import reflora", ["torch", *HEAVY]),
        ("from reflora import LoRAPair, RefLoRAAdamW, linalg, reference, refactor_", HEAVY),
    ],
)
def test_import_stays_light(statement: str, absent: list[str]) -> None:
    program = f"{statement}; import sys; print([m for m in {absent} if m in sys.modules])"
    done = run([sys.executable, "-c", program])
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def loads_anything(node: ast.AST) -> bool:
    """Whether a call may run what a file says: pickle's, or torch.load without weights_only=True."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    owner = ast.unparse(node.func.value)
    if node.func.attr in ("load", "loads") and owner in ("pickle", "dill", "marshal", "joblib", "shelve"):
        return True
    safe = any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in node.keywords)
    return node.func.attr == "load" and owner == "torch" and not safe


def test_no_file_is_loaded_that_could_run_code() -> None:
    assert loads_anything(ast.parse("torch.load(path)").body[0].value)  # type: ignore[attr-defined]
    assert not loads_anything(ast.parse("torch.load(path, weights_only=True)").body[0].value)  # type: ignore[attr-defined]
    for folder in ("reflora", "benchmarks", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            found = [node.lineno for node in ast.walk(ast.parse(path.read_text())) if loads_anything(node)]  # type: ignore[attr-defined]
            assert not found, (path, found)
