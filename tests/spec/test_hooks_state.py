"""GradientHooks that nobody refreshes, and states that are not theirs."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from refusals import OF_ARGUMENTS, refused
from test_hooks import adamw, build, train

import reflora


@pytest.mark.parametrize("accumulated", [1, 4])
def test_without_a_refresh_it_is_said_once(accumulated: int) -> None:
    model = build()
    hooks = reflora.GradientHooks(model)
    optimizer = adamw(model)
    x = torch.randn(4, 24)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(8 * accumulated):
            (model(x).square().mean() / accumulated).backward()
            if step % accumulated == accumulated - 1:
                optimizer.step()
                optimizer.zero_grad()
    said = [str(one.message) for one in caught if "refresh()" in str(one.message)]
    assert len(said) == 1 and len(said[0]) < 300
    assert hooks.diagnostics().names


@pytest.mark.parametrize("accumulated", [1, 5])
def test_with_a_refresh_nothing_is_said(accumulated: int) -> None:
    model = build()
    hooks = reflora.GradientHooks(model)
    optimizer = adamw(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            for _ in range(accumulated):
                model(torch.randn(4, 24)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            hooks.refresh()


def wrong_states(state: dict[str, torch.Tensor]) -> dict[str, tuple[Any, str]]:
    first, last = list(state)[0], list(state)[-1]
    without = {name: value for name, value in state.items() if name != last}
    return {
        "a list": (list(state.values()), "expected a dictionary of layers, got list"),
        "None": (None, "expected a dictionary of layers, got NoneType"),
        "the last missing": (without, f"missing {last}; others none"),
        "another": ({**state, "other": state[first]}, "missing none; others other"),
        "one dimension": ({**state, first: state[first][0]}, r"expected \[1, 4\], got \[4\]"),
        "two experts": ({**state, first: state[first].repeat(2, 1)}, r"expected \[1, 4\], got \[2, 4\]"),
        "five columns": ({**state, first: torch.zeros(1, 5)}, r"expected \[1, 4\], got \[1, 5\]"),
        "a list of numbers": ({**state, first: [1.0] * 4}, r"expected a tensor \[1, 4\], got list"),
        "NaN": ({**state, first: state[first] * torch.nan}, "expected finite numbers, got inf or nan"),
    }


@pytest.mark.parametrize("name", wrong_states({"a": torch.zeros(1, 4), "b": torch.zeros(1, 4)}))
def test_a_state_that_is_not_theirs_is_refused_and_changes_nothing(name: str) -> None:
    model = build()
    hooks = reflora.GradientHooks(model)
    train(model, adamw(model), range(3), hooks)
    before = copy.deepcopy(hooks.state_dict())
    given, said = wrong_states(before)[name]
    with refused(said, error=OF_ARGUMENTS):
        hooks.load_state_dict(given)
    assert all(torch.equal(value, before[key]) for key, value in hooks.state_dict().items())


def test_a_load_whose_refresh_fails_leaves_the_last_state(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    hooks = reflora.GradientHooks(model)
    train(model, adamw(model), range(3), hooks)
    before, matrices = copy.deepcopy(hooks.state_dict()), hooks._matrices

    def failing(*args: Any, **kwargs: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(hooks._ops, "solve", failing)
        with pytest.raises(MemoryError):
            hooks.load_state_dict({name: value * 2 for name, value in before.items()})
    assert all(torch.equal(value, before[key]) for key, value in hooks.state_dict().items())
    assert hooks._matrices is matrices
