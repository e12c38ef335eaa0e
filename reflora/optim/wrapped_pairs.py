"""The pairs that a wrapped optimizer steps, including those added or replaced later, and warnings about the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from ..checks import fail
from ..diagnostics import Diagnostics
from ..pairs import LoRAPair, as_pairs
from .membership import HALVED, LONE, NOWHERE, check_whole, halved, nowhere, pairs_of_added, say_plain
from .options import check_added, check_like_defaults
from .state import STEPS

if TYPE_CHECKING:
    from .pairs import PairOps
    from .sharded import ShardedOps
    from .units import Units

SKIPS = "reflora_skipped"
DEFAULTS = {"scalar": False, "interval": 1, "warmup_steps": None, "backend": None, "precision": "float64"}
FLATTENED = (
    "Wrappers that flatten or replace parameters (DeepSpeed, FSDP1) leave none to precondition: use DDP or FSDP2, or "
    "for ZeRO-1 and 2 reflora.GradientHooks."
)


class OwnPairs(Optimizer):
    """What Wrapped knows about its pairs and parameters."""

    base: type[Optimizer]
    pairs: list[LoRAPair]
    interval: int
    warmup_steps: int | None
    _skip: Diagnostics | None
    _places: list[tuple[int | None, int | None]]
    _told: set[str]
    _again: Callable[[], list[LoRAPair]] | None
    _built = False
    # the active pairs of the last step that was checked
    _looked: list[bool] | None = None
    if TYPE_CHECKING:

        @property
        def _gentle(self) -> bool: ...

        @property
        def _units(self) -> Units: ...

        @property
        def _ops(self) -> PairOps | ShardedOps: ...

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As RefLoRAAdamW's."""
        if not self._built:  # the base class's own constructor
            return super().add_param_group(param_group)
        param_group = dict(param_group)
        given = param_group.pop("pairs", ())
        check_added(param_group, (name for name in DEFAULTS if name not in self.defaults))
        check_like_defaults(self.base, {key: value for key, value in param_group.items() if key != "params"})
        super().add_param_group(param_group)
        for key in (STEPS, SKIPS):
            self.param_groups[-1][key] = self.param_groups[0].get(key, 0)
        self._take_in(pairs_of_added(self, given, sharded=True))

    def _take_in(self, further: list[LoRAPair]) -> None:
        if further:
            self.pairs = [*self.pairs, *further]
            place = {param: number for number, param in enumerate(self._params())}
            self._places = [(place.get(pair.A), place.get(pair.B)) for pair in self.pairs]
            self.__dict__.pop("_ops", None)

    def _say_plain(self, active: list[bool]) -> None:
        """Warn once about pairs with only one factor stepped, and about those with only one gradient or no factor."""
        if all(active) or active == self._looked or self._told >= {HALVED, LONE, NOWHERE}:
            return
        self._looked = active
        owned = set(self._params())
        halves = halved(self.pairs, owned)
        graded = {t for pair in self.pairs for t in (pair.A, pair.B) if t in owned and t.grad is not None}
        lone = [name for name in halved(self.pairs, graded) if name not in halves]
        for why, names in ((HALVED, halves), (LONE, lone), (NOWHERE, nowhere(self.pairs, owned))):
            if names and why not in self._told:
                self._told.add(why)
                say_plain(names, why, stacklevel=5)

    def _active(self) -> list[bool]:
        """By pair, whether this optimizer steps both factors and both have a gradient.

        Raises RuntimeError where it steps no pair whole.
        """
        owned = set(self._params())
        whole = [pair.A in owned and pair.B in owned for pair in self.pairs]
        if self.pairs and not any(whole):
            check_whole(halved(self.pairs, owned))
            fail("param_groups", "the factors of the pairs among them", "none of them", FLATTENED, RuntimeError)
        return [on and p.A.grad is not None and p.B.grad is not None for on, p in zip(whole, self.pairs)]

    def _follow(self) -> None:
        """Adopt what has replaced the factors: accelerate shards a model and swaps its parameters one by one."""
        params = self._params()
        owned = set(params)
        if all(pair.A in owned and pair.B in owned for pair in self.pairs):
            return
        pairs = []
        for pair, places in zip(self.pairs, self._places):
            now = [params[place] for place in places if place is not None and place < len(params)]
            swapped = len(now) == 2 and [t.shape for t in now] == [pair.A.shape, pair.B.shape]
            gone = pair.A not in owned and pair.B not in owned
            pairs.append(LoRAPair(pair.name, now[0], now[1], pair.layout) if swapped and gone else pair)
        if any(new is not old for new, old in zip(pairs, self.pairs)):
            self.pairs = as_pairs(pairs, sharded=True)
            self.__dict__.pop("_ops", None)

    def _params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]
