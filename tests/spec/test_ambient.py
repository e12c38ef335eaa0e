"""What a caller has set around a step changes none of its bits: contexts, defaults and switches of torch."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import spectrum_pair
from test_hooks import build, trained
from torch import Tensor, nn

import reflora
from reflora import LoRAPair, RefLoRAAdamW
from reflora.ambient import independent


@contextmanager
def setting(set_: Callable[[object], None], value: object, before: object) -> Iterator[None]:
    set_(value)
    try:
        yield
    finally:
        set_(before)


AMBIENT: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "default device": lambda: setting(torch.set_default_device, "meta", None),
    "device context": lambda: torch.device("meta"),
    "default float64": lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "default bfloat16": lambda: setting(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "autocast bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", torch.float16),
    "matmul precision": lambda: setting(torch.set_float32_matmul_precision, "medium", "highest"),
    "deterministic": lambda: setting(torch.use_deterministic_algorithms, True, False),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "grad": torch.enable_grad,
}
# what reaches the host's part of a step, the only one that a kernel leaves to the caller's settings
FOR_KERNELS = ("default device", "default bfloat16", "inference mode")
# reduced products show in the float32 solve of test_adamw alone
ELSEWHERE = [name for name in AMBIENT if name != "matmul precision"]
OPTIONS: dict[str, dict[str, object]] = {
    "default": {},
    "exact, interval": {"warmup_steps": 1, "interval": 2, "amsgrad": True},
    "scalar": {"scalar": True, "warmup_steps": 0},
    "storage": {"master_weights": True},
    "random rounding": {"stochastic_rounding": True, "precision": "float32"},
    "carried": {"carry_grams": True, "warmup_steps": 0},
    "float32 solve": {"precision": "float32", "warmup_steps": 0},  # which reduced products would show in
}


def copies(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def some_pairs() -> list[LoRAPair]:
    """float32 and bfloat16, a stack of experts, and more rows than a product in bfloat16 could hide in."""
    pairs = [LoRAPair("wide", *spectrum_pair(8, 190, 210, 3, 30, torch.float32))]
    pairs.append(LoRAPair("narrow", *spectrum_pair(4, 33, 21, 3, 30, torch.bfloat16)))
    pairs.append(LoRAPair("experts", torch.randn(8, 12), torch.randn(10, 8), "experts(2)"))
    for pair in pairs:
        pair.A.requires_grad_(), pair.B.requires_grad_()
    return pairs


class Signs(torch.optim.Optimizer):
    """Momentum of a class of its own, whose state RefLoRA cannot move."""

    def __init__(self, params: list[Tensor], lr: float):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                slow = self.state[p].setdefault("slow", torch.zeros_like(p))
                p.sub_(slow.lerp_(p.grad, 0.1).sign(), alpha=self.param_groups[0]["lr"])


class Training:
    """Steps of an optimizer over given gradients, its construction and a reload among them."""

    def __init__(self, make: Callable[[list[LoRAPair], nn.Parameter], torch.optim.Optimizer]):
        torch.manual_seed(0)
        self.make, self.pairs, self.bias = make, some_pairs(), nn.Parameter(torch.randn(7))
        self.params = [*(t for p in self.pairs for t in (p.A, p.B)), self.bias]
        self.grads = [[torch.randn_like(t) for t in self.params] for _ in range(4)]

    def __call__(self) -> list[Tensor]:
        torch.manual_seed(1)
        optimizer = self.optimizer = self.make(self.pairs, self.bias)
        for number, grads in enumerate(self.grads):
            if number == 2:
                saved, optimizer = optimizer.state_dict(), self.make(self.pairs, self.bias)
                self.optimizer = optimizer
                optimizer.load_state_dict(saved)
            for param, grad in zip(self.params, grads):
                param.grad = grad
            # the pair's partner stays without: a plain step
            self.params[0].grad = None if number == 1 else self.params[0].grad
            optimizer.step()
        status = optimizer.diagnostics().status  # type: ignore[attr-defined]
        # an optimizer of torch makes its own step counts of the default type
        entries = (item for state in optimizer.state.values() for item in state.items())
        kept = [value for name, value in entries if isinstance(value, Tensor) and name != "step"]
        return [*copies(self.params), *copies(kept), status.clone()]


def assert_same_bits(ours: list[Tensor], others: list[Tensor]) -> None:
    assert len(ours) == len(others)
    for mine, other in zip(ours, others):
        assert mine.dtype == other.dtype and mine.device == other.device
        assert mine.equal(other) or (mine.isnan() & other.isnan() | (mine == other)).all()


WITHOUT: dict[tuple[object, ...], list[Tensor]] = {}


def without(*what: object, call: Callable[[], list[Tensor]]) -> list[Tensor]:
    """What a call returns in no such surroundings: made once for each `what`."""
    if what not in WITHOUT:
        WITHOUT[what] = call()
    return WITHOUT[what]


def trained_alike(ambient: str, *what: object, make: Callable[..., torch.optim.Optimizer]) -> Training:
    """Its bits are those of a training in no such surroundings, which is kept for each `what`."""
    wanted, training = without(*what, call=Training(make)), Training(make)
    with AMBIENT[ambient]():
        got = training()
    assert_same_bits(got, wanted)
    return training


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("ambient", AMBIENT)
def test_adamw(ambient: str, name: str, backend: str) -> None:
    if backend == "triton" and (ambient not in FOR_KERNELS or name not in ("default", "scalar")):
        pytest.skip("of torch's arithmetic")

    def make(pairs: list[LoRAPair], bias: nn.Parameter) -> RefLoRAAdamW:
        params = [*(t for p in pairs for t in (p.A, p.B)), bias]
        return RefLoRAAdamW(params, pairs, lr=1e-2, backend=backend, **OPTIONS[name])  # type: ignore[arg-type]

    # what was made there serves outside
    trained_alike(ambient, name, backend, make=make).optimizer.step()


@pytest.mark.parametrize("options", [{}, {"warmup_steps": 1}, {"interval": 2}, {"scalar": True, "warmup_steps": 0}])
@pytest.mark.parametrize("base", [torch.optim.Adam, Signs])
@pytest.mark.parametrize("ambient", ELSEWHERE)
def test_wrapped(ambient: str, base: type[torch.optim.Optimizer], options: dict[str, object]) -> None:
    if base is Signs and "scalar" in options:
        pytest.skip("refused: its state is not moved")

    def make(pairs: list[LoRAPair], bias: nn.Parameter) -> torch.optim.Optimizer:
        params = [*(t for p in pairs for t in (p.A, p.B)), bias]
        return reflora.wrap(base)(params, pairs, lr=1e-2, backend="torch", **options)

    trained_alike(ambient, base, str(options), make=make)


@pytest.mark.parametrize("warmup_steps", [None, 0, 2])
@pytest.mark.parametrize("ambient", ELSEWHERE)
def test_hooks(ambient: str, warmup_steps: int | None) -> None:
    """What is made in the context serves outside of it."""

    def train(around: Callable[[], AbstractContextManager[object]]) -> list[Tensor]:
        model = build()
        optimizer = torch.optim.SGD(trained(model), lr=0.1)
        generator, found = torch.Generator().manual_seed(1), []
        with around():
            hooks = reflora.GradientHooks(model, warmup_steps=warmup_steps, backend="torch")
        for _ in range(3):
            optimizer.zero_grad()
            grads = [torch.randn(p.shape, generator=generator) for p in trained(model)]
            with around():
                torch.autograd.backward(trained(model), grads)
            found += copies([p.grad for p in trained(model) if p.grad is not None])
            optimizer.step()
            with around():
                hooks.refresh()
                hooks.load_state_dict(hooks.state_dict())
        return found + list(hooks.state_dict().values())

    assert_same_bits(train(AMBIENT[ambient]), train(AMBIENT["grad"]))


@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("ambient", ELSEWHERE)
def test_functions(ambient: str, scalar: bool, fast_backend: str) -> None:
    def call(around: Callable[[], AbstractContextManager[object]]) -> list[Tensor]:
        torch.manual_seed(0)
        pairs = [(p.A.detach(), p.B.detach()) for p in some_pairs()[:2]]
        grads = [(torch.randn_like(A), torch.randn_like(B)) for A, B in pairs]
        with around():
            first = reflora.precondition_(pairs, grads, scalar, backend=fast_backend)
            second = reflora.refactor_(pairs, scalar, backend=fast_backend)
            reports = [first.condition_A, second.scale, second.balance]
        return [t for sides in (*pairs, *grads) for t in sides] + reports

    assert_same_bits(call(AMBIENT[ambient]), call(torch.no_grad))


@pytest.mark.parametrize("ambient", ELSEWHERE)
def test_linalg(ambient: str, fast_backend: str) -> None:
    torch.manual_seed(0)
    X = torch.randn(2, 160, 160)
    P = X @ X.mT + torch.eye(160)
    linalg, how = reflora.linalg, {"backend": fast_backend, "precision": "float32"}

    def call() -> list[Tensor]:
        found = [*linalg.eigh(P, **how), *linalg.polar(X, **how)]  # type: ignore[arg-type]
        found += [linalg.sqrtm(P, **how), linalg.inv_root(P, 4, **how)]  # type: ignore[arg-type]
        return [*found, linalg.geometric_mean(P, P + P.mT, **how)]  # type: ignore[arg-type]

    wanted = without("linalg", fast_backend, call=call)
    with AMBIENT[ambient]():
        got = call()
    assert_same_bits(got, wanted)


@pytest.mark.parametrize("precision", ["medium", "high"])
def test_two_threads_leave_the_precision_of_products_as_it_was(precision: str) -> None:
    matmul, inside = torch.backends.mkldnn.matmul, []  # type: ignore[attr-defined]
    with setting(torch.set_float32_matmul_precision, precision, "highest"):
        before = matmul.fp32_precision
        first, second = independent(), independent()
        first.__enter__(), second.__enter__()
        first.__exit__(None, None, None)
        inside.append(torch.get_float32_matmul_precision())
        second.__exit__(None, None, None)
        assert inside == ["highest"] and torch.get_float32_matmul_precision() == precision
        assert matmul.fp32_precision == before


def test_an_inherited_precision_goes_on_being_inherited() -> None:
    mkldnn: Any = torch.backends.mkldnn
    try:
        mkldnn.matmul.fp32_precision = "none"
        mkldnn.fp32_precision = "bf16"
        with independent():
            assert mkldnn.matmul.fp32_precision == "ieee"
        assert mkldnn.matmul.fp32_precision == "bf16"
        mkldnn.fp32_precision = "ieee"
        assert mkldnn.matmul.fp32_precision == "ieee"
    finally:
        mkldnn.fp32_precision = "none"


@pytest.mark.parametrize("ambient", ["autocast bfloat16", "autocast float16"])
def test_factors_drawn_anew_keep_the_model(ambient: str) -> None:
    model = build()
    for p in trained(model):
        nn.init.normal_(p, std=0.1)
    x = torch.randn(4, 24)
    with torch.no_grad():
        before = model(x)
        with AMBIENT[ambient]():
            reflora.Refactorer(model, re_init=True)
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


MAKERS = {
    "tensor", "as_tensor", "zeros", "ones", "empty", "full", "eye", "arange", "linspace", "logspace", "rand", "randn",
    "randint", "empty_strided", "scalar_tensor",
}  # fmt: skip
PACKAGE = Path(reflora.__file__).parent


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_tensor_names_its_device_and_dtype(path: Path) -> None:
    if "reference" in path.parts or path.name == "__main__.py":
        pytest.skip("of the host, read by nobody else")
    bare = []
    for call in ast.walk(ast.parse(path.read_text())):
        function = call.func if isinstance(call, ast.Call) else None
        torchs = isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name)
        if torchs and function.value.id == "torch" and function.attr in MAKERS:  # type: ignore[union-attr]
            named = {keyword.arg for keyword in call.keywords}  # type: ignore[attr-defined]
            bare += [] if {"device", "dtype"} <= named else [f"{path.name}:{call.lineno} {ast.unparse(call)}"]  # type: ignore[attr-defined]
    assert not bare, "\n".join(bare)
