# Copyright 2026-present the HuggingFace Inc. team.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""
This module contains the implementation of the RefLoRA optimizer.
"""

import inspect
from collections.abc import Callable
from typing import Any, Optional

import torch
from torch.optim import Optimizer

from ..peft_model import PeftModel
from .riemannian import _collect_lora_pairs


# By default, S is halfway between the identity and its final value after this many steps.
PHASE_IN_STEPS = 400
# Past this condition number of a factor, its Gram matrix has no accurate inverse in float64.
MAX_CONDITION = 1e6
# How many steps a pair has taken, in the optimizer state of its lora_A, so that it survives a checkpoint.
STEP_KEY = "reflora_step"


def _gram(mat: torch.Tensor) -> torch.Tensor:
    mat = mat.detach().double()
    return mat @ mat.T


def _mean_eigenvalue(gram: torch.Tensor) -> torch.Tensor:
    return gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]


def _orthogonal_factor(mat: torch.Tensor, steps: int = 10) -> torch.Tensor:
    """Return the orthogonal Q of the polar decompositions `mat = Q H` of `[k, r, r]` matrices.

    This is Newton's iteration, scaled by norms (Higham, 1986). Unlike an SVD, it is fast for batches of small matrices
    and does not synchronize with the device. 10 steps suffice up to condition numbers of 1e12.
    """
    for _ in range(steps):
        inverse_t = torch.linalg.inv_ex(mat).inverse.mT
        scale = (torch.linalg.matrix_norm(inverse_t) / torch.linalg.matrix_norm(mat)).sqrt()[:, None, None]
        mat = (scale * mat + inverse_t / scale) / 2
    return mat


def _geometric_mean(gram_a: torch.Tensor, gram_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the solution S of `S @ gram_a @ S = gram_b`, and its inverse, for `[k, r, r]` positive definite matrices.

    S is the geometric mean of `gram_a^-1` and `gram_b`. Where one of the two is (near) singular, S is the identity.
    """
    eye = torch.eye(gram_a.shape[-1], device=gram_a.device, dtype=gram_a.dtype).expand_as(gram_a)
    chol_a, info_a = torch.linalg.cholesky_ex(gram_a)
    chol_b, info_b = torch.linalg.cholesky_ex(gram_b)
    inv_a = torch.linalg.solve_triangular(chol_a, eye, upper=False)
    inv_b = torch.linalg.solve_triangular(chol_b, eye, upper=False)

    q = _orthogonal_factor(chol_b.mT @ chol_a)
    s = inv_a.mT @ q.mT @ chol_b.mT
    s_inv = inv_b.mT @ q @ chol_a.mT

    norm = torch.linalg.matrix_norm
    condition = torch.maximum(norm(chol_a) * norm(inv_a), norm(chol_b) * norm(inv_b))
    # False for NaN
    regular = ((info_a == 0) & (info_b == 0) & (condition <= MAX_CONDITION))[:, None, None]
    return torch.where(regular, s, eye), torch.where(regular, s_inv, eye)


