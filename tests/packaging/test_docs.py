"""The tables of what works, what can go wrong and which way to take name tests that exist, and that nobody skips."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = {name: (ROOT / "docs" / f"{name}.md").read_text() for name in ("integrations", "reliability", "howto/which")}
CELL = re.compile(r"`(test_\w+\.py)::(test_\w+)`( \(GPU\))?")
NAMED = [cell for text in PAGES.values() for cell in CELL.findall(text)]


@pytest.mark.parametrize(
    "page, tables, least", [("integrations", 6, 45), ("reliability", 3, 50), ("howto/which", 1, 12)]
)
def test_every_row_names_a_test(page: str, tables: int, least: int) -> None:
    rows = [line for line in PAGES[page].splitlines() if line.startswith("| ") and not line.startswith("| **")]
    headings = [line for line in rows if line.rstrip(" |").endswith("test")]
    assert len(headings) == tables and len(rows) - len(headings) == len(CELL.findall(PAGES[page])) > least


@pytest.mark.parametrize("file, name, gpu", NAMED)
def test_row_is_a_test(file: str, name: str, gpu: str) -> None:
    source = next((ROOT / "tests").rglob(file)).read_text()
    assert name in [node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    assert bool(gpu) == ("pytestmark = pytest.mark.gpu" in source)
