"""contrib/peft over the installed PEFT: its optimizer against the reference and the package, its own tests, its files.

With REFLORA_PEFT, a checkout of PEFT without the contribution, also the whole patch and PEFT's MetaMathQA script.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import peft.optimizers
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from toys import random_grads

import reflora
from reflora import reference
from reflora.constants import START_STEPS

ROOT = Path(__file__).parents[2]
CONTRIBUTION = ROOT / "contrib/peft"
EXPERIMENTS = CONTRIBUTION / "method_comparison/MetaMathQA/experiments/lora"
PEFT = os.environ.get("REFLORA_PEFT")
needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")


def loaded(name: str, path: str) -> ModuleType:
    """A file of the contribution as the module that it becomes in PEFT."""
    spec = importlib.util.spec_from_file_location(name, CONTRIBUTION / path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


contributed = loaded("peft.optimizers.reflora", "src/peft/optimizers/reflora.py")
with pytest.MonkeyPatch.context() as patched:
    patched.setattr(peft.optimizers, "create_reflora_optimizer", contributed.create_reflora_optimizer, raising=False)
    patched.setitem(sys.modules, "peft_tests", ModuleType("peft_tests"))
    patched.setitem(sys.modules, "peft_tests.testing_utils", ModuleType("testing_utils"))
    vars(sys.modules["peft_tests.testing_utils"])["torch_device"] = "cpu"
    own_tests = loaded("peft_tests.test_reflora", "tests/test_reflora.py")

# pytest finds them by these names
TestRefLoRAPreconditioner = own_tests.TestRefLoRAPreconditioner
TestRefLoRAOptimizer = own_tests.TestRefLoRAOptimizer


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(20, 24), nn.Linear(24, 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def adapted() -> nn.Module:
    """Two LoRA layers in float64, B at 0, with a LoRA bias that is in no pair."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["first", "second"], lora_bias=True)
    return get_peft_model(TwoLayers(), config).double()