class _RefLoRAPreconditioner:
    """Preconditions LoRA gradients in-place so that a step is that of the optimally refactored pair.

    For each `(lora_A, lora_B)` pair, `g_A` is replaced by `S^-1 @ g_A`, and `g_B` by `g_B @ S`. S is computed in
    float64, since the Gram matrices `A A^T` and `B^T B` square the condition numbers of the factors. All pairs of the
    same rank are solved as one batch.
    """

    def __init__(
        self,
        lora_pairs: list[tuple[torch.nn.Parameter, torch.nn.Parameter]],
        warmup_steps: Optional[int],
    ) -> None:
        # A Gram matrix of a factor that is smaller than the rank is singular.
        self.lora_pairs = [(a, b) for a, b in lora_pairs if a.shape[0] <= min(a.shape[1], b.shape[0])]
        self.warmup_steps = warmup_steps

    def _weight(self, step: int) -> float:
        """The weight of the Gram matrices in S, which is the identity for 0."""
        if self.warmup_steps is None:
            return step**2 / (step**2 + PHASE_IN_STEPS**2)
        return float(step >= self.warmup_steps)

    def _matrices(
        self, pairs: list[tuple[torch.nn.Parameter, torch.nn.Parameter]], steps: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return S and its inverse, `[k, r, r]` in float64, for k pairs of the same rank and device."""
        gram_a = torch.stack([_gram(param_a) for param_a, _ in pairs])
        gram_b = torch.stack([_gram(param_b.T) for _, param_b in pairs])
        mean_a, mean_b = _mean_eigenvalue(gram_a), _mean_eigenvalue(gram_b)
        weight = gram_a.new_tensor([self._weight(step) for step in steps])[:, None, None]
        # Where a factor is zero, as lora_B is at the first step, there is no S.
        weight = torch.where((mean_a > 0) & (mean_b > 0), weight, 0)

        eye = torch.eye(gram_a.shape[-1], device=gram_a.device, dtype=gram_a.dtype)
        shrunk_a = torch.where(weight > 0, weight * gram_a / mean_a, 0) + (1 - weight) * eye
        shrunk_b = torch.where(weight > 0, weight * gram_b / mean_b, 0) + (1 - weight) * eye
        s, s_inv = _geometric_mean(shrunk_a, shrunk_b)
        if self.warmup_steps is None:
            return s, s_inv
        scale = torch.where(weight > 0, mean_b / mean_a, 1).sqrt()
        return s * scale, s_inv / scale

    @torch.no_grad()
    def step(self, state: dict[torch.nn.Parameter, dict[str, Any]]) -> dict[torch.nn.Parameter, int]:
        """Precondition the gradients of all pairs that have them.

        Returns for each such pair its `lora_A` and the number of its steps, this one included.
        """
        groups: dict[tuple[torch.device, int], list] = {}
        for param_a, param_b in self.lora_pairs:
            if param_a.grad is not None and param_b.grad is not None:
                groups.setdefault((param_a.device, param_a.shape[0]), []).append((param_a, param_b))

        counts = {}
        for pairs in groups.values():
            steps = [state.get(param_a, {}).get(STEP_KEY, 0) for param_a, _ in pairs]
            for (param_a, param_b), step, s, s_inv in zip(pairs, steps, *self._matrices(pairs, steps)):
                # Compute in at least float32, and cast the result back to the dtype of the gradient.
                dtype = torch.promote_types(param_a.dtype, torch.float32)
                param_a.grad.copy_(s_inv.to(dtype) @ param_a.grad.to(dtype))
                param_b.grad.copy_(param_b.grad.to(dtype) @ s.to(dtype))
                counts[param_a] = step + 1
        return counts


def create_reflora_optimizer(
    model: PeftModel,
    optimizer_cls: type[Optimizer],
    *,
    lr: float,
    warmup_steps: Optional[int] = None,
    **kwargs,
) -> Optimizer:
    """
    Creates a RefLoRA optimizer for a LoRA-adapted model.

    RefLoRA: Refactored Low-Rank Adaptation for Efficient Fine-Tuning of Large Models:
    https://huggingface.co/papers/2505.18877

    Many pairs of factors have the same product `B A`, but take different steps. RefLoRA takes the step of the pair
    that minimizes an upper bound of the loss after the step. As in section 3.3 of the paper, the factors themselves
    are not replaced. Their gradients are preconditioned: `g_A` is replaced by `S^-1 @ g_A`, and `g_B` by `g_B @ S`,
    where the `r x r` matrix S solves `S (A A^T) S = B^T B`.

    The returned optimizer behaves like `optimizer_cls` (e.g. `torch.optim.AdamW`) except for this. Non-LoRA parameters
    are updated unchanged. Learning rates that suit LoRA with the same optimizer are a good start.

    Only `nn.Linear`-shaped LoRA layers (`lora_A` / `lora_B`) are preconditioned. LoRA on embedding layers
    (`lora_embedding_A` / `lora_embedding_B`, stored as `nn.Parameter`) and layers with fewer input or output features
    than the rank are left unpreconditioned. The device must support float64.

    Args:
        model (`torch.nn.Module`): The PEFT model containing LoRA-adapted parameters.
        optimizer_cls (`type[torch.optim.Optimizer]`): The base optimizer class to wrap, e.g. `torch.optim.AdamW`.
        lr (`float`): Learning rate passed to the base optimizer.
        warmup_steps (`int`, *optional*):
            LoRA starts with `B = 0`, where S does not exist. Shortly after, the exact S amplifies the direction in
            which B is already large, which can keep B near rank one. By default, S is therefore phased in: at step t,
            `A A^T` and `B^T B` are averaged with a multiple of the identity, with weights `t^2` and `400^2`, which
            makes the first step that of `optimizer_cls`. This S has no scale, since optimizers like AdamW divide it
            away. If a number is passed instead, that many steps of `optimizer_cls` are followed by the exact S, scale
            included, as in the paper. Pass 0 for optimizers whose steps are proportional to the gradient, such as SGD.
        kwargs (`dict`): Additional keyword arguments forwarded to the base optimizer (e.g. `weight_decay`, `betas`).

    Returns:
        `torch.optim.Optimizer`: A subclass instance of `optimizer_cls` that preconditions LoRA gradients on each
        `step`. Only `lora_A` / `lora_B` weight matrices are preconditioned; every other trainable parameter is updated
        by `optimizer_cls` unchanged.
    """
    if not issubclass(optimizer_cls, Optimizer):
        raise TypeError(f"optimizer_cls must be a subclass of torch.optim.Optimizer, got {optimizer_cls!r}.")

    lora_pairs = _collect_lora_pairs(model)
    if not lora_pairs:
        raise ValueError(
            "create_reflora_optimizer did not find any trainable lora_A/lora_B parameter pairs on the model. "
            "RefLoRA only applies to LoRA-style adapters."
        )

    closure_param = inspect.signature(optimizer_cls.step).parameters.get("closure")
    if closure_param is not None and closure_param.default is inspect.Parameter.empty:
        raise ValueError(
            f"{optimizer_cls.__name__} requires a closure and re-evaluates the objective inside step(), which would "
            "overwrite the preconditioned gradients. Use an optimizer whose step() has an optional closure (SGD, "
            "AdamW, etc)."
        )

    preconditioner = _RefLoRAPreconditioner(lora_pairs, warmup_steps=warmup_steps)
    trainable_params = [param for param in model.parameters() if param.requires_grad]

    class RefLoRAOptimizer(optimizer_cls):
        @torch.no_grad()
        def step(self, closure: Optional[Callable] = None):
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            counts = preconditioner.step(self.state)
            super().step()
            # Optimizers take an empty state as the sign of a first step, so this has to come after theirs.
            for param, count in counts.items():
                self.state[param][STEP_KEY] = count
            return loss

    optimizer = RefLoRAOptimizer(trainable_params, lr=lr, **kwargs)
    return optimizer
