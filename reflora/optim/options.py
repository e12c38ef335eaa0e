"""Checks of options against their groups, pairs and class."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

from torch import Tensor

from ..checks import check_flags, check_number, fail, typed
from ..pairs import LoRAPair


def short(value: object) -> str:
    """An option's value in a message, without the tensors of a list of pairs."""
    return repr(value) if isinstance(value, (Real, str, type(None))) else f"a {type(value).__name__}"


def check_like_defaults(cls: type, options: Mapping[str, Any]) -> None:
    """Options of another optimizer class have the types of its defaults, where these are numbers or flags."""
    defaults = _defaults_of(cls)
    for name, value in options.items():
        default = defaults.get(name)
        if isinstance(default, bool):
            check_flags({name: value})
        elif isinstance(default, Real) or (name == "lr" and (value is not None or name not in defaults)):
            check_number(name, value)
        elif isinstance(default, tuple):
            if not isinstance(value, (tuple, list)) or len(value) != len(default):
                fail(name, f"{len(default)} values", typed(value), f"The defaults are {default}.", TypeError)
            for entry, like in zip(value, default):
                if isinstance(like, Real) and entry is not None:
                    check_number(name, entry)
        if name == "lr" and on_host(value) and not 0 <= float(value) < math.inf:
            fail("lr", "a finite number >= 0", value, "Use maximize=True for ascent.")


def on_host(value: Any) -> bool:
    """Whether it is a number that can be read without a sync."""
    return isinstance(value, Real) or (isinstance(value, Tensor) and value.device.type == "cpu")


@functools.cache
def _defaults_of(cls: type) -> dict[str, Any]:
    parameters = inspect.signature(cls).parameters.values()
    return {one.name: one.default for one in parameters if one.default is not inspect.Parameter.empty}


def check_group_options(groups: Sequence[dict[str, Any]], own: Mapping[str, Any]) -> None:
    """No group holds one of these options of the whole optimizer, unless with the very same value.

    SAM and ZeroRedundancyOptimizer leave the options that they pass on in the groups; those are taken out.
    """
    for number, group in enumerate(groups):
        for name in own:
            if name in group and group[name] is not own[name]:
                remedy = "Pass it to the optimizer itself; further pairs go to add_param_group."
                fail(f"parameter group {number}", f"no {name!r}", short(group[name]), remedy)
    for group in groups:
        for name in own:
            group.pop(name, None)


def check_added(group: Mapping[str, Any], names: Iterable[str]) -> None:
    """A group added later holds none of these options of the whole optimizer."""
    for name in names:
        if name in group:
            remedy = "It is an option of the whole optimizer: pass it to the constructor."
            fail("add_param_group", f"no {name!r}", short(group[name]), remedy)


def check_owned(groups: Sequence[dict[str, Any]], pairs: Sequence[LoRAPair]) -> None:
    """Groups hold at least one factor of the pairs, if there are any."""
    owned = {id(p) for group in groups for p in group["params"]}
    if pairs and not any(id(t) in owned for pair in pairs for t in (pair.A, pair.B)):
        remedy = "Find the pairs in the model whose parameters these are."
        fail("pairs", "factors that are among the parameters", f"{len(pairs)} pairs of other tensors", remedy)
