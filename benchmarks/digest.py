"""Digests of what 200 steps leave, over modes, dtypes and backends: did a change that should move no bit move one?

    make digest                                  # writes benchmarks/out/digest.json
    make digest ARGS="--against old.json"        # and names the cases that differ from an earlier run

The bits of a run are those of one machine and one torch: compare runs on the same one. Every case has layers of each
layout and rank class, one that starts from B = 0, degenerate ones, padded ranks, a gradient that is NaN once and one
that is missing once, an idle layer, and a bias. Only public names are used. Compiled kernels are emulated, which takes
half a second a step: the triton backend is asked for by itself, over fewer steps, without the ranks that take longest.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import reflora
from reflora import LoRAPair

from . import harness

ROOT = Path(__file__).parents[1]
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
HALF = ("bfloat16", "float16")
ALL = tuple(DTYPES)
SINGLE = ("float32",)
# of RefLoRAAdamW: name, options, dtypes
ADAMW: tuple[tuple[str, dict[str, Any], tuple[str, ...]], ...] = (
    ("default", {}, ALL),
    ("exact", {"warmup_steps": 0}, ALL),
    ("warm-up", {"warmup_steps": 5}, ("float32", "bfloat16")),
    ("scalar", {"scalar": True}, ALL),
    ("scalar at once", {"scalar": True, "warmup_steps": 0}, ("float32", "bfloat16")),
    ("scalar, interval", {"scalar": True, "warmup_steps": 3, "interval": 7}, SINGLE),
    ("interval", {"interval": 4}, ("float32", "bfloat16")),
    ("interval and warm-up", {"interval": 4, "warmup_steps": 3}, ("float32", "float64")),
    ("amsgrad, maximize", {"amsgrad": True, "maximize": True}, ("float32", "bfloat16")),
    ("float32 solve", {"precision": "float32"}, ("float32", "bfloat16")),
    ("carried Grams", {"carry_grams": True}, ("float32", "bfloat16")),
    ("unchecked", {"check_grads": False}, SINGLE),
    ("float32 moments", {"state_dtype": torch.float32}, HALF),
    ("master weights", {"master_weights": True}, HALF),
    ("stochastic rounding", {"stochastic_rounding": True}, ("bfloat16",)),
)
# of wrap: base class, its options, RefLoRA's
WRAPPED: tuple[tuple[str, type, dict[str, Any]], ...] = (
    ("SGD", torch.optim.SGD, {"momentum": 0.9}),
    ("AdamW", torch.optim.AdamW, {}),
    ("AdamW, interval", torch.optim.AdamW, {"interval": 3, "warmup_steps": 2}),
    ("AdamW, scalar", torch.optim.AdamW, {"scalar": True}),
    ("Adagrad, interval", torch.optim.Adagrad, {"interval": 3}),
    ("RMSprop at once", torch.optim.RMSprop, {"warmup_steps": 0}),
)


def layers(dtype: torch.dtype, backend: str) -> tuple[list[LoRAPair], list[Tensor]]:
    """Pairs of every kind, and a parameter of no pair."""
    draw = torch.Generator().manual_seed(7)

    def made(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=draw, dtype=torch.float64) / shape[-1] ** 0.5
        return torch.nn.Parameter(values.to(dtype))

    found = [
        LoRAPair("linear", made(4, 17), made(12, 4)),
        LoRAPair("second", made(4, 17), made(12, 4)),
        LoRAPair("start", made(8, 40), torch.nn.Parameter(torch.zeros(33, 8, dtype=dtype))),
        LoRAPair("conv", made(4, 5, 3, 3), made(9, 4, 1, 1), "conv"),
        LoRAPair("embedding", made(16, 50), made(21, 16), "embedding"),
        LoRAPair("experts", made(15, 19), made(14, 15), "experts(3)"),
        LoRAPair("narrow", made(6, 30), made(4, 6)),
        LoRAPair("padded", made(8, 20), made(20, 8)),
        LoRAPair("middle", made(33, 70), made(65, 33)),
        LoRAPair("large", made(130, 140), made(150, 130)),
        LoRAPair("column-major", torch.nn.Parameter(made(90, 3).data.mT), torch.nn.Parameter(made(3, 21).data.mT)),
        LoRAPair("idle", made(4, 17), made(12, 4)),
    ]
    with torch.no_grad():
        padded = next(pair for pair in found if pair.name == "padded")
        padded.A[5:], padded.B[:, 5:] = 0, 0
    if backend == "triton":
        found = [pair for pair in found if pair.name not in ("middle", "large")]
    return found, [made(11)]


def give_gradients(pairs: list[LoRAPair], others: list[Tensor], step: int) -> None:
    """A pull to zero and noise; NaN, a missing one and none at all each have their step and their layer."""
    draw = torch.Generator().manual_seed(1000 + step)
    for param in [*(t for pair in pairs for t in (pair.A, pair.B)), *others]:
        noise = torch.randn(param.shape, generator=draw, dtype=torch.float64)
        param.grad = torch.empty_like(param).copy_(param.detach().double() / 4 + noise / 8)
    named = {pair.name: pair for pair in pairs}
    if step == 7:
        named["second"].A.grad.view(-1)[3] = torch.nan  # type: ignore[union-attr]
    if step == 11:
        named["linear"].B.grad = None
    padded, idle = named["padded"], named["idle"]
    padded.A.grad[5:], padded.B.grad[:, 5:] = 0, 0  # type: ignore[index]
    if step < 20:
        idle.A.grad = idle.B.grad = None


def digest(tensors: Iterator[tuple[str, Any]]) -> str:
    found = hashlib.sha256()
    for name, value in tensors:
        found.update(name.encode())
        if isinstance(value, Tensor):
            found.update(f"{tuple(value.shape)}{value.dtype}".encode())
            found.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        else:
            found.update(repr(value).encode())
    return found.hexdigest()[:16]


def left(params: list[Tensor], state: Mapping[Any, Any], diagnostics: reflora.Diagnostics) -> str:
    """Of parameters, state and what was done layer by layer."""

    def everything() -> Iterator[tuple[str, Any]]:
        yield from ((f"parameter {number}", p) for number, p in enumerate(params))
        for number, p in enumerate(params):
            yield from ((f"state {number} {name}", value) for name, value in sorted(state.get(p, {}).items()))
        yield "statuses", diagnostics.status
        yield "scales", diagnostics.scale

    return digest(everything())


Case = tuple[Callable[[int], None], Callable[[], str]]


def adamw_steps(options: dict[str, Any], dtype: torch.dtype, backend: str) -> Case:
    pairs, others = layers(dtype, backend)
    params = [t for pair in pairs for t in (pair.A, pair.B)] + others
    torch.manual_seed(3)
    groups = [{"params": params[:6], "lr": 3e-3, "betas": (0.8, 0.99), "weight_decay": 0.1}, {"params": params[6:]}]
    optimizer = reflora.RefLoRAAdamW(groups, pairs, lr=1e-2, backend=backend, **options)

    def step(number: int) -> None:
        give_gradients(pairs, others, number)
        optimizer.step()

    return step, lambda: left(params, optimizer.state, optimizer.diagnostics())


def wrapped_steps(base: type, options: dict[str, Any], backend: str) -> Case:
    pairs, others = layers(torch.float32, backend)
    params = [t for pair in pairs for t in (pair.A, pair.B)] + others
    optimizer = reflora.wrap(base)(params, pairs=pairs, lr=1e-2, backend=backend, **options)

    def step(number: int) -> None:
        give_gradients(pairs, others, number)
        optimizer.step()

    return step, lambda: left(params, optimizer.state, optimizer.diagnostics())


def function_steps(name: str, dtype: torch.dtype, backend: str, scalar: bool) -> Case:
    """refactor_ and precondition_, one after the other."""
    pairs, others = layers(dtype, backend)
    done: list[reflora.Diagnostics] = []

    def step(number: int) -> None:
        give_gradients(pairs, others, number)
        if name == "precondition_":
            done[:] = [reflora.precondition_(pairs, scalar=scalar, backend=backend)]
        else:
            done[:] = [reflora.refactor_(pairs, scalar=scalar, backend=backend)]
        with torch.no_grad():
            for param in (t for pair in pairs for t in (pair.A, pair.B)):
                if param.grad is not None:
                    param.sub_((1e-3 * param.grad).nan_to_num_(0.0, 0.0, 0.0).clamp_(-0.1, 0.1))

    params = [t for pair in pairs for t in (pair.A, pair.B)]
    return step, lambda: left(params, {}, done[0])


def cases(backends: list[str]) -> Iterator[tuple[str, Callable[[], Case]]]:
    for backend in backends:
        for name, options, dtypes in ADAMW:
            for kind in dtypes:
                yield (
                    f"{backend}, RefLoRAAdamW, {name}, {kind}",
                    lambda o=options, k=kind, b=backend: adamw_steps(o, DTYPES[k], b),  # type: ignore[misc]
                )
        for name, base, options in WRAPPED:
            yield (
                f"{backend}, wrap, {name}",
                lambda base=base, o=options, b=backend: wrapped_steps(base, o, b),  # type: ignore[misc]
            )
        for name in ("refactor_", "precondition_"):
            for scalar in (False, True):
                for kind in ("float32", "bfloat16"):
                    yield (
                        f"{backend}, {name}, {'scalar' if scalar else 'full'}, {kind}",
                        lambda n=name, s=scalar, k=kind, b=backend: function_steps(n, DTYPES[k], b, s),  # type: ignore[misc]
                    )


def run(backends: list[str], steps: int, only: str) -> dict[str, list[str]]:
    """By case, digests after a tenth of the steps and after all."""
    found: dict[str, list[str]] = {}
    chosen = [(name, make) for name, make in cases(backends) if only in name]
    for name, make in harness.progress(chosen, "cases"):
        step, digested = make()
        own = []
        for number in range(steps):
            step(number)
            if number + 1 in (max(steps // 10, 1), steps):
                own.append(digested())
        found[name] = own
    return found


def machine() -> dict[str, str]:
    kind = torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__, "python": platform.python_version(), "cpu": f"{platform.machine()} {kind}"}


def emulated() -> None:
    """The triton backend over CPU tensors, as compiled for a GPU (tools/ptxsim)."""
    sys.path.insert(0, str(ROOT / "tools" / "ptxsim"))
    from ptxsim import driver, reflora_hook

    driver.install(90, poison=True, race=0, counters=0)
    reflora_hook.serve_reflora()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", default=["cpp", "torch"])
    parser.add_argument("--steps", type=int, help="200, 40 where kernels are emulated")
    parser.add_argument("--only", default="", help="cases with this in their name")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"))
    parser.add_argument("--against", type=Path, help="an earlier digest.json")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    given.steps = given.steps or (40 if "triton" in given.backends else 200)
    if "triton" in given.backends:
        emulated()
    made = {"machine": machine(), "steps": given.steps, "cases": run(given.backends, given.steps, given.only)}
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "digest.json").write_text(json.dumps(made, indent=1) + "\n")
    print(f"{len(made['cases'])} cases over {given.steps} steps: {given.out / 'digest.json'}")
    if given.against is None:
        return 0
    old = json.loads(given.against.read_text())
    if (old["machine"], old["steps"]) != (made["machine"], made["steps"]):
        print(f"not comparable: {old['machine']}, {old['steps']} steps, against {made['machine']}, {made['steps']}")
        return 2
    differ = [name for name, own in made["cases"].items() if old["cases"].get(name, own) != own]
    same = len(set(made["cases"]) & set(old["cases"])) - len(differ)
    print("\n".join([f"{same} the same, {len(differ)} differ", *differ]))
    return 1 if differ else 0


if __name__ == "__main__":
    raise SystemExit(main())
