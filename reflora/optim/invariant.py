"""InvariantAdamW: momentum whitened by r x r second moments in the frame of a metric, in one fused call per device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..checks import check_whitening
from ..pairs import PairLike
from .paired import PairedAdamW
from .state import grams_of
from .step import InvariantOptions


class InvariantAdamW(PairedAdamW):
    """AdamW for LoRA pairs whose step of the product B A is the same for every pair of full rank with that product.

    With mA, mB the means of the gradients, V_A and V_B `[r, r]` those of `gA gA^T / n_in` and `gB^T gB / n_out`, and a
    metric M of each factor, a step is

        dB = -lr mB (M_B # V_B^-1),    dA = -lr (M_A # V_A^-1) mA,

    where # is the geometric mean: the momentum, whitened in the frame in which the metric is I. All moments are of raw
    gradients in the axes of A and B, and the step turns with these: (Q^T A, B Q^-T) moves B A as (A, B) does, for any
    invertible Q (with metric="identity" for orthogonal Q) that leaves both factors of full numerical rank. From B = 0
    the first step has full stable rank, if singular values of the gradient in the frame are less than about 100 apart;
    past `damping`, small ones stay small.

    State per factor: `exp_avg` like the factor, `exp_avg_gram` `[r, r]` (experts: `[E, r, r]`) in float64, `step`:
    half of AdamW's where r is small beside n. It loads the state of a torch.optim.AdamW too, whose second moments it
    averages over rows of A and columns of B. A layer with a non-finite gradient (without carry_grams) or factor is
    skipped, its state untouched, and counted in `diagnostics()`.

    Args:
        params: What torch optimizers take (parameters, groups, named parameters), or a bare list of pairs.
        pairs: The LoRA pairs among them, as LoRAPair or `(A [r, n_in], B [n_out, r])`, such as
            `reflora.find_pairs(model)`. A and B may sit in different groups. Parameters in no pair, and pairs where
            only one factor has a gradient, get plain AdamW.
        lr: Learning rate; a tensor on the device where a CUDA graph or torch.compile must follow a scheduler.
        betas: Decay of the first and second moment.
        eps: Added, squared, to the second moment in the frame.
        weight_decay: Decoupled, as torch.optim.AdamW's.
        metric: "reflora": S for B and S^-1 for A, the balanced frame of RefLoRA (arXiv 2505.18877). "scaled":
            `(A A^T)^-1` for B and `(B^T B)^-1` for A, that of ScaledGD and of LoRA-RITE (arXiv 2410.20625), whose
            update this is, whitened after averaging, without its QR, transport of moments, skipping and clipping.
            "identity": I, one-sided Shampoo.
        moments: "gradients" for V as above. "momentum" puts the Gram of the mean gradient in its place, which makes all
            singular values of a step equal in the frame, up to damping: spectral descent, with "scaled" LoRA-Muon
            (arXiv 2606.12921). It keeps `gram_of_exp_avg` in place of `exp_avg_gram`, and loads state with either.
        damping: Added to the second moment in the frame, times its mean eigenvalue.
        maximize: As torch.optim.AdamW's.
        backend: None (the fastest that can serve the device), "triton", "cpp" or "torch".
        precision: Of Grams and solve: "float64" or, faster on GPUs with slow float64, "float32".
        carry_grams: One pass over factors and gradients in place of two (20 bytes per float32 parameter, not 28; on a
            GPU up to r = 32, with Grams in float64), with the Grams that the last step left: V is a step late, but for
            the first. After equal gradients one that is x times as large moves a factor `1 + (1 - beta1) (x - 1)` times
            as far, so clip gradients. Where an element of a gradient is not finite its mean stays, and V; the layer is
            stepped, but counted as skipped. `invalidate()`, as RefLoRAAdamW's.
        state_dtype: torch.float32 keeps the mean gradients of 16-bit factors in float32; None, like torch, in the
            factor's dtype.
        master_weights: float32 copies of 16-bit factors (state "master"), with mean gradients in float32.
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

    metric: str
    moments: str
    damping: float

    OWN = ("metric", "moments", "damping", "precision", "carry_grams")

    def __init__(
        self,
        params: Iterable[Any],
        pairs: Iterable[PairLike] | None = None,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        metric: str = "reflora",
        moments: str = "gradients",
        damping: float = 1e-4,
        maximize: bool = False,
        backend: str | None = None,
        precision: str = "float64",
        carry_grams: bool = False,
        state_dtype: torch.dtype | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ):
        check_whitening(metric, moments, damping)
        own = {
            "metric": metric, "moments": moments, "damping": float(damping), "backend": backend, "precision": precision,
            "carry_grams": carry_grams, "state_dtype": state_dtype, "master_weights": master_weights,
            "stochastic_rounding": stochastic_rounding,
        }  # fmt: skip
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize,
            "foreach": foreach, "capturable": capturable, "fused": fused,
        }  # fmt: skip
        self._build(params, pairs, defaults, own, differentiable, grams_of(moments))

    @property
    def _by_S(self) -> bool:
        return self.metric != "identity"

    @property
    def options(self) -> InvariantOptions:
        return InvariantOptions(
            self.precision,
            self.carry_grams,
            storage=self.storage,
            metric=self.metric,
            moments=self.moments,
            damping=self.damping,
        )
