"""Runs cases in two processes or more, forked of `two_processes.py FOLDER WORLD MODULE.CASE...`."""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import messages
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import reflora

WORLD = 2
Case = Callable[[int, Path], Any]


def together(cases: Sequence[Case], world: int = WORLD) -> dict[str, list[Any]]:
    """By name, what each process returned of `case(rank, folder)`, one case after another.

    A case that raises in all is its error; the later ones go on. All are forked of one that has imported everything.
    """
    names = [f"{case.__module__}.{case.__name__}" for case in cases]
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(reflora.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        done = subprocess.run(
            [sys.executable, __file__, folder, str(world), *names], capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        results = [torch.load(Path(folder) / f"result{rank}.pt", weights_only=False) for rank in range(world)]
    return {case.__name__: [result[case.__name__] for result in results] for case in cases}


def _enter(rank: int, cases: Sequence[Case], folder: str, world: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(minutes=3)
    )
    found: dict[str, Any] = {}
    try:
        for case in cases:
            (Path(folder) / case.__name__).mkdir(exist_ok=True)
            try:
                found[case.__name__] = case(rank, Path(folder) / case.__name__)
            except Exception:  # raised again by the test of this case; the later ones are run
                found[case.__name__] = AssertionError(traceback.format_exc())
        torch.save(found, Path(folder) / f"result{rank}.pt")
    finally:
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()


if __name__ == "__main__":
    os.environ["DS_ACCELERATOR"] = "cpu"
    messages.install()
    with contextlib.suppress(ImportError):
        import accelerate  # noqa: F401
        import deepspeed as _  # noqa: F401
    folder, world, *names = sys.argv[1:]
    chosen = [getattr(importlib.import_module(module), name) for module, name in (n.split(".") for n in names)]
    mp.start_processes(_enter, (chosen, folder, int(world)), int(world), start_method="fork")
