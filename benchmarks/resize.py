"""`python -m reflora resize` of a 7B-shaped adapter, against tools that form B A: `python -m benchmarks.resize`.

The whole command is timed, in fresh processes. The peers cut single layers of the same adapter: PEFT's
`add_weighted_adapter(combination_type="svd")` and, with --kohya, `networks/resize_lora.py` of a clone of sd-scripts.
The error of each is `||B A - B' A'||_F / ||B A||_F`, computed in float64.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from reflora import lowrank

from . import harness

SHAPES = {name: (4096, 4096) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
SHAPES |= {"gate_proj": (11008, 4096), "up_proj": (11008, 4096), "down_proj": (4096, 11008)}
Factors = tuple[Tensor, Tensor]


def factors(n_out: int, n_in: int, rank: int, generator: torch.Generator) -> Factors:
    """With singular values that fall as 1 / k, as those of trained adapters do."""
    decay = 1 / (1 + torch.arange(rank))[:, None]
    return decay * torch.randn(rank, n_in, generator=generator), 0.01 * torch.randn(n_out, rank, generator=generator)


def write_adapter(folder: Path, blocks: int, rank: int) -> dict[str, Factors]:
    """A PEFT adapter; returns the factors of its first block."""
    from safetensors.torch import save_file

    generator, tensors, first = torch.Generator().manual_seed(0), {}, {}
    for block in range(blocks):
        for name, (n_out, n_in) in SHAPES.items():
            A, B = factors(n_out, n_in, rank, generator)
            if block == 0:
                first[name] = (A, B)
            for side, factor in (("A", A), ("B", B)):
                tensors[f"base_model.model.layers.{block}.{name}.lora_{side}.weight"] = factor
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(SHAPES)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return first


def command(folder: Path, out: Path, rank: int) -> tuple[float, str]:
    """Seconds of the whole command, and its last line."""
    words = [sys.executable, "-m", "reflora", "resize", str(folder), str(out), "--rank", str(rank)]
    began = time.perf_counter()
    printed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    return time.perf_counter() - began, printed.splitlines()[-1]


def by_reflora(A: Tensor, B: Tensor, rank: int) -> Factors:
    new_A, new_B = lowrank.svd(A, B).cut(rank, torch.Generator())
    return new_A.float(), new_B.float()


def by_peft(A: Tensor, B: Tensor, rank: int) -> Factors:
    from peft import LoraConfig, get_peft_model

    old, layer = A.shape[0], nn.Linear(A.shape[1], B.shape[0], bias=False)
    model: Any = get_peft_model(nn.Sequential(layer), LoraConfig(r=old, lora_alpha=old, target_modules=["0"]))
    found = model.base_model.model[0]
    found.lora_A["default"].weight.data, found.lora_B["default"].weight.data = A, B
    # of a single adapter PEFT takes the factors as they are
    model.add_weighted_adapter(["default"] * 2, [0.5, 0.5], "cut", combination_type="svd", svd_rank=rank)
    return found.lora_A["cut"].weight.detach(), found.scaling["cut"] * found.lora_B["cut"].weight.detach()


def by_kohya(clone: Path) -> Callable[[Tensor, Tensor, int], Factors]:
    """Its modules for models are not needed for the arithmetic: they are left empty."""
    package = types.ModuleType("library")
    for name in ("train_util", "model_util", "utils"):
        module = sys.modules[f"library.{name}"] = types.ModuleType(f"library.{name}")
        setattr(package, name, module)
    sys.modules["library"] = package
    sys.modules["library.utils"].setup_logging = lambda *_, **__: None  # type: ignore[attr-defined]
    sys.path.insert(0, str(clone))
    from networks.resize_lora import resize_lora_model  # type: ignore[import-not-found]

    def cut(A: Tensor, B: Tensor, rank: int) -> Factors:
        given = {"0.lora_down.weight": A, "0.lora_up.weight": B, "0.alpha": torch.tensor(float(A.shape[0]))}
        found, _, _ = resize_lora_model(given, rank, rank, torch.float32, "cpu", None, None, False)
        return found["0.lora_down.weight"], found["0.lora_up.weight"]

    return cut


def error(old: Factors, new: Factors) -> float:
    whole = old[1].double() @ old[0].double()
    return float((whole - new[1].double() @ new[0].double()).norm() / whole.norm())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resize", description=__doc__)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--rank", type=int, nargs=2, default=(64, 16), metavar=("OLD", "NEW"))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--layers", nargs="*", default=["q_proj"], choices=SHAPES, help="for the peers, minutes each")
    parser.add_argument("--kohya", type=Path, metavar="FOLDER", help="a clone of kohya-ss/sd-scripts")
    options = parser.parse_args(argv)
    print(harness.header(harness.environment(torch.device("cpu"), torch.float32)), flush=True)
    old_rank, rank = options.rank
    with tempfile.TemporaryDirectory() as place:
        first = write_adapter(Path(place) / "adapter", options.blocks, old_rank)
        taken = []
        for run in range(options.runs):
            seconds, said = command(Path(place) / "adapter", Path(place) / f"out{run}", rank)
            taken.append(seconds)
    print(f"python -m reflora resize, {options.blocks * len(SHAPES)} layers, rank {old_rank} to {rank}: ", end="")
    print(f"{median(taken):.1f} s ({min(taken):.1f} to {max(taken):.1f}); {said}", flush=True)
    tools: dict[str, Callable[[Tensor, Tensor, int], Factors]] = {"reflora": by_reflora, "PEFT": by_peft}
    if options.kohya:
        tools["kohya"] = by_kohya(options.kohya)
    rows = []
    for name in options.layers:
        for tool, cut in tools.items():
            began = time.perf_counter()
            new = cut(*first[name], rank)
            rows.append([name, tool, f"{time.perf_counter() - began:.3f}", f"{error(first[name], new):.10f}"])
            print(harness.table(["layer", "tool", "seconds", "error"], rows[-1:]), flush=True)
    print(harness.table(["layer", "tool", "seconds", "error"], rows))


if __name__ == "__main__":
    main()
