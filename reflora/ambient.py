"""Arithmetic is the same wherever it is called: a caller's settings do not reach it.

Default dtype and default device need nothing here: every tensor that the package makes names both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ContextDecorator, contextmanager, nullcontext
from functools import partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor

_DEVICES = ("cpu", "cuda")
# each product, with what it inherits its precision from
_PRODUCTS: tuple[tuple[Any, Any], ...] = (
    (torch.backends.cuda.matmul, torch.backends),
    (torch.backends.mkldnn.matmul, torch.backends.mkldnn),  # type: ignore[attr-defined]
)
_EXACT = ("none", "ieee")


class independent(ContextDecorator):
    """Without autocast, and with products of float32 matrices in float32: `with independent():` or `@independent()`.

    The latter is a process-wide switch: while a step runs, products of other threads use no TF32 or bfloat16 either.
    """

    def __enter__(self) -> None:
        self._autocasts = [torch.autocast(d, enabled=False) for d in _DEVICES if torch.is_autocast_enabled(d)]
        for autocast in self._autocasts:
            autocast.__enter__()
        _exact_products.enter()

    def __exit__(self, *error: Any) -> None:
        _exact_products.leave()
        for autocast in reversed(self._autocasts):
            autocast.__exit__(*error)

    def _recreate_cm(self) -> independent:
        return independent()  # each call has its own


def outside_inference(params: Sequence[Tensor]) -> AbstractContextManager[None]:
    """For making state: a tensor made in inference mode cannot be written outside it.

    Parameters made in inference mode can be written only in it, and so can their state.
    """
    if not torch.is_inference_mode_enabled() or any(param.is_inference() for param in params):
        return nullcontext()
    return _outside_inference()


@contextmanager
def _outside_inference() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


class _ExactProducts:
    """Switched on by the first thread to enter, and back by the last to leave."""

    def __init__(self) -> None:
        self.lock, self.inside = Lock(), 0
        self.back: list[Callable[[], None]] = []

    def enter(self) -> None:
        with self.lock:
            self.inside += 1
            if self.inside == 1:
                self.back = [] if _legacy() == "highest" else _make_exact()

    def leave(self) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                for restore in self.back:
                    restore()


def _make_exact() -> list[Callable[[], None]]:
    """Returns the calls that undo it, unless another precision has been chosen since."""
    reduced = [(own, own.fp32_precision, parent.fp32_precision) for own, parent in _PRODUCTS]
    reduced = [entry for entry in reduced if entry[1] not in _EXACT]
    legacy = _legacy()
    if legacy and all(own != inherited for _, own, inherited in reduced):
        torch.set_float32_matmul_precision("highest")
        return [partial(_restore_legacy, legacy)]
    for own, _, _ in reduced:
        own.fp32_precision = "ieee"
    return [partial(_restore, own, "none" if now == inherited else now) for own, now, inherited in reduced]


def _legacy() -> str:
    """What torch's older functions say; "" where one was set through torch.backends, which they refuse to read."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return ""


def _restore_legacy(precision: str) -> None:
    if all(own.fp32_precision in _EXACT for own, _ in _PRODUCTS):
        torch.set_float32_matmul_precision(precision)


def _restore(own: Any, precision: str) -> None:
    if own.fp32_precision == "ieee":
        own.fp32_precision = precision


_exact_products = _ExactProducts()
