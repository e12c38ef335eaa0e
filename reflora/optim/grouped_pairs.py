"""The pairs that an optimizer steps, including those added later, and warnings about the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..backends import resolve
from ..checks import fail
from ..pairs import LoRAPair
from .adamw_engine import Slot
from .groups import check_amsgrad, check_group
from .membership import HALVED, NOWHERE, check_whole, halved, nowhere, pairs_of_added, say_plain
from .options import check_added
from .state import Storage
from .step import Members

REPLACED = (
    "Something has replaced the parameters. FSDP2: reflora.wrap(torch.optim.AdamW) as optimizer_cls follows them. "
    "DeepSpeed: reflora.GradientHooks. FSDP1 and ZeRO-3 hold no factor whole: use FSDP2 or DDP."
)


class GroupedPairs(Optimizer):
    """What an optimizer knows about its pairs and groups."""

    pairs: list[LoRAPair]
    backend: str | None
    storage: Storage
    _own: tuple[str, ...]
    _told: set[str]
    _again: Callable[[], list[LoRAPair]] | None
    _key: list[tuple[int, ...]] | None
    _members: Members
    _traced_results: Tensor | None
    _make_engines: Callable[[], None]
    _built = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, for parameters added later. Where `pairs=` came from `find_pairs`, the model is searched again
        for LoRA pairs; otherwise list new pairs in the group's entry "pairs".
        """
        if not self._built:  # torch's own constructor
            return super().add_param_group(param_group)
        param_group = dict(param_group)
        given = param_group.pop("pairs", ())
        check_added(param_group, self._own)
        check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        further = pairs_of_added(self, given)
        if self.storage.grams:
            try:
                check_amsgrad(param_group, self.param_groups[-1]["params"], further)
            except ValueError:
                self.param_groups.pop()
                raise
        self._take_in(further)

    def _take_in(self, further: list[LoRAPair]) -> None:
        if further:
            for pair in further:
                resolve(self.backend, pair.A.device)
            self.pairs = [*self.pairs, *further]
            self._key, self._traced_results = None, None
            self._make_engines()

    def _membership(self) -> Members:
        """Which parameters make up pairs; kept until the groups change."""
        key = [tuple(map(id, group["params"])) for group in self.param_groups]
        if key != self._key:
            group_of = {p: i for i, group in enumerate(self.param_groups) for p in group["params"]}
            slots: list[Slot | None] = [
                (group_of[p.A], group_of[p.B]) if p.A in group_of and p.B in group_of else None for p in self.pairs
            ]
            halves = halved(self.pairs, group_of)
            if self.pairs and not any(slots):
                check_whole(halves)
                what = "the factors of the pairs among them"
                fail("param_groups", what, "none of them", REPLACED, RuntimeError)
            for why, names in ((HALVED, halves), (NOWHERE, nowhere(self.pairs, group_of))):
                if names and why not in self._told:
                    self._told.add(why)
                    say_plain(names, why, stacklevel=6)
            paired = {t for pair, slot in zip(self.pairs, slots) if slot for t in (pair.A, pair.B)}
            plain = [[p for p in group["params"] if p not in paired] for group in self.param_groups]
            self._members, self._key = Members(slots, plain), key
        return self._members
