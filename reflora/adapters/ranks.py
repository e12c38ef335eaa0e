"""The ranks and alphas of an adapter, written where its reader looks for them."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..checks import fail
from .adapter import Adapter
from .alone import METADATA, Alone, configs, read_alone
from .rules import Rules, read_rules, shown
from .stored import Stored, read_stored

T = TypeVar("T")
# starts whose own options mean nothing once the factors are others
START_OPTIONS = ("eva_config", "corda_config", "lora_ga_config")


@dataclass(frozen=True)
class Beside:
    """What goes with the factors: tensors of alpha, PEFT's configuration (None for a file that has none) and the file's
    metadata.
    """

    alphas: dict[str, Tensor]
    config: dict[str, Any] | None
    metadata: dict[str, str] | None

    def check(self, tensors: Mapping[str, Tensor], adapter: Adapter, ranks: Mapping[str, int]) -> None:
        """Raises ValueError unless a reader of these tensors finds every pair, at its rank and its old scale."""
        where = shown(adapter.weights)
        rules = read_alone(self.metadata, where) if self.config is None else read_rules(self.config, where)
        found = {one.name: one for one in read_stored(tensors, rules) if one.pair}
        for one in adapter.stored:
            if one.pair is None:
                continue
            new = found.get(one.name)
            fits = new and new.pair and (new.pair.rank, new.pair.layout) == (ranks[one.name], one.pair.layout)
            if not fits or not math.isclose(new.scale, one.scale, rel_tol=1e-6):  # type: ignore[union-attr]
                got = "other layers whose names a pattern cannot tell from it"
                fail(shown(one.name), f"rank {ranks[one.name]} for this layer alone", got, "Pass another rank.")


def with_ranks(adapter: Adapter, ranks: Mapping[str, int]) -> Beside:
    """What goes with factors of these ranks, so that each layer keeps its scale.

    ranks: Name of each layer with a pair -> its new rank.
    """
    alphas = {
        one.key_alpha: _alpha(adapter.tensors[one.key_alpha], one.scale * ranks[one.name])
        for one in adapter.stored
        if one.pair and one.key_alpha
    }
    metadata = dict(adapter.metadata) if adapter.metadata else None
    if isinstance(adapter.rules, Rules):
        assert adapter.config is not None
        return Beside(alphas, configured(adapter.config, adapter.rules, adapter.stored, ranks), metadata)
    if metadata:
        _rewrite(metadata, adapter, ranks)
    return Beside(alphas, None, metadata)


def configured(
    config: Mapping[str, Any], rules: Rules, stored: list[Stored], ranks: Mapping[str, int]
) -> dict[str, Any]:
    """PEFT's configuration with the new ranks: r and lora_alpha of most layers, and patterns for the others.

    A layer that is left as it is keeps its rank; a start other than the default is forgotten, as these factors are
    none.
    """
    wanted: dict[str, tuple[int, float]] = {}
    for one in stored:
        if one.pair:
            rank = ranks[one.name]
            wanted.update({key: (rank, _plain(rules.scale(key) * rules.divisor(rank))) for key in one.rank_keys})
        else:
            for key in sum(rules.keys(one.name), []):
                wanted.setdefault(key, (rules.rank(key), _plain(rules.alpha(key))))
    changed = {**config, **patterns(wanted), "init_lora_weights": True}
    return changed | {name: None for name in START_OPTIONS if changed.get(name)}


def patterns(wanted: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """r and lora_alpha of most of these names, and rank_pattern and alpha_pattern for the others.

    wanted: The name of a layer -> its rank and alpha.
    """
    (r, alpha), _ = Counter(wanted.values()).most_common(1)[0]
    return {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": _pattern({name: rank for name, (rank, _) in wanted.items()}, r),
        "alpha_pattern": _pattern({name: alpha for name, (_, alpha) in wanted.items()}, alpha),
    }


def _pattern(wanted: Mapping[str, T], default: T) -> dict[str, T]:
    """Names whose value is not the default one, and those that end with such a name: PEFT takes the first that matches
    the end of a layer's.
    """
    others = {name for name, value in wanted.items() if value != default}
    others |= {name for name in wanted if any(name.endswith(f".{other}") for other in others)}
    return {name: wanted[name] for name in sorted(others, key=lambda name: (-len(name), name))}


def _plain(alpha: float) -> float:
    """As an integer where it is one."""
    near = round(alpha)
    return near if math.isclose(alpha, near, rel_tol=1e-12) else alpha


def _alpha(old: Tensor, alpha: float) -> Tensor:
    """In the dtype of the old one where that holds it, else in float32."""
    new = torch.full_like(old, alpha)
    held = math.isclose(float(new), alpha, rel_tol=1e-7)
    return new if held else torch.full_like(old, alpha, dtype=torch.float32)


def _rewrite(metadata: dict[str, str], adapter: Adapter, ranks: Mapping[str, int]) -> None:
    """What kohya's scripts and diffusers write about ranks; hashes of the old tensors are removed."""
    for key in [key for key in metadata if key.startswith("sshs_")]:
        del metadata[key]
    sound = [one for one in adapter.stored if one.pair]
    ranks_set, alphas = {ranks[one.name] for one in sound}, {_plain(one.scale * ranks[one.name]) for one in sound}
    for key, values in (("ss_network_dim", ranks_set), ("ss_network_alpha", alphas)):
        if key in metadata:
            metadata[key] = str(next(iter(values))) if len(values) == 1 else "Dynamic"
    if METADATA not in metadata:
        return
    assert isinstance(adapter.rules, Alone)
    flat: dict[str, Any] = {}
    for part, config in configs(metadata[METADATA], shown(adapter.weights)).items():
        rules, own, of_own = adapter.rules.parts[part], [], {}
        for one in adapter.stored:
            found, name = adapter.rules.of(one.name)
            if found is rules:
                own.append(Stored(name, one.key_A, one.key_B, one.pair, rank_keys=(name,), scale=one.scale))
                of_own[name] = ranks.get(one.name, 0)
        changed = configured(config, rules, own, of_own) if own else config
        flat |= {f"{part}.{key}" if part else key: value for key, value in changed.items()}
    metadata[METADATA] = json.dumps(flat, indent=2, sort_keys=True)