def backward(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    x, y = (torch.randn(32, n, generator=generator, dtype=torch.float64) for n in (20, 9))
    model.zero_grad()
    (model(x) - y).square().mean().backward()


def pairs_of(model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    return [(pair.A, pair.B) for pair in reflora.find_pairs(model)]


def test_fifty_steps_are_the_references() -> None:
    model = adapted()
    optimizer = contributed.create_reflora_optimizer(model, torch.optim.AdamW, lr=0.02, weight_decay=0.1)
    hypers = (reference.Hypers(lr=0.02, weight_decay=0.1),) * 2
    pairs = pairs_of(model)
    zeros = [(torch.zeros_like(A), torch.zeros_like(B)) for A, B in pairs]
    states = [reference.AdamWState(pair, pair, pair) for pair in zeros]
    expected = [(A.detach().clone(), B.detach().clone()) for A, B in pairs]
    plain = [(*pair, state) for pair, state in zip(expected, states)]
    for step in range(50):
        backward(model, step)
        for i, (A, B) in enumerate(pairs):
            # from the same gradients, so that the plain steps below differ by S alone
            after = reference.adamw_step(
                *expected[i], A.grad, B.grad, states[i], hypers, reference.Schedule(start=START_STEPS)
            )
            expected[i], states[i] = after[:2], after[2]
            plain[i] = reference.adamw_step(
                *plain[i][:2], A.grad, B.grad, plain[i][2], hypers, reference.Schedule(warmup_steps=99)
            )[:3]
        optimizer.step()
        for pair, pair_expected in zip(pairs, expected):
            torch.testing.assert_close(pair, pair_expected, rtol=0, atol=1e-10)
    assert all((B - other).abs().max() > 1e-4 for (_, B), (_, other, _) in zip(pairs, plain))
    assert contributed.PHASE_IN_STEPS == START_STEPS


def test_the_packages_fused_step_takes_the_same_steps() -> None:
    ours, theirs = adapted(), adapted()
    fused = reflora.create_reflora_optimizer(ours, torch.optim.AdamW, lr=0.02)
    optimizer = contributed.create_reflora_optimizer(theirs, torch.optim.AdamW, lr=0.02)
    for step in range(50):
        for model, one in ((ours, fused), (theirs, optimizer)):
            backward(model, step)
            one.step()
    for mine, other in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-9)


def test_the_exact_s_in_front_of_sgd_is_the_references() -> None:
    model = adapted()
    optimizer = contributed.create_reflora_optimizer(model, torch.optim.SGD, lr=0.05, warmup_steps=2)
    generator = torch.Generator().manual_seed(1)
    pairs = pairs_of(model)
    for step in range(8):
        random_grads([factor for pair in pairs for factor in pair], generator)
        expected = []
        for A, B in pairs:
            grads = (A.grad, B.grad) if step < 2 else reference.precondition(A.detach(), B.detach(), A.grad, B.grad)
            expected.append(tuple(X.detach() - 0.05 * grad for X, grad in zip((A, B), grads)))
        optimizer.step()
        for pair, pair_expected in zip(pairs, expected):
            torch.testing.assert_close(pair, pair_expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("rank", [32, 128])
def test_an_experiment_is_loras_but_for_the_optimizer(rank: int) -> None:
    folder = EXPERIMENTS / f"llama-3.2-3B-rank{rank}-reflora"
    config = LoraConfig.from_pretrained(str(folder))
    assert (config.r, config.lora_alpha, config.target_modules) == (rank, 2 * rank, None)
    params = json.loads((folder / "training_params.json").read_text())
    assert params["optimizer_type"] == "reflora"
    optimizer = contributed.create_reflora_optimizer(adapted(), torch.optim.AdamW, **params["optimizer_kwargs"])
    # default_training_params.json of the comparison, which the LoRA experiments run with
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (1e-4, 0.1)
    if rank == 128:  # PEFT has none, so the contribution brings it
        plain = EXPERIMENTS / "llama-3.2-3B-rank128"
        assert [path.name for path in plain.iterdir()] == ["adapter_config.json"]
        assert LoraConfig.from_pretrained(str(plain)).to_dict() == config.to_dict()


@needs_git
def test_the_patch_applies_to_the_installed_peft(tmp_path: Path) -> None:
    place = tmp_path / "src/peft/optimizers/__init__.py"
    place.parent.mkdir(parents=True)
    shutil.copy(peft.optimizers.__file__, place)
    patch = ["git", "apply", "--include=src/*", str(CONTRIBUTION / "peft.patch")]
    subprocess.run(patch, cwd=tmp_path, check=True, env={**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)})
    names: dict[str, list[str]] = {"__name__": "peft.optimizers", "__package__": "peft.optimizers"}  # type: ignore[dict-item]
    exec(place.read_text(), names)
    assert set(names["__all__"]) == {*peft.optimizers.__all__, "create_reflora_optimizer"}
    assert names["create_reflora_optimizer"] is contributed.create_reflora_optimizer


@needs_git
@pytest.mark.skipif(PEFT is None, reason="REFLORA_PEFT is not set: a checkout of PEFT")
def test_the_metamathqa_script_runs_the_experiment(tmp_path: Path) -> None:
    checkout = tmp_path / "peft"
    shutil.copytree(str(PEFT), checkout)
    subprocess.run(["git", "apply", str(CONTRIBUTION / "peft.patch")], cwd=checkout, check=True)
    for name in ("src", "tests", "method_comparison"):
        shutil.copytree(CONTRIBUTION / name, checkout / name, dirs_exist_ok=True)
    script = str(CONTRIBUTION / "check/tiny_metamathqa.py")
    command = [sys.executable, script, str(checkout), "rank32", "rank32-reflora"]
    done = subprocess.run(
        [*command, "--steps", "250", "--lr", "1e-2"], check=True, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(checkout / "src")},
    )  # fmt: skip
    rows = [line.split(" | ") for line in done.stdout.splitlines()[1:]]
    assert [row[0] for row in rows] == ["rank32", "rank32-reflora"]
    lora, ours = (float(row[1]) for row in rows)
    assert lora != ours and abs(ours / lora - 1) < 0.05
