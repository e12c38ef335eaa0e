"""The numbers of reflora/columns.py as compile-time constants."""

import triton.language as tl

from ..columns import NUMBERS

globals().update({name: tl.constexpr(number) for name, number in NUMBERS.items()})
