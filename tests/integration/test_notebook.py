"""The notebook of examples/ is what its script builds, and shows what it says."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SCRIPT, NOTEBOOK = ROOT / "examples/tour.py", ROOT / "examples/tour.ipynb"


def builder() -> Any:
    spec = importlib.util.spec_from_file_location("notebook", ROOT / ".ci/notebook.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def told(cells: list[dict[str, Any]]) -> str:
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")


def pictures(cells: list[dict[str, Any]]) -> int:
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    found = [output["data"]["image/png"] for output in outputs if output["output_type"] == "display_data"]
    return sum(one.startswith("iVBORw0KGgo") for one in found)


def test_it_is_built_and_run() -> None:
    source = SCRIPT.read_text()
    short = source.replace("STEPS, RANK, LR = 300, 16, 3e-3", "STEPS, RANK, LR = 12, 8, 3e-3")
    assert short != source
    cells = builder().build(short)["cells"]
    assert pictures(cells) == 4
    scores = {name: float(loss) for name, loss in re.findall(r"(\w+): held-out loss ([\d.]+)", told(cells))}
    assert scores["AdamW"] < scores["base"] > scores["RefLoRA"]
    assert "refactored=14" in told(cells) and "14 layers" in told(cells)
    cut = dict(re.findall(r"(\w+) (rank 1: .*)", told(cells)))
    for name, line in cut.items():
        losses = [float(loss) for loss in re.findall(r"rank \d: ([\d.]+)", line)]
        assert len(losses) == 4 and abs(losses[-1] - scores[name]) < 2e-3  # rank 8 is the whole of it


def test_the_notebook_has_the_cells_of_its_script() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    found = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    assert found == builder().cells(SCRIPT.read_text())
    assert pictures(cells) == 4 and "RefLoRA: held-out loss" in told(cells)
