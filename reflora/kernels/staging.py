"""Tables of the host on the device: copied when they change, without a wait, and safe inside a captured CUDA graph."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import fail

CAPTURE_REMEDY = "Take a step outside the graph before each capture."


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`, without a wait. RuntimeError while a stream is captured into a graph."""
    if device.type == "cpu":
        return tensor
    if torch.cuda.is_current_stream_capturing():
        # page-locked memory cannot be had then
        fail("CUDA graph capture", "a step taken since the last capture", "none", CAPTURE_REMEDY, RuntimeError)
    # the caching host allocator holds a pinned block back until the copies that read it are done
    return tensor.pin_memory().to(device, non_blocking=True)


def int_table(values: Sequence[object], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of the host on `device`, without a wait."""
    return to_device(torch.tensor(values, dtype=dtype, device="cpu"), device)


def current_stream(device: torch.device) -> Any:
    """The stream that is launched on, None on a CPU."""
    return None if device.type == "cpu" else torch.cuda.current_stream(device)


def hold(tensors: Iterable[Tensor], made_on: Any, device: torch.device) -> None:
    """The memory of tensors that another stream than `made_on` reads is not handed on before it has."""
    stream = current_stream(device)
    if stream != made_on:
        for tensor in tensors:
            tensor.record_stream(stream)


def pinned_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, pin_memory=True)


class OnDevice:
    """One table of the host on its device, sent again only when its values have changed.

    What a graph was captured with stays alive with this object and is never written again: a replay reads the same
    table, and copies it again from a pinned buffer of its own where the capture had to send it.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._seen: Tensor | None = None
        self._copy: Tensor | None = None
        self._stream: Any = None
        self._spare: Tensor | None = None
        self._captured: list[Tensor] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cpu":
            return tensor.contiguous()
        current = self._copy is not None and self._seen is not None and torch.equal(self._seen, tensor)
        if torch.cuda.is_current_stream_capturing():
            return self._captured_copy(tensor, current)
        if not current:
            self._copy, self._seen = to_device(tensor, self.device), tensor.clone()
            self._stream = current_stream(self.device)
        if self._spare is None or self._spare.shape != tensor.shape:
            # page-locked memory cannot be had while a stream is captured
            self._spare = pinned_like(tensor)
        assert self._copy is not None
        hold([self._copy], self._stream, self.device)
        return self._copy

    def _captured_copy(self, tensor: Tensor, current: bool) -> Tensor:
        if current and self._copy is not None:
            copy = self._copy
        else:
            spare, self._spare = self._spare, None
            if spare is None or spare.shape != tensor.shape:
                fail("CUDA graph capture", "a step taken since the last capture", "none", CAPTURE_REMEDY, RuntimeError)
            spare.copy_(tensor)
            self._captured.append(spare)
            # recorded, not run: what is seen outside the graph stays as it was
            copy = spare.to(self.device, non_blocking=True)
        if not any(copy is kept for kept in self._captured):
            self._captured.append(copy)
        return copy
