"""s = ||B|| / ||A|| at the ends of what it can be applied in: every backend decides alike."""

import itertools

import pytest
import torch

from reflora import RefLoRAAdamW, precondition_, refactor_
from reflora.columns import DEGENERATE, REFACTORED

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def ends(dtype):
    """Pairs [r, 1], [1, r] whose s and 1 / s lie on either side of the ends of the range."""
    info, apply = torch.finfo(dtype), torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
    sizes = [info.max, info.max / 4, 1.0, 1.5, info.tiny, info.tiny * 4, info.smallest_normal * info.eps]
    for s in (apply.tiny, 1 / apply.tiny, apply.max, 1 / apply.max):
        for near in (0.9999, 1.0001, 3.0):
            root = (s * near) ** 0.5
            sizes += [root, 1 / root] if root else []
    within = sorted({float(torch.tensor(x, dtype=torch.float64).to(dtype)) for x in sizes if x <= info.max} - {0.0})
    for a, b in itertools.product(within, within):
        yield torch.tensor([[a], [0.0]], dtype=dtype), torch.tensor([[b, 0.0]], dtype=dtype)
        # only Triton has a norm of float64 that is not in its normal range
        if info.tiny <= min(a, b) and max(a, b) < info.max / 2:
            yield torch.tensor([[a], [a]], dtype=dtype), torch.tensor([[b, b]], dtype=dtype)


def outcomes(backend, dtype, call):
    pairs = list(ends(dtype))
    grads = [(torch.ones_like(A), torch.ones_like(B)) for A, B in pairs]
    if call == "refactor_":
        found = refactor_(pairs, scalar=True, backend=backend)
    elif call == "adamw":
        for pair, sides in zip(pairs, grads):
            for factor, grad in zip(pair, sides):
                factor.requires_grad_().grad = grad * 0
        optimizer = RefLoRAAdamW(pairs, lr=1e-3, weight_decay=0.0, scalar=True, warmup_steps=0, backend=backend)
        optimizer.step()
        found = optimizer.diagnostics()
    else:
        found = precondition_(pairs, grads, scalar=call == "scalar", backend=backend)
    values = [t.detach() for pair, sides in zip(pairs, grads) for t in (*pair, *sides)]
    return found, torch.cat([value.flatten() for value in values]).double()


@pytest.mark.parametrize("call", ["refactor_", "scalar", "full", "adamw"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_backend_decides_alike(backend, dtype, call):
    if backend == "torch":
        pytest.skip("the others are compared with it")
    (found, values), (wanted, expected) = outcomes(backend, dtype, call), outcomes("torch", dtype, call)
    assert found.status.tolist() == wanted.status.tolist()
    torch.testing.assert_close(found.scale, wanted.scale, rtol=1e-12, atol=0)
    if call in ("refactor_", "scalar"):
        torch.testing.assert_close(values, expected, rtol=4 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).tiny)


def test_s_whose_inverse_is_subnormal(backend):
    A, B = torch.tensor([[1e-19]]), torch.tensor([[2.5e19]])
    found = refactor_([(A, B), (torch.tensor([[1e-19]]), torch.tensor([[2.5e18]]))], scalar=True, backend=backend)
    assert found.status.tolist() == [DEGENERATE, REFACTORED]
    assert torch.equal(A, torch.tensor([[1e-19]])) and float(found.scale[0]) == 1
