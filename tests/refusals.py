"""What is asked of every refusal: one short error, and nothing has changed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from torch import Tensor
from torch.optim import Optimizer

OF_ARGUMENTS = (TypeError, ValueError)


@contextmanager
def unchanged(*tensors: Tensor) -> Iterator[None]:
    before = [t.detach().clone() for t in tensors]
    yield
    assert all(t.detach().equal(old) for t, old in zip(tensors, before))


@contextmanager
def refused(
    message: str, *kept: Tensor, error: type[Exception] | tuple[type[Exception], ...] = OF_ARGUMENTS
) -> Iterator[pytest.ExceptionInfo]:
    """The block ends in an error that matches, in under 300 characters, and leaves these tensors as they were."""
    with unchanged(*kept), pytest.raises(error, match=message) as told:
        yield told
    assert len(str(told.value)) < 300


def each_refused(calls: dict[str, Callable[[], object]], *kept: Tensor) -> None:
    """calls: by the message of their errors."""
    for message, call in calls.items():
        with refused(message, *kept, error=(*OF_ARGUMENTS, RuntimeError)):
            call()


def everything(optimizer: Optimizer) -> list[Tensor]:
    """Parameters and state."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [t for p in params for t in (p, *optimizer.state[p].values())]
