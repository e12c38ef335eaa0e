"""The table of what works names tests that exist, and that nobody skips."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMED = re.findall(r"`(test_\w+\.py)::(test_\w+)`( \(GPU\))?", (ROOT / "docs" / "integrations.md").read_text())


def test_every_row_names_a_test() -> None:
    rows = [line for line in (ROOT / "docs" / "integrations.md").read_text().splitlines() if line.startswith("| ")]
    headings = [line for line in rows if line.rstrip(" |").endswith("test")]
    assert len(headings) == 4 and len(rows) - len(headings) == len(NAMED) > 30


@pytest.mark.parametrize("file, name, gpu", NAMED)
def test_row_is_a_test(file: str, name: str, gpu: str) -> None:
    source = (ROOT / "tests" / file).read_text()
    functions = [node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    assert name in functions
    assert bool(gpu) == ("pytestmark = pytest.mark.gpu" in source)
