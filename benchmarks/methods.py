"""The methods under test: for each what it trains, how it starts, and its optimizer."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import variants
from .baselines import balora, lora_muon, lora_pro, lora_rite, nora, peft_optimizers, preclora, published_reflora

Pairs = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Setting:
    """What all methods of a run share; warmup_steps: of the RefLoRA variants, as RefLoRAAdamW has it."""

    lr: float
    warmup_steps: int | None
    weight_decay: float = 0.01
    backend: str | None = None
    scaling: float = 1.0


@dataclass(frozen=True)
class Subject:
    """Parameters to train, the LoRA pairs among them, and, where there is one, the model that they are installed in."""

    parameters: Sequence[Tensor]
    pairs: Pairs
    setting: Setting
    model: nn.Module | None = None

    @property
    def options(self) -> dict[str, float]:
        return {"lr": self.setting.lr, "weight_decay": self.setting.weight_decay}


Make = Callable[[Subject], Optimizer]


@dataclass(frozen=True)
class Method:
    """label: in tables and figures. variant: of `variants`. start: changes the first values of the factors.

    needs_model: its optimizer wants the PEFT model, not only the pairs.
    """

    label: str
    make: Make
    variant: str = "lora"
    start: Callable[[Subject], None] | None = None
    needs_model: bool = False


def _adamw(subject: Subject) -> Optimizer:
    return torch.optim.AdamW(subject.parameters, fused=True, **subject.options)


def _reflora(subject: Subject, **more: Any) -> Optimizer:
    import reflora

    setting = subject.setting
    steps = {"warmup_steps": setting.warmup_steps, "backend": setting.backend}
    return reflora.RefLoRAAdamW(subject.parameters, pairs=subject.pairs, **steps, **more, **subject.options)


def _invariant(subject: Subject, **more: Any) -> Optimizer:
    import reflora

    more["backend"] = subject.setting.backend
    return reflora.InvariantAdamW(subject.parameters, pairs=subject.pairs, **more, **subject.options)


def _riemannian(subject: Subject) -> Optimizer:
    import reflora

    own = {"backend": subject.setting.backend}
    return reflora.RiemannianAdamW(subject.parameters, pairs=subject.pairs, **own, **subject.options)


def _unit_determinant(subject: Subject) -> Optimizer:
    from .unit_determinant import UnitDeterminantRefLoRA

    return UnitDeterminantRefLoRA(subject.parameters, subject.pairs, **subject.options)


def _published(subject: Subject, scalar: bool) -> Optimizer:
    optimizer = _adamw(subject)
    published_reflora.attach(optimizer, subject.pairs, subject.setting.warmup_steps or 0, scalar=scalar)
    return optimizer


def _of(factory: Callable[..., Optimizer], *named: str) -> Make:
    """A baseline's optimizer over parameters and pairs, with those of the setting's fields that it asks for."""

    def make(subject: Subject) -> Optimizer:
        more = {name: getattr(subject.setting, name) for name in named}
        return factory(subject.parameters, subject.pairs, **more, **subject.options)

    return make


def _on_our_kernels(factory: Callable[..., Optimizer], function: str) -> Make:
    """A rival with its `[r, r]` decompositions by `reflora.linalg` in place of torch."""

    def make(subject: Subject) -> Optimizer:
        import reflora

        own = {function: getattr(reflora.linalg, function)}
        return factory(subject.parameters, subject.pairs, **own, **subject.options)

    return make


def _adalora(subject: Subject) -> Optimizer:
    return peft_optimizers.adalora(subject.model, subject.parameters, **subject.options)


def _sketch(subject: Subject) -> None:
    assert subject.model is not None
    nora.start_(subject.pairs, variants.base_weights(subject.model), subject.setting.scaling)


METHODS: dict[str, Method] = {
    "lora": Method("LoRA", _adamw),
    "reflora": Method("RefLoRA", _reflora),
    "reflora-carried": Method("RefLoRA, carried Grams", functools.partial(_reflora, carry_grams=True)),
    "reflora-s": Method("RefLoRA-S", functools.partial(_reflora, scalar=True)),
    "invariant": Method("InvariantAdamW", _invariant),
    "invariant-carried": Method("InvariantAdamW, carried Grams", functools.partial(_invariant, carry_grams=True)),
    "invariant-rite": Method("InvariantAdamW, scaled", functools.partial(_invariant, metric="scaled")),
    "invariant-muon": Method(
        "InvariantAdamW, scaled, momentum",
        functools.partial(_invariant, metric="scaled", moments="momentum", betas=(0.95, 0.999)),
    ),
    "invariant-identity": Method("InvariantAdamW, identity", functools.partial(_invariant, metric="identity")),
    "published": Method("published RefLoRA", functools.partial(_published, scalar=False)),
    "published-s": Method("published RefLoRA-S", functools.partial(_published, scalar=True)),
    "reflora-unit": Method("RefLoRA, unit determinant", _unit_determinant),
    "lora-pro": Method("LoRA-Pro", _of(lora_pro.LoRAPro, "scaling")),
    "lora-pro-full": Method("LoRA-Pro, full", _of(lora_pro.LoRAProFull, "scaling")),
    "lora-rite": Method("LoRA-RITE", _of(lora_rite.LoRARITE)),
    "preclora": Method("PrecLoRA", _of(preclora.PrecLoRA)),
    "riemannian-fused": Method("RiemannianAdamW", _riemannian),
    "riemannian": Method("PEFT Riemannian", _of(peft_optimizers.riemannian)),
    "nora+": Method("NoRA+", _of(nora.NoRAPlus), start=_sketch),
    "balora": Method("BaLoRA", _of(balora.BaLoRA)),
    "lora-muon": Method("LoRA-Muon", _of(lora_muon.LoRAMuon)),
    "balora-linalg": Method("BaLoRA, our kernels", _on_our_kernels(balora.BaLoRA, "svd")),
    "lora-muon-linalg": Method("LoRA-Muon, our kernels", _on_our_kernels(lora_muon.LoRAMuon, "eigh")),
    "lora+": Method("LoRA+", _of(peft_optimizers.loraplus)),
    "lora-fa": Method("LoRA-FA", lambda s: peft_optimizers.lorafa(s.model, **s.options), needs_model=True),
    "pissa": Method("PiSSA", _adamw, "pissa", needs_model=True),
    "dora": Method("DoRA", _adamw, "dora", needs_model=True),
    "adalora": Method(
        "AdaLoRA", _adalora, "adalora", lambda s: peft_optimizers.forget_ranks(s.model), needs_model=True
    ),
    "bitfit": Method("BitFit", _adamw, "bitfit", needs_model=True),
    "full": Method("full fine-tuning", _adamw, "full", needs_model=True),
}
LABELS = {name: method.label for name, method in METHODS.items()}
BARE = tuple(name for name, method in METHODS.items() if not method.needs_model)
EXPERIMENTS = ("reflora-unit",)  # asked by name alone: not a method that anybody would use
DEFAULT = ("lora", "reflora", "reflora-s", "published", "lora-pro", "lora-rite")
PEFT_OPTIMIZERS = {
    "riemannian": "create_riemannian_optimizer",
    "lora+": "create_loraplus_optimizer",
    "lora-fa": "create_lorafa_optimizer",
}


def build(name: str, subject: Subject) -> Optimizer:
    """The optimizer of the method `name` of METHODS."""
    return METHODS[name].make(subject)


def starts(name: str) -> bool:
    """Whether the method `name` has a start of its own, that is, heeds warmup_steps."""
    return name.startswith(("reflora", "published")) and name not in EXPERIMENTS


def missing(names: Sequence[str]) -> str | None:
    """Why one of the methods cannot be built from what is installed, or None. For a parser to ask."""
    for name in names:
        if name in PEFT_OPTIMIZERS:
            try:
                getattr(importlib.import_module("peft.optimizers"), PEFT_OPTIMIZERS[name])
            except (ImportError, AttributeError) as error:
                return f"--methods: {name} needs a PEFT with peft.optimizers.{PEFT_OPTIMIZERS[name]} ({error})"
    return None


def available(names: Sequence[str]) -> list[str]:
    """Those of `names` that can be built; of the others a line says why they are left out."""
    reasons = {name: missing([name]) for name in names}
    for reason in filter(None, reasons.values()):
        print(f"left out: {reason}", file=sys.stderr)
    return [name for name, reason in reasons.items() if not reason]


def unserved(backend: str | None, device: torch.device) -> str | None:
    """Why reflora's `backend` cannot serve `device`, or None. For a parser to ask before anything is loaded."""
    if backend is None:
        return None
    from reflora.backends import load

    reason = load(backend).unavailable(device)
    return f"--backend: expected one that can serve {device}, got {backend}: {reason}" if reason else None
