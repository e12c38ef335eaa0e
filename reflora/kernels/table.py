"""The columns of reflora/plan.py and the statuses of reflora/constants.py as compile-time constants."""

import triton.language as tl

from .. import constants, plan

_STATUSES = ("REFACTORED", "DEGENERATE", "SKIPPED", "PLAIN")
_COLUMNS = {name: value for name, value in vars(plan).items() if name.isupper() and isinstance(value, int)}

globals().update(
    {
        name: tl.constexpr(value)
        for name, value in (*_COLUMNS.items(), *((name, getattr(constants, name)) for name in _STATUSES))
    }
)
