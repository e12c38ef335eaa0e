"""A moment that is NaN or inf, as a damaged checkpoint has, costs its own element, the same on every backend."""

import pytest
import torch

from reflora import RefLoRAAdamW

BAD = (torch.nan, torch.inf, -torch.inf)
NAMES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def run(backend, dtype, name, value, **options):
    """Factors and moments after the two steps that follow on the damage, and which elements it was done to."""
    torch.manual_seed(0)
    A, B = (torch.randn(*shape).to(dtype).requires_grad_() for shape in ((4, 10), (6, 4)))
    optimizer = RefLoRAAdamW([(A, B)], lr=1e-2, backend=backend, amsgrad=name == NAMES[2], **options)
    for step in range(3):
        for t in (A, B):
            t.grad = torch.randn(t.shape).to(dtype)
        if step == 1:
            optimizer.state[A][name][1, 2] = value
            optimizer.state[B][name][3, 1] = value
        optimizer.step()
    names = [n for n in NAMES if n in optimizer.state[A]]
    return [t.detach().double() for p in (A, B) for t in (p, *(optimizer.state[p][n] for n in names))]


@pytest.mark.parametrize("options", [{}, dict(warmup_steps=0), dict(warmup_steps=9), dict(scalar=True, warmup_steps=0)])
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_everything_stays_finite(dtype, name, value, options):
    found, wanted = (run(backend, dtype, name, value, **options) for backend in ("cpp", "torch"))
    tolerance = 2e-2  # at the ends of the range it matters what saturates first
    for one, other in zip(found, wanted, strict=True):
        assert one.isfinite().all() and other.isfinite().all()
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
