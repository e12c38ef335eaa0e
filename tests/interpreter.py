"""Triton's interpreter, quicker: it is most of the tests' time.

At every call of a device function it looks through `triton.language` for what is to be patched, which the launch or the
first such call has already done: half of an interpreted kernel's time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def patch_once_a_launch() -> None:
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    modules = {id(module) for module in (interpreter.tl, interpreter.tl.core)}
    patched: set[frozenset[int]] = set()

    def patch_once(function: Callable[..., Any]) -> Any:
        seen = frozenset(modules.intersection(map(id, function.__globals__.values())))
        if seen in patched:
            return None  # only a launch looks at what comes back, and a launch is the first
        patched.add(seen)
        return patch(function)

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()  # the last launch has taken its patches back
        launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_anew
