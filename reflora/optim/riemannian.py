"""RiemannianAdamW: AdamW behind PEFT's Riemannian preconditioner, in one fused call per device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..checks import check_reg
from ..pairs import PairLike
from .paired import PairedAdamW
from .step import RiemannianOptions


class RiemannianAdamW(PairedAdamW):
    """AdamW on the gradients `(B^T B + reg I)^-1 gA` and `gB (A A^T + reg I)^-1` (arXiv 2402.02347).

    What `peft.optimizers.create_riemannian_optimizer(model, torch.optim.AdamW, lr=..., reg=...)` gives on linear layers
    and with DoRA, at about the price of an AdamW step. Gradients stay as they are here, a pair of which only one factor
    has a gradient gets plain AdamW, and embeddings, convolutions and experts (each for itself) are preconditioned too:
    PEFT leaves the first two to AdamW, and gives all experts of a layer one Gram. A layer with a non-finite gradient or
    factor is skipped, its state untouched, and counted in `diagnostics()`; one whose Gram with reg is numerically
    singular is degenerate, and gets AdamW on gradients over the trace. State per parameter is torch.optim.AdamW's, and
    RefLoRAAdamW's counts with each A. A state of either is accepted, but its moments are of gradients preconditioned
    otherwise, until they decay.

    Args:
        params: What torch optimizers take (parameters, groups, named parameters), or a bare list of pairs.
        pairs: The LoRA pairs among them, as LoRAPair or `(A [r, n_in], B [n_out, r])`, such as
            `reflora.find_pairs(model)`. A and B may sit in different groups. Parameters in no pair get plain AdamW.
        lr: Learning rate; a tensor on the device where a CUDA graph or torch.compile must follow a scheduler.
        betas: Decay of the first and second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled, as torch.optim.AdamW's.
        reg: Damping, in units of the Grams; PEFT's default.
        amsgrad: As torch.optim.AdamW's.
        maximize: As torch.optim.AdamW's.
        backend: None (the fastest that can serve the device), "triton", "cpp" or "torch".
        precision: Of Grams and solve: "float64" or, faster on GPUs with slow float64, "float32".
        carry_grams: As RefLoRAAdamW's, with `invalidate()`.
        check_grads: As RefLoRAAdamW's.
        state_dtype: torch.float32 keeps the moments of 16-bit factors in float32; None, like torch, in the factor's
            dtype.
        master_weights: float32 copies of 16-bit factors (state "master"), with moments in float32.
        stochastic_rounding: As RefLoRAAdamW's.
        foreach: Accepted for compatibility with torch; ignored.
        fused: As RefLoRAAdamW's.
        capturable: As RefLoRAAdamW's.
        differentiable: True is refused.

    Raises:
        ValueError: Pairs or options that are not supported.
        TypeError: Pairs or options of a wrong type.
        RuntimeError: The backend cannot serve the device, with the reason.
    """

    reg: float
    check_grads: bool

    OWN = ("reg", "precision", "carry_grams", "check_grads")

    def __init__(
        self,
        params: Iterable[Any],
        pairs: Iterable[PairLike] | None = None,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        reg: float = 1e-2,
        amsgrad: bool = False,
        maximize: bool = False,
        backend: str | None = None,
        precision: str = "float64",
        carry_grams: bool = False,
        check_grads: bool = True,
        state_dtype: torch.dtype | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ):
        check_reg(reg)
        own = {
            "reg": float(reg), "backend": backend, "precision": precision, "carry_grams": carry_grams,
            "check_grads": check_grads, "state_dtype": state_dtype, "master_weights": master_weights,
            "stochastic_rounding": stochastic_rounding,
        }  # fmt: skip
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad,
            "maximize": maximize, "foreach": foreach, "capturable": capturable, "fused": fused,
        }  # fmt: skip
        self._build(params, pairs, defaults, own, differentiable)

    @property
    def _by_S(self) -> bool:
        return False

    @property
    def options(self) -> RiemannianOptions:
        return RiemannianOptions(self.precision, self.carry_grams, self.check_grads, self.storage, self.reg)
