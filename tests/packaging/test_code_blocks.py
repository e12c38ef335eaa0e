"""Every code block of the README and of docs/ is run: Python on what `page_cases.py` gives it, commands as they stand.

Commands that would take minutes, or run this very test, are run short: `make` says what it would do, `pip install .`
stops before it compiles, and benchmarks of large models have those models small.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import json
import os
import re
import runpy
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import lone_file_cases
import page_cases
import pytest
import torch
import yaml
from processes import ROOT, printed

import reflora

PAGES = ["README.md", *sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^(<!-- needs a GPU -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# their sections are programs by themselves
SECTIONED = {"docs/howto/distributed.md", "docs/howto/trainers_by_name.md"}
# each starts a process group
ALONE = {
    f"docs/howto/distributed.md#{section}" for section in ("FSDP2", "Tensor parallelism", "DeepSpeed, ZeRO-1 and 2")
}
LANGUAGES = {"python", "sh", "yaml", "bibtex"}
INSTALL = "pip install --dry-run --no-deps --no-build-isolation --no-input {root}"
BIG = re.compile(r"python -m benchmarks\.(throughput|memory) (--model .*)")


@dataclass(frozen=True)
class Block:
    page: str
    section: str
    line: int
    language: str
    text: str
    needs_gpu: bool

    @property
    def unit(self) -> str:
        return f"{self.page}#{self.section}" if self.page in SECTIONED else self.page


def blocks_of(page: str) -> list[Block]:
    text = (ROOT / page).read_text()
    found = []
    for match in FENCE.finditer(text):
        section = re.findall(r"^## (.*)$", text[: match.start()], re.MULTILINE)[-1:]
        line = text.count("\n", 0, match.start(3))
        found.append(Block(page, "".join(section), line, match[2], match[3], bool(match[1])))
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
UNITS = list(dict.fromkeys(block.unit for block in BLOCKS if block.language == "python"))
# each once, with a page that has it
COMMANDS = {
    line.partition("  #")[0].strip().replace("FOLDER", "adapter"): block.page
    for block in BLOCKS if block.language == "sh" for line in block.text.splitlines() if line
}  # fmt: skip


def run(command: list[str], folder: Path, **env: str) -> str:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    default = {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    return printed(command, folder, **{**default, **env})


def program(unit: str, gpu: bool) -> str:
    """The unit's Python blocks, one after another, each on the lines that it has in its page."""
    lines: list[str] = []
    for block in BLOCKS:
        if block.unit == unit and block.language == "python" and (gpu or not block.needs_gpu):
            lines += [""] * (block.line - len(lines)) + block.text.splitlines()
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("page", PAGES)
def test_blocks_have_a_language_and_none_is_indented(page: str) -> None:
    assert {block.language for block in blocks_of(page)} <= LANGUAGES
    rest = FENCE.sub("", (ROOT / page).read_text())
    assert "```" not in rest
    assert re.findall(r"^(?!:::|[-\d]).*\n\n {4}\S", rest, re.MULTILINE) == []


def test_every_program_has_what_it_takes_as_given() -> None:
    assert set(UNITS) == set(page_cases.GIVEN) and len(UNITS) > 12


def job(unit: str, folder: Path, gpu: bool = False) -> tuple[str, str, str]:
    page = folder / "page.py"
    page.write_text(program(unit, gpu))
    return unit, str(page), str(folder)


def run_pages(jobs: list[list[tuple[str, str, str]]], place: Path, **env: str) -> dict[str, dict[str, str]]:
    (place / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, str(ROOT / "tests/page_cases.py"), str(place / "jobs.json"), str(place / "out.json")]
    run(command, place, **env)
    return json.loads((place / "out.json").read_text())


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Of every unit: those that set a process up for themselves have one each, the others share one."""
    made = {unit: job(unit, tmp_path_factory.mktemp("page")) for unit in UNITS}
    alone = [[made.pop(unit)] for unit in UNITS if unit in ALONE]
    return run_pages([*alone, list(made.values())], tmp_path_factory.mktemp("pages"))


@pytest.mark.xdist_group("pages")
@pytest.mark.parametrize("unit", UNITS)
def test_python(unit: str, results: dict[str, dict[str, str]]) -> None:
    compile(program(unit, gpu=True), unit, "exec")
    assert results[unit]["error"] == ""
    if unit == "docs/quickstart.md":
        losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", results[unit]["printed"])]
        assert len(losses) == 3 and losses[-1] < losses[0] - 0.2
        assert "refactored=14" in results[unit]["printed"]


def test_yaml() -> None:
    """The plugin's block is run by tests/integration/test_axolotl.py; the other names a function, and its arguments."""
    named, plugin = (yaml.safe_load(block.text) for block in BLOCKS if block.language == "yaml")
    assert plugin["plugins"] == ["reflora.integrations.axolotl.RefLoRAPlugin"]
    target, options = named["optimizer"].pop("_target_"), named["optimizer"]
    assert target == "reflora.create_reflora_optimizer" and options["lr"] == 1e-3
    inspect.signature(reflora.create_reflora_optimizer).bind(None, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with a saved adapter, one in a file, and a model before and after training."""
    place = tmp_path_factory.mktemp("commands")
    torch.manual_seed(0)
    model = page_cases.adapted()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(place / "adapter")
    lone_file_cases.kohya(place / "style.safetensors")
    base = page_cases.causal()
    base.save_pretrained(place / "base")
    base.lm_head.weight.data += 0.1
    base.save_pretrained(place / "tuned")
    return place


def run_module(module: str, arguments: list[str]) -> str:
    """What `python -m` prints, in this process."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", [module, *arguments])
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            assert not stop.code
    return printed.getvalue()


@pytest.mark.parametrize(
    "command", [pytest.param(c, id=f"{page}-{c}") for c, page in COMMANDS.items() if not BIG.match(c)]
)
def test_commands(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, *words = shlex.split(INSTALL.format(root=ROOT) if command == "pip install ." else command)
    if first == "python" and command != "python -m reflora":  # which shows that such a process starts
        monkeypatch.chdir(folder)
        assert words[0] == "-m" and run_module(words[1], words[2:])
        return
    starts = {"make": ["make", "-n", "-C", str(ROOT)], "pip": [sys.executable, "-m", "pip"], "python": [sys.executable]}
    assert run([*starts[first], *words], folder)


@pytest.mark.parametrize("command", [command for command in COMMANDS if BIG.match(command)])
def test_benchmarks_of_large_models(command: str, tiny: None, tmp_path: Path) -> None:
    match = BIG.match(command)
    assert match
    program = importlib.import_module(f"benchmarks.{match[1]}")
    sizes = ["--batch", "2", "--length", "8", "--rank", "2", "--out", str(tmp_path)]
    sizes += ["--steps", "6", "--warmup", "2", "--no-memory"] if match[1] == "throughput" else []
    program.main([*shlex.split(match[2]), *sizes])
    assert list(tmp_path.glob("*.csv"))


@pytest.mark.gpu
@pytest.mark.parametrize("unit", sorted({block.unit for block in BLOCKS if block.needs_gpu}))
def test_python_on_a_gpu(unit: str, tmp_path: Path) -> None:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    found = run_pages([[job(unit, tmp_path, gpu=True)]], tmp_path, CUDA_VISIBLE_DEVICES=visible)
    assert found[unit]["error"] == ""
