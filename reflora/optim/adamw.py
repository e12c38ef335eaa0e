"""RefLoRAAdamW: AdamW whose LoRA pairs take the step of the optimally refactored pair, in one fused call per device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..checks import check_schedule
from ..pairs import PairLike
from .paired import PairedAdamW
from .step import AdamWOptions


class RefLoRAAdamW(PairedAdamW):
    """AdamW (decoupled weight decay) with RefLoRA preconditioning of LoRA pairs (arXiv 2505.18877).

    A layer with a non-finite gradient or factor is skipped, its state untouched, and counted in `diagnostics()`.
    State per parameter is torch.optim.AdamW's; the state_dict also holds whatever else a resumed run needs.

    Args:
        params: What torch optimizers take (parameters, groups, named parameters), or a bare list of pairs.
        pairs: The LoRA pairs among them, as LoRAPair or `(A [r, n_in], B [n_out, r])`, such as
            `reflora.find_pairs(model)`. A and B may sit in different groups. Parameters in no pair, and pairs where
            only one factor has a gradient, get plain AdamW.
        lr: Learning rate; a tensor on the device where a CUDA graph or torch.compile must follow a scheduler.
        betas: Decay of the first and second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled, as torch.optim.AdamW's.
        amsgrad: As torch.optim.AdamW's.
        maximize: As torch.optim.AdamW's.
        scalar: RefLoRA-S, the scalar refactoring after every step (Theorem 5), instead of S (Theorem 3).
        interval: Recompute S every `interval` steps and reuse it in between.
        warmup_steps: None phases S in gradually, layer by layer: after n steps of a layer its Grams count in S with the
            weight `n^2 / (n^2 + 400^2)`, a multiple of I with the rest. From B = 0 the exact S would keep B near rank
            one, which is what Adam's first step gives it. A number takes that many first steps with S = I, then the
            exact S, as published; 0 is the exact S from the first step, `10**9` is AdamW itself. With scalar=True, None
            leaves a layer alone until the smaller of ||A|| and ||B|| has caught up with the other. Where n_out < n_in
            or the rate is low that may never happen: such a layer stays plain LoRA and counts as
            `diagnostics().inactive`.
        backend: None (the fastest that can serve the device), "triton", "cpp" or "torch".
        precision: Of Grams and solve: "float64" or, faster on GPUs with slow float64, "float32".
        carry_grams: Keep the factors' Grams from one step to the next, which saves one read of the factors (4 of 36
            bytes per float32 parameter; on a GPU up to r = 32). Writes that bump `_version` are noticed; after one that
            does not, through `.data`, raw memory or torch's own fused optimizers, call `invalidate()`. Without
            effect under torch.compile, while a CUDA graph is captured, and after.
        check_grads: Skip a layer whose gradient is not finite, which costs one more read of it. With False, and under
            a GradScaler, which has checked already, a NaN or inf may spread over its column (the r entries that S
            mixes): NaN then counts as 0, infinity as the largest number that can be squared.
        state_dtype: torch.float32 keeps the moments of 16-bit factors in float32; None, like torch, in the factor's
            dtype.
        master_weights: float32 copies of 16-bit factors (state "master"), with moments in float32.
        stochastic_rounding: bfloat16 factors of pairs are rounded up or down with the probability that makes the mean
            exact. Reproducible: the seed is drawn from torch's generator here and kept in the param_groups.
        foreach: Accepted for compatibility with torch; ignored.
        fused: The step is always fused. False, as in torch, makes a GradScaler unscale the gradients before the step,
            which Lightning's clipping under fp16 requires.
        capturable: Accepted for compatibility with torch. With Triton and r <= 128 a step can be captured in a CUDA
            graph, after one outside it (two with carry_grams). Capture again after load_state_dict, add_param_group or
            moving the model.
        differentiable: True is refused.

    Raises:
        ValueError: Pairs or options that are not supported.
        TypeError: Pairs or options of a wrong type.
        RuntimeError: The backend cannot serve the device, with the reason.
    """

    scalar: bool
    interval: int
    warmup_steps: int | None
    check_grads: bool

    OWN = ("scalar", "interval", "warmup_steps", "precision", "carry_grams", "check_grads")

    def __init__(
        self,
        params: Iterable[Any],
        pairs: Iterable[PairLike] | None = None,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        amsgrad: bool = False,
        maximize: bool = False,
        scalar: bool = False,
        interval: int = 1,
        warmup_steps: int | None = None,
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
        check_schedule(interval, warmup_steps)
        own = {
            "scalar": scalar, "interval": interval, "warmup_steps": warmup_steps, "backend": backend,
            "precision": precision, "carry_grams": carry_grams, "check_grads": check_grads,
            "state_dtype": state_dtype, "master_weights": master_weights, "stochastic_rounding": stochastic_rounding,
        }  # fmt: skip
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad,
            "maximize": maximize, "foreach": foreach, "capturable": capturable, "fused": fused,
        }  # fmt: skip
        self._build(params, pairs, defaults, own, differentiable)

    @property
    def options(self) -> AdamWOptions:
        return AdamWOptions(
            self.precision, self.carry_grams, self.check_grads, self.storage, self.scalar, self.interval,
            self.warmup_steps,
        )  # fmt: skip
