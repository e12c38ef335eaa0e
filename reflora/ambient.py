"""Arithmetic is the same wherever it is called: what a caller has set around it does not reach in.

Default dtype and default device need nothing here: every tensor that the package makes names both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

_DEVICES = ("cpu", "cuda")
_PRODUCTS: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
_EXACT = ("none", "ieee")


@contextmanager
def independent() -> Iterator[None]:
    """Without autocast, without inference mode, and with products of float32 matrices in float32.

    The last is a switch of the whole process: while a step runs, other threads' products are not TF32 or bfloat16
    either.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            # state that is made in it could not be written outside
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        for products in _PRODUCTS:
            if products.fp32_precision not in _EXACT:
                stack.callback(setattr, products, "fp32_precision", products.fp32_precision)
                products.fp32_precision = "ieee"
        yield
