"""The layers of a saved adapter: which tensors are A and B, and whether the update is their product."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..checks import fail
from ..constants import STORAGE_DTYPES
from ..integrations.peft import SCALED_INSIDE
from ..pairs import LoRAPair, layout_of
from .rules import Rules, shown

PREFIX = "base_model.model."
FACTORS = {"lora_A": 0, "lora_B": 1, "lora_embedding_A": 0, "lora_embedding_B": 1}
# tensors that need no change when A and B do: DoRA's magnitude, VeLoRA's projection of inputs
BESIDE = ("lora_magnitude_vector", "lora_velora_embed")


@dataclass(frozen=True)
class Stored:
    """A layer on disk: the keys of A and B ("" for one that is missing), and its pair, or the reason it has none."""

    name: str
    key_A: str
    key_B: str
    pair: LoRAPair | None
    reason: str = ""


def read_stored(tensors: Mapping[str, Tensor], rules: Rules) -> list[Stored]:
    """Every layer with an A or a B, sorted by name, numbers in it as numbers.

    Raises ValueError where a factor is there twice, with PEFT's prefix and without it.
    """
    found: dict[tuple[str, bool, str], list[str]] = defaultdict(lambda: ["", ""])
    unfit: dict[str, str] = {}
    for key in tensors:
        parts = key.split(".")
        marks = [place for place, part in enumerate(parts) if part in FACTORS]
        marks = marks or [place for place, part in enumerate(parts) if part.startswith("lora_")]
        if not marks:
            continue
        name, mark, tail = ".".join(parts[: marks[-1]]), parts[marks[-1]], parts[marks[-1] + 1 :]
        name = name.removeprefix(PREFIX)
        embedding, weight = "embedding" in mark, tail[-1:] == ["weight"]
        adapter = tail[:-1] if weight else tail  # PEFT removes its name
        if mark in FACTORS and weight != embedding and len(adapter) <= 1:
            factors, side = found[name, embedding, ".".join(adapter)], FACTORS[mark]
            if factors[side]:
                got = f"two, with {PREFIX} before the name and without it"
                remedy = "PEFT reads the first: load the adapter with PeftModel.from_pretrained and save it again."
                fail(f"{shown(name)}, {mark}", "one tensor", got, remedy)
            factors[side] = key
        elif mark in SCALED_INSIDE:
            unfit[name] = f"{mark} stands between B and A"
        elif mark not in BESIDE and (mark, tail[-1:]) != ("lora_B", ["bias"]):
            unfit[name] = f"{shown('.'.join([mark, *tail]), 40)} is not known"
    layers = []
    for (name, embedding, _), (key_A, key_B) in found.items():
        layout = unfit.get(name) or _layout(name, tensors.get(key_A), tensors.get(key_B), embedding, rules)
        if layout_of(layout) is not None:
            layers.append(Stored(name, key_A, key_B, LoRAPair(name, tensors[key_A], tensors[key_B], layout)))
        else:
            layers.append(Stored(name, key_A, key_B, None, layout))
    return sorted(layers, key=lambda one: [part.zfill(9) if part.isdigit() else part for part in one.name.split(".")])


def _layout(name: str, A: Tensor | None, B: Tensor | None, embedding: bool, rules: Rules) -> str:
    """The layout of a `LoRAPair`, or why these are not factors of B A; see `integrations/peft.py`."""
    if A is None or B is None:
        return f"{'A' if A is None else 'B'} is missing"
    for tensor in (A, B):
        if tensor.dtype not in STORAGE_DTYPES:
            return f"{str(tensor.dtype).removeprefix('torch.')} factors"
    if any(pattern in name for pattern in rules.block_diagonal):
        return "block-diagonal factors"
    if min(A.dim(), B.dim()) < 2 or min(A.numel(), B.numel()) == 0:
        return "not gathered from ZeRO-3 or FSDP"
    rows, columns = A.shape[0], B.shape[1]
    if A.dim() == B.dim() in (3, 4, 5) and rows > columns and rows % columns == 0:
        return "grouped convolution"
    if A.dim() != B.dim() or A.dim() > 5 or rows != columns or max(B.shape[2:], default=1) > 1:
        return f"A {tuple(A.shape)} and B {tuple(B.shape)} do not match"
    if A.dim() > 2 or embedding:
        wrong = f"A has {rows} rows, not {rules.rank(name)}"
        return wrong if rows != rules.rank(name) else "embedding" if embedding else "conv"
    experts = rules.experts(name, rows)
    return experts if isinstance(experts, str) else f"experts({experts})" if experts > 1 else "linear"
