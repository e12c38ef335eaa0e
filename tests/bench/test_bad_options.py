"""A bad option of a benchmark program gets one clear line; those that need data are in the tests of their program."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest
from tiny_models import texts

from benchmarks import data
from reflora.backends import triton_backend

# by program and what it is always given: options, and what is said of them
BAD = {
    "throughput --device cpu": {
        "--methods lora,adam": "--methods: expected all, alone, or some of lora, .* got 'adam'",
        "--methods all,lora": "--methods: expected all, alone, or some of lora, .* got 'all'",
        "--methods lora,bitfit --model llama-7b": "got bitfit: it has no biases",
        "--steps 5": "--steps: expected at least 23, got 5",
        "--rank 0": "--rank: expected at least 1, got 0",
        "--rank 100000": "--rank: expected at most 4096, got 100000",
        "--lr nan": "--lr: expected a number from 0 up, got nan",
        "--backend jax": "invalid choice: 'jax'",
        "--device nonsense": "--device: expected cpu, cuda or cuda:1, got 'nonsense'",
        f"--out {__file__}": "--out: expected a place that can be written, got .*test_bad_options.py: File exists",
        "--data absent.jsonl": "throughput: --data: no file or folder 'absent.jsonl'",
        "--model ./absent": "throughput: --model: expected minilm, .* a folder with a config.json, .*'./absent'",
        "--targets query,absent": "throughput: --targets: expected names of layers, got 'absent', which no layer",
        "--length 600": "throughput: --length: expected at most 512 for this model, got 600",
    },
    "kernels": {"sideways": "invalid choice: 'sideways'"},
    "kernels step --device cpu": {
        "--cases minilm": "--cases: expected SHAPES:RANK with shapes of minilm, .* got 'minilm'",
        "--cases gpt:8": "got 'gpt:8'",
        "--warm 1": "--warm: expected at least 2, got 1",
        "--copy-mib 0": "--copy-mib: expected at least 1, got 0",
        "--seconds nan": "--seconds: expected a positive number, got nan",
        "--methods adam": "invalid choice: 'adam'",
        f"--out {__file__}": "--out: expected a place that can be written, got ",
    },
    "kernels scaling --device cpu": {"--rank 0": "--rank: expected at least 1, got 0"},
    "kernels host": {"--rounds 0": "--rounds: expected at least 1, got 0"},
    "kernels profile": {"--device cpu": "expected a GPU"},
    "kernels eigh --device cpu": {
        "--sizes 4 0": "--sizes: expected at least 1, got 0",
        "--batches -1": "--batches: expected at least 1, got -1",
        "--rounds 0": "--rounds: expected at least 1, got 0",
        "--backend triton": "--backend: expected one that can serve cpu, got triton",
        "--methods jacobi": "invalid choice: 'jacobi'",
        "--dtypes float16": "invalid choice: 'float16'",
    },
    "paper.glue --data .": {
        "--steps 0": "--steps: expected at least 1, got 0",
        "--backend jax": "invalid choice",
        "--plain-steps -1": "--plain-steps: expected at least 0, got -1",
        "--device nonsense": "--device: expected cpu, cuda or cuda:1, got 'nonsense'",
        "--lrs 1e-3 -1": "--lrs: expected positive numbers, got -1",
        "--out .": "--out: expected a file of JSON lines, got the folder",
        "--tasks cola --device cpu": "glue: --data: expected a folder cola in",
    },
    "paper.commonsense --data . --device cpu": {
        "--methods lora pissa": "--methods: expected methods that train an adapter alone, got pissa",
        "--beams 0": "--beams: expected at least 1, got 0",
        "--lrs nan": "--lrs: expected positive numbers",
    },
    "paper.language --device cpu": {
        "": "language: --data: expected a folder with the commonsense sets, got none",
        "--data .": "language: --data: expected a folder boolq",
    },
    "paper.matrix_factorization": {"--size 4 4 5": "R at most M and N"},
    "paper.landscape": {"--size 4 4 5 9": "R at most M and N", "--largest 0": "positive numbers"},
}


@pytest.mark.parametrize(
    "command, message", [(f"{given} {bad}", said) for given, each in BAD.items() for bad, said in each.items()]
)
def test_one_clear_line(
    command: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(data, "stdlib_docstrings", texts)
    monkeypatch.setattr(triton_backend, "unavailable", lambda device: "pretended")
    program, *arguments = command.split()
    with pytest.raises(SystemExit) as left:
        import_module(f"benchmarks.{program}").main(arguments)
    said = " ".join(f"{left.value} {capsys.readouterr().err}".split())
    assert re.search(message, said), said
