"""Packages that no benchmark uses, but that peft and transformers import wherever they are installed."""

from __future__ import annotations

import sys

NAMES = ("torchao", "bitsandbytes", "deepspeed")


def leave_out() -> None:
    """For a process of a program's own, before it imports anything: None in `sys.modules` reads as not installed.

    It saves their imports, the request that bitsandbytes makes to the hub, and what they warn about.
    """
    for name in NAMES:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
