"""The layers of a saved adapter: which tensors are A and B, and whether the update is their product."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from ..checks import fail
from ..constants import STORAGE_DTYPES
from ..pairs import LoRAPair, layout_of
from .keys import PREFIX, Key, parse
from .rules import shown


class Ranks(Protocol):
    """What is known of an adapter's layers beside their tensors: `Rules` or `Alone`.

    alphas: whether a tensor named alpha beside the factors is theirs.
    """

    @property
    def alphas(self) -> bool: ...

    @property
    def block_diagonal(self) -> tuple[str, ...]: ...

    def scale(self, key: str) -> float: ...

    def wrong(self, name: str, rows: int) -> str: ...

    def experts(self, name: str, rows: int) -> tuple[int, tuple[str, ...]] | str: ...


@dataclass(frozen=True)
class Stored:
    """A layer on disk: the keys of A, B and alpha ("" if missing), and its pair, or the reason it has none.

    rank_keys: The names by which its rank may be looked up; scale: s of `W + s B A`.
    """

    name: str
    key_A: str
    key_B: str
    pair: LoRAPair | None
    reason: str = ""
    key_alpha: str = ""
    rank_keys: tuple[str, ...] = ()
    scale: float = 1.0


@dataclass
class _Found:
    """The keys of a file, by layer."""

    factors: dict[tuple[str, bool, str], list[str]] = field(default_factory=lambda: defaultdict(lambda: ["", ""]))
    alphas: dict[str, str] = field(default_factory=dict)
    unfit: dict[str, str] = field(default_factory=dict)


def read_stored(tensors: Mapping[str, Tensor], rules: Ranks) -> list[Stored]:
    """Every layer with an A or a B, sorted by name, numbers in it as numbers.

    Raises ValueError where a factor is there twice, with PEFT's prefix and without it, or by two names.
    """
    found = _sort(tensors)
    layers = []
    for (name, embedding, _), (key_A, key_B) in found.factors.items():
        A, B = tensors.get(key_A), tensors.get(key_B)
        layout, rank_keys = _layout(name, A, B, embedding, rules)
        layout, key_alpha = found.unfit.get(name) or layout, found.alphas.get(name, "") if rules.alphas else ""
        if layout_of(layout) is None:
            layers.append(Stored(name, key_A, key_B, None, layout, key_alpha))
            continue
        pair = LoRAPair(name, tensors[key_A], tensors[key_B], layout)
        scale = float(tensors[key_alpha]) / pair.rank if key_alpha else rules.scale(rank_keys[-1])
        layers.append(Stored(name, key_A, key_B, pair, "", key_alpha, rank_keys, scale))
    named = {name for name, *_ in found.factors}
    layers += [Stored(name, "", "", None, why) for name, why in found.unfit.items() if name not in named]
    return sorted(layers, key=lambda one: [part.zfill(9) if part.isdigit() else part for part in one.name.split(".")])


def _sort(tensors: Mapping[str, Tensor]) -> _Found:
    found = _Found()
    for key in tensors:
        told = parse(key)
        if told is None:
            continue
        if told.mark == "alpha" and tensors[key].numel() == 1:
            found.alphas[told.layer] = key
        elif told.reason:
            found.unfit[told.layer] = shown(told.reason, 60)
        elif told.side is not None:
            factors = found.factors[told.layer, told.embedding, told.adapter]
            if factors[told.side]:
                _fail_twice(told)
            factors[told.side] = key
    return found


def _fail_twice(told: Key) -> None:
    got = f"two, with {PREFIX} before the name and without it, or by two names"
    remedy = "PEFT reads one of them: load the adapter with PeftModel.from_pretrained and save it again."
    fail(f"{shown(told.layer)}, {told.mark}", "one tensor", got, remedy)


def _layout(
    name: str, A: Tensor | None, B: Tensor | None, embedding: bool, rules: Ranks
) -> tuple[str, tuple[str, ...]]:
    """The layout of a `LoRAPair`, or why these are not factors of B A (see `integrations/peft.py`), and the names by
    which PEFT may look up the rank.
    """
    if A is None or B is None:
        return f"{'A' if A is None else 'B'} is missing", ()
    for tensor in (A, B):
        if tensor.dtype not in STORAGE_DTYPES:
            return f"{str(tensor.dtype).removeprefix('torch.')} factors", ()
    if any(pattern in name for pattern in rules.block_diagonal):
        return "block-diagonal factors", ()
    if min(A.dim(), B.dim()) < 2 or min(A.numel(), B.numel()) == 0:
        return "not gathered from ZeRO-3 or FSDP", ()
    rows, columns = A.shape[0], B.shape[1]
    if A.dim() == B.dim() in (3, 4, 5) and rows > columns and rows % columns == 0:
        return "grouped convolution", ()
    if A.dim() != B.dim() or A.dim() > 5 or rows != columns or max(B.shape[2:], default=1) > 1:
        return f"A {tuple(A.shape)} and B {tuple(B.shape)} do not match", ()
    if A.dim() > 2 or embedding:
        return rules.wrong(name, rows) or ("embedding" if embedding else "conv"), (name,)
    experts = rules.experts(name, rows)
    if isinstance(experts, str):
        return experts, ()
    number, rank_keys = experts
    return f"experts({number})" if number > 1 else "linear", rank_keys
