"""What is asked of every refusal: one short error, and nothing has changed."""

import builtins
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from torch import Tensor
from torch.optim import Optimizer

OF_ARGUMENTS = (TypeError, ValueError)  # whichever of them


@contextmanager
def unchanged(*tensors: Tensor, of: Optimizer | None = None) -> Iterator[None]:
    """The block leaves these tensors as they were, and parameters and state `of` an optimizer."""

    def held() -> list[Tensor]:
        return [*tensors, *(everything(of) if of else ())]

    before = [t.detach().clone() for t in held()]
    yield
    assert all(t.detach().equal(old) for t, old in zip(held(), before, strict=True))


@contextmanager
def refused(
    message: str, *kept: Tensor, of: Optimizer | None = None, error: type[Exception] | tuple = ValueError
) -> Iterator[pytest.ExceptionInfo]:
    """The block ends in an error that matches, in under 300 characters, and all is `unchanged`."""
    with unchanged(*kept, of=of), pytest.raises(error, match=message) as told:
        yield told
    assert len(str(told.value)) < 300


def each_refused(calls: dict[str, Callable[[], object]], *kept: Tensor) -> None:
    """calls: by their errors, as `TypeError: V0: expected a tensor`."""
    for named, call in calls.items():
        kind, message = named.split(": ", 1)
        with refused(message, *kept, error=getattr(builtins, kind)):
            call()


def everything(optimizer: Optimizer) -> list[Tensor]:
    """Parameters and state."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [t for p in params for t in (p, *optimizer.state.get(p, {}).values())]
