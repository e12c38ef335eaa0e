"""How far a rewritten layer has moved, by PEFT's own arithmetic: nothing here goes through `LoRAPair`'s views."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

PROBES = 8
CONVOLUTIONS = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}


def moved(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], experts: int) -> float:
    """The change of the layer's effect on random inputs, relative to the effect, in its worst expert; NaN on
    overflow. The factors (A, B) as they are stored, in float64.
    """
    before = _effect(*old, experts, _probes(old[0]))
    after = _effect(*new, experts, _probes(old[0]))
    apart, size = ((t.flatten(1) if experts > 1 else t.flatten()).norm(dim=-1) for t in (after - before, before))
    return float(torch.where(apart == 0, apart, apart / size).max())


def allowed(A: Tensor, B: Tensor, rank: int) -> float:
    """How far rounding to the dtypes of A and B may move B A, where `A A^T = B^T B`: then `||A|| ||B||` is the nuclear
    norm of B A, at most sqrt(r) times its Frobenius norm. The floor is for float64, where S itself is inexact: by
    3e-11 at most, at condition 3e5.
    """
    eps = max(torch.finfo(t.dtype).eps for t in (A, B))
    return max(2 * eps * math.sqrt(rank), 1e-9)


def _probes(A: Tensor) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    shape = A.shape[1:] if A.dim() > 2 else A.shape[-1:]
    return torch.randn(PROBES, *shape, generator=generator, dtype=torch.float64, device="cpu")


def _effect(A: Tensor, B: Tensor, experts: int, x: Tensor) -> Tensor:
    """`lora_B(lora_A(x))` of lora.Linear, Embedding and the convolutions, or of ParamWrapper.get_delta_weight:
    `[experts, probes, n_out]` for experts, otherwise one output per probe.
    """
    if A.dim() > 2:
        convolution = CONVOLUTIONS[A.dim()]
        return convolution(convolution(x, A), B)
    if experts == 1:
        return functional.linear(functional.linear(x, A), B)
    weight_A = A.reshape(experts, -1, A.shape[-1])
    weight_B = B.reshape(B.shape[0], -1, experts)
    return torch.einsum("o r e, e r b -> e b o", weight_B, torch.einsum("e r i, b i -> e r b", weight_A, x))
