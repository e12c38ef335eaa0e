"""The LoRA adapter nearest to what a fine-tuning has changed, from two checkpoints."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import lowrank
from ..adapters import CONFIG, WEIGHTS, shown
from ..adapters.folder import check_free, whole_or_absent, write_json
from ..adapters.keys import PREFIX
from ..adapters.ranks import patterns
from ..checks import fail
from ..report import progress
from ..resize import Choice
from .checkpoints import Checkpoint

# the last word of an embedding's name; its weight is [num_embeddings, n_out], and PEFT takes B A as its transpose
EMBEDDING = re.compile(r"embed|^w[tp]e$|^shared$")
OUTPUT = "lm_head"
# models whose matrices are [n_in, n_out], in transformers' Conv1D
TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")


@dataclass(frozen=True)
class Extracted:
    """A layer. norm: `||W' - W||_F`; error: `||W' - W - B A||_F` over it, of B A as it is stored."""

    name: str
    shape: tuple[int, ...]
    rank: int
    norm: float
    error: float


@dataclass(frozen=True)
class Extraction:
    """left_out: why -> names of tensors that have changed and are not in the adapter. unchanged: how many have not."""

    layers: list[Extracted]
    left_out: Mapping[str, list[str]]
    unchanged: int

    @property
    def error(self) -> float:
        """Of all layers together, `(sum ||W' - W - B A||_F^2 / sum ||W' - W||_F^2)^(1/2)`."""
        whole = sum(one.norm**2 for one in self.layers)
        return (sum((one.norm * one.error) ** 2 for one in self.layers) / whole) ** 0.5


@torch.no_grad()
def extract(base: Checkpoint, tuned: Checkpoint, out: Path, choice: Choice) -> Extraction:
    """Write a PEFT adapter with `W + B A` near the tuned W for every matrix and convolution that has changed, at scale
    1; an energy is a share of `||W' - W||_F^2`. Two tensors are in memory at a time, beside the adapter.

    Raises FileExistsError if `out` exists, ValueError where the checkpoints share no name or no matrix has changed,
    OSError where `out` cannot be written; `out` is then absent.
    """
    check_free(out, "OUT")
    if choice.rank is None:
        fail("--rank", "an integer >= 1", "none", "Pass the highest rank that a layer may have, with --energy too.")
    common = sorted(base.shapes.keys() & tuned.shapes.keys())
    if not common:
        got = f"{shown(next(iter(base.shapes), 'none'), 40)} and {shown(next(iter(tuned.shapes), 'none'), 40)}"
        fail("BASE and TUNED", "checkpoints of one model", got, "Save both with save_pretrained of the same class.")
    config = base.config()
    transposed, tied = config.get("model_type") in TRANSPOSED, _tied(base, config)
    tensors, layers, left_out, unchanged = dict[str, Tensor](), list[Extracted](), defaultdict[str, list[str]](list), 0
    for one, other, why in ((base, tuned, "not in TUNED"), (tuned, base, "not in BASE")):
        left_out[why] += sorted(one.shapes.keys() - other.shapes.keys())
    for name in progress(common, len(common), "tensors"):
        reason, D = _change(base, tuned, name)
        if D is None:
            unchanged += not reason
            left_out[reason or ""] += [name] if reason else []
            continue
        layer = name.removesuffix(".weight")
        embedding = bool(EMBEDDING.search(layer.rpartition(".")[2]))
        matrix = D.mT if embedding or (transposed and D.dim() == 2) else D.flatten(1)
        A, B, error = _nearest(matrix, choice)
        tensors.update(_named(layer, A, B, D.shape, embedding))
        if layer == tied:
            tensors.update(_named(OUTPUT, B.mT.contiguous(), A.mT.contiguous(), D.shape, False))
        layers.append(Extracted(layer, tuple(D.shape), A.shape[0], float(D.double().norm()), error))
    if not layers:
        got = f"{unchanged} tensors that are the same, and {sum(map(len, left_out.values()))} others"
        fail("TUNED", "a matrix that is not as in BASE", got, "Check the order: BASE, then TUNED.")
    ranks = {one.name: one.rank for one in layers}
    ranks |= {OUTPUT: ranks[tied]} if tied in ranks else {}
    _write(out, tensors, _config(base, config, ranks, transposed))
    return Extraction(layers, {why: names for why, names in left_out.items() if names}, unchanged)


def _change(base: Checkpoint, tuned: Checkpoint, name: str) -> tuple[str, Tensor | None]:
    """(why it cannot be in an adapter or "", what has changed); nothing for a tensor that is the same."""
    if base.shapes[name] != tuned.shapes[name]:
        return "another shape", None
    old, new = base.read(name), tuned.read(name)
    if torch.equal(old, new):
        return "", None
    if not (old.is_floating_point() and new.is_floating_point()) or old.element_size() < 2 or new.element_size() < 2:
        return "quantised", None
    if not name.endswith(".weight") or not 2 <= old.dim() <= 5 or old.numel() == 0:
        return "no matrix", None
    wide = torch.promote_types(torch.promote_types(old.dtype, new.dtype), torch.float32)
    D = new.to(wide) - old.to(wide)
    if not D.isfinite().all():
        return "not finite", None
    return ("", D) if D.any() else ("", None)


def _nearest(D: Tensor, choice: Choice) -> tuple[Tensor, Tensor, float]:
    """(A `[r, n_in]`, B `[n_out, r]`, error), in float32."""
    U, s, Vt = lowrank.leading(D, choice.rank or 1)
    norm = float(D.norm())
    rank = len(s) if choice.energy is None else min(len(s), lowrank.rank_for(s, choice.energy, norm))
    root = s[:rank].sqrt()
    A, B = (root[:, None] * Vt[:rank]).float(), (U[:, :rank] * root).float()
    return A.contiguous(), B.contiguous(), float((D - B.to(D.dtype) @ A.to(D.dtype)).norm()) / norm


def _named(layer: str, A: Tensor, B: Tensor, shape: torch.Size, embedding: bool) -> dict[str, Tensor]:
    """As PEFT names and shapes them."""
    if embedding:
        return {f"{PREFIX}{layer}.lora_embedding_A": A, f"{PREFIX}{layer}.lora_embedding_B": B}
    if len(shape) > 2:
        A, B = A.unflatten(1, shape[1:]), B.view(*B.shape, *[1] * (len(shape) - 2))
    return {f"{PREFIX}{layer}.lora_A.weight": A, f"{PREFIX}{layer}.lora_B.weight": B}


def _config(base: Checkpoint, config: Mapping[str, Any], ranks: Mapping[str, int], transposed: bool) -> dict[str, Any]:
    found = ranks.keys()
    matrices = {n.removesuffix(".weight") for n, s in base.shapes.items() if n.endswith(".weight") and len(s) > 1}
    # the last word of a name, where it means these layers alone
    ends = {name.rpartition(".")[2] for name in found}
    whole = {end for end in ends if all(name in found for name in matrices if name.rpartition(".")[2] == end)}
    targets = whole | {name for name in found if name.rpartition(".")[2] not in whole}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if _is_causal(config) else None,
        "base_model_name_or_path": str(base.path),
        "target_modules": sorted(targets),
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        **({"ensure_weight_tying": True} if OUTPUT in found and f"{OUTPUT}.weight" not in base.shapes else {}),
        **patterns({name: (rank, rank) for name, rank in ranks.items()}),
    }


def _is_causal(config: Mapping[str, Any]) -> bool:
    return any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in config.get("architectures") or [])


def _tied(base: Checkpoint, config: Mapping[str, Any]) -> str:
    """The embedding whose weight is the output layer's too, or "": PEFT adapts the two by themselves."""
    if not _is_causal(config) or f"{OUTPUT}.weight" in base.shapes or config.get("tie_word_embeddings") is False:
        return ""
    names = (
        name.removesuffix(".weight") for name, shape in base.shapes.items() if shape[:1] == (config.get("vocab_size"),)
    )
    return next((name for name in names if EMBEDDING.search(name.rpartition(".")[2])), "")


def _write(out: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file

    with whole_or_absent(out, "OUT") as part:
        part.mkdir()
        save_file(dict(tensors), str(part / WEIGHTS), {"format": "pt"})
        (part / WEIGHTS).chmod(0o644)
        write_json(part / CONFIG, config)
