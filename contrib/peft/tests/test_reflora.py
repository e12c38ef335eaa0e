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

from copy import deepcopy

import pytest
import torch
from torch import nn

from peft import LoraConfig, get_peft_model
from peft.optimizers import create_reflora_optimizer
from peft.optimizers.reflora import STEP_KEY, _geometric_mean, _RefLoRAPreconditioner
from peft.optimizers.riemannian import _collect_lora_pairs

from .testing_utils import torch_device


class SimpleNet(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.embedding = nn.Embedding(100, 20)
        self.layer_norm = nn.LayerNorm(20)
        self.lin0 = nn.Linear(20, 20, bias=bias)
        self.relu = nn.ReLU()
        self.lin1 = nn.Linear(20, 16, bias=bias)

    def forward(self, X):
        X = self.lin0(self.layer_norm(self.embedding(X)))
        X = self.relu(X)
        X = self.lin1(X)
        return X


def _make_lora_model(**kwargs):
    torch.manual_seed(42)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["lin0", "lin1"], **kwargs})
    return get_peft_model(SimpleNet(), config).to(torch_device)


def _train(model, optimizer, steps, start=0):
    loss = nn.CrossEntropyLoss()
    for step in range(start, start + steps):
        torch.manual_seed(step)
        x = torch.randint(100, (2, 4, 10)).to(torch_device)
        label = torch.randint(16, (2, 4, 10)).to(torch_device)
        optimizer.zero_grad()
        loss(model(x).permute(0, 3, 1, 2), label).backward()
        optimizer.step()


def _trainable(model):
    return {name: param.detach().clone() for name, param in model.named_parameters() if param.requires_grad}


def _random_pair(r=4, n_in=20, n_out=16, dtype=torch.float64):
    lora_a = nn.Parameter(torch.randn(r, n_in, dtype=dtype, device=torch_device))
    lora_b = nn.Parameter(torch.randn(n_out, r, dtype=dtype, device=torch_device))
    return lora_a, lora_b


def _set_grads(lora_a, lora_b, grad):
    """Gradients of the factors, from the gradient of their product."""
    lora_a.grad = lora_b.detach().T @ grad
    lora_b.grad = grad @ lora_a.detach().T


def _exact_s(lora_a, lora_b):
    s, _ = _RefLoRAPreconditioner([], warmup_steps=0)._matrices([(lora_a, lora_b)], [0])
    return s[0]


class TestRefLoRAPreconditioner:
    """The mathematical properties of S, see Theorems 3 and 6 of the paper."""

    @pytest.fixture(autouse=True)
    def seed(self):
        torch.manual_seed(0)

    @pytest.mark.parametrize("r", [1, 4, 32])
    def test_geometric_mean_solves_its_equation(self, r):
        factors = torch.randn(2, 3, r, 2 * r, dtype=torch.float64, device=torch_device)
        gram_a, gram_b = factors @ factors.mT
        s, s_inv = _geometric_mean(gram_a, gram_b)

        torch.testing.assert_close(s @ gram_a @ s, gram_b)
        torch.testing.assert_close(s @ s_inv, torch.eye(r, dtype=s.dtype, device=s.device).expand_as(s))
        assert (torch.linalg.eigvalsh(s) > 0).all()

    def test_refactored_pair_is_balanced_and_has_the_same_product(self):
        lora_a, lora_b = _random_pair()
        p = torch.linalg.cholesky(_exact_s(lora_a, lora_b))  # S = P P^T
        new_a, new_b = p.T @ lora_a, lora_b @ torch.linalg.inv(p).T

        torch.testing.assert_close(new_b @ new_a, lora_b @ lora_a)
        torch.testing.assert_close(new_a @ new_a.T, new_b.T @ new_b)

    def test_step_is_that_of_the_refactored_pair(self):
        lora_a, lora_b = _random_pair()
        grad = torch.randn(16, 20, dtype=torch.float64, device=torch_device)
        p = torch.linalg.cholesky(_exact_s(lora_a, lora_b))
        new_a, new_b = p.T @ lora_a, lora_b @ torch.linalg.inv(p).T
        expected = (new_b - 0.01 * grad @ new_a.T) @ (new_a - 0.01 * new_b.T @ grad)

        _set_grads(lora_a, lora_b, grad)
        _RefLoRAPreconditioner([(lora_a, lora_b)], warmup_steps=0).step({})
        torch.testing.assert_close((lora_b - 0.01 * lora_b.grad) @ (lora_a - 0.01 * lora_a.grad), expected)

    def test_equal_products_take_equal_steps(self):
        lora_a, lora_b = _random_pair()
        mix = torch.randn(4, 4, dtype=torch.float64, device=torch_device)
        other_a, other_b = nn.Parameter(mix @ lora_a), nn.Parameter(lora_b @ torch.linalg.inv(mix))
        grad = torch.randn(16, 20, dtype=torch.float64, device=torch_device)

        changes = []
        for a, b in [(lora_a, lora_b), (other_a, other_b)]:
            _set_grads(a, b, grad)
            plain = b.grad @ a + b @ a.grad
            _RefLoRAPreconditioner([(a, b)], warmup_steps=0).step({})
            changes.append((plain, b.grad @ a + b @ a.grad))
        (plain, change), (other_plain, other_change) = changes
        torch.testing.assert_close(change, other_change)
        assert not torch.allclose(plain, other_plain)

    @pytest.mark.parametrize("warmup_steps", [None, 0])
    @pytest.mark.parametrize("zero", ["lora_a", "lora_b"])
    def test_gradients_are_left_alone_where_a_factor_is_zero(self, warmup_steps, zero):
        lora_a, lora_b = _random_pair()
        with torch.no_grad():
            {"lora_a": lora_a, "lora_b": lora_b}[zero].zero_()
        grads = torch.randn_like(lora_a), torch.randn_like(lora_b)
        lora_a.grad, lora_b.grad = grads[0].clone(), grads[1].clone()

        _RefLoRAPreconditioner([(lora_a, lora_b)], warmup_steps).step({lora_a: {STEP_KEY: 1000}})
        assert torch.equal(lora_a.grad, grads[0])
        assert torch.equal(lora_b.grad, grads[1])

    def test_a_singular_factor_takes_a_multiple_of_the_identity(self):
        lora_a, lora_b = _random_pair()
        with torch.no_grad():
            lora_b[:, 1:] = lora_b[:, :1]  # rank one
        scale = lora_b.norm() / lora_a.norm()
        expected = scale * torch.eye(4, dtype=torch.float64, device=torch_device)
        torch.testing.assert_close(_exact_s(lora_a, lora_b), expected)

    def test_s_is_phased_in(self):
        # Without its scale, the geometric mean of inverse Gram matrices with mean eigenvalue 1, averaged with I
        pair = _random_pair()
        grams = pair[0] @ pair[0].T, pair[1].T @ pair[1]
        grams = [(gram * 4 / gram.trace())[None] for gram in grams]
        eye = torch.eye(4, dtype=torch.float64, device=torch_device)

        preconditioner = _RefLoRAPreconditioner([], warmup_steps=None)
        for step, weight in [(0, 0), (400, 0.5), (800, 0.8)]:
            s, _ = preconditioner._matrices([pair], [step])
            expected, _ = _geometric_mean(*[weight * gram + (1 - weight) * eye for gram in grams])
            torch.testing.assert_close(s, expected)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_low_precision_gradients_preconditioned_stably(self, dtype):
        pair = _random_pair(dtype=dtype)
        reference = [nn.Parameter(param.detach().double()) for param in pair]
        for param, double in zip(pair, reference):
            param.grad = torch.randn_like(param)
            double.grad = param.grad.double()

        for a, b in (pair, reference):
            _RefLoRAPreconditioner([(a, b)], warmup_steps=0).step({})
        for param, double in zip(pair, reference):
            assert param.grad.dtype == dtype
            torch.testing.assert_close(param.grad, double.grad.to(dtype))


class TestRefLoRAOptimizer:
    @pytest.mark.parametrize("optimizer_cls", [torch.optim.AdamW, torch.optim.RMSprop, torch.optim.SGD])
    def test_works_with_any_optimizer_subclass(self, optimizer_cls):
        # LoRA's standard init has lora_B == 0, so g_A vanishes on step 1 and lora_A doesn't move, hence 2 steps.
        model = _make_lora_model()
        optimizer = create_reflora_optimizer(model, optimizer_cls, lr=1e-2)
        assert isinstance(optimizer, optimizer_cls)
        before = _trainable(model)
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(before)

        _train(model, optimizer, steps=2)
        for name, param in _trainable(model).items():
            assert not torch.equal(param, before[name]), f"{name} did not update"

    @pytest.mark.parametrize("kwargs, plain_steps", [({}, 1), ({"warmup_steps": 3}, 3)])
    def test_first_steps_are_those_of_the_base_optimizer(self, kwargs, plain_steps):
        model, plain_model = _make_lora_model(), _make_lora_model()
        optimizer = create_reflora_optimizer(model, torch.optim.AdamW, lr=1e-2, **kwargs)
        plain = torch.optim.AdamW([param for param in plain_model.parameters() if param.requires_grad], lr=1e-2)

        for step in range(5):
            _train(model, optimizer, steps=1, start=step)
            _train(plain_model, plain, steps=1, start=step)
            expected = _trainable(plain_model)
            same = all(torch.equal(param, expected[name]) for name, param in _trainable(model).items())
            assert same == (step < plain_steps)

    def test_rank_one_is_the_base_optimizer(self):
        # Without its scale, S is the number 1.
        model, plain_model = _make_lora_model(r=1), _make_lora_model(r=1)
        optimizer = create_reflora_optimizer(model, torch.optim.AdamW, lr=1e-2)
        plain = torch.optim.AdamW([param for param in plain_model.parameters() if param.requires_grad], lr=1e-2)
        _train(model, optimizer, steps=10)
        _train(plain_model, plain, steps=10)
        expected = _trainable(plain_model)
        for name, param in _trainable(model).items():
            torch.testing.assert_close(param, expected[name])

    @pytest.mark.parametrize("warmup_steps", [None, 3])
    def test_resumes_from_its_state_dict(self, warmup_steps):
        model = _make_lora_model()
        optimizer = create_reflora_optimizer(model, torch.optim.AdamW, lr=1e-2, warmup_steps=warmup_steps)
        _train(model, optimizer, steps=5)

        resumed_model = _make_lora_model()
        resumed_model.load_state_dict(model.state_dict())
        resumed = create_reflora_optimizer(resumed_model, torch.optim.AdamW, lr=1e-2, warmup_steps=warmup_steps)
        resumed.load_state_dict(deepcopy(optimizer.state_dict()))

        _train(model, optimizer, steps=5, start=5)
        _train(resumed_model, resumed, steps=5, start=5)
        expected = _trainable(model)
        for name, param in _trainable(resumed_model).items():
            assert torch.equal(param, expected[name])
        assert {resumed.state[param_a][STEP_KEY] for param_a, _ in _collect_lora_pairs(resumed_model)} == {10}

    def test_closure_is_evaluated_before_preconditioning(self):
        model, closure_model = _make_lora_model(), _make_lora_model()
        optimizer = create_reflora_optimizer(model, torch.optim.SGD, lr=0.1, warmup_steps=0)
        with_closure = create_reflora_optimizer(closure_model, torch.optim.SGD, lr=0.1, warmup_steps=0)
        x = torch.randint(100, (4, 10)).to(torch_device)

        def closure():
            with_closure.zero_grad()
            loss = closure_model(x).square().mean()
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            torch.testing.assert_close(with_closure.step(closure), loss)
        expected = _trainable(model)
        for name, param in _trainable(closure_model).items():
            torch.testing.assert_close(param, expected[name])

    def test_other_parameters_take_steps_of_the_base_optimizer(self):
        # DoRA adds a magnitude vector beside lora_A / lora_B, and lin1 has fewer outputs than the rank.
        model = _make_lora_model(use_dora=True, r=18)
        optimizer = create_reflora_optimizer(model, torch.optim.SGD, lr=0.1, warmup_steps=0)
        torch.manual_seed(0)
        before = {}
        for name, param in model.named_parameters():
            if param.requires_grad:
                param.data.normal_()
                param.grad = torch.randn_like(param)
                before[name] = param.detach().clone(), param.grad.clone()
        optimizer.step()

        plain = set()
        for name, param in _trainable(model).items():
            old, grad = before[name]
            if torch.allclose(param, old - 0.1 * grad):
                plain.add(name.split("model.")[-1])
        assert plain == {
            "lin0.lora_magnitude_vector.default.weight",
            "lin1.lora_magnitude_vector.default.weight",
            "lin1.lora_A.default.weight",
            "lin1.lora_B.default.weight",
        }

    def test_pairs_without_gradient_are_skipped(self):
        model = _make_lora_model()
        optimizer = create_reflora_optimizer(model, torch.optim.AdamW, lr=1e-2)
        before = _trainable(model)
        model.lin0.lora_A["default"].weight.grad = torch.ones_like(model.lin0.lora_A["default"].weight)
        optimizer.step()
        changed = [name for name, param in _trainable(model).items() if not torch.equal(param, before[name])]
        assert changed == ["base_model.model.lin0.lora_A.default.weight"]
        # The pair has not taken a step, and AdamW can still initialize the state of the other factor.
        _train(model, optimizer, steps=1)
        assert optimizer.state[model.lin0.lora_A["default"].weight][STEP_KEY] == 1

    def test_raises_when_no_lora_parameters_on_model(self):
        with pytest.raises(ValueError, match="lora_A/lora_B parameter pairs"):
            create_reflora_optimizer(SimpleNet(), torch.optim.AdamW, lr=1e-3)

    def test_raises_when_optimizer_cls_is_not_optimizer_subclass(self):
        with pytest.raises(TypeError, match="subclass of"):
            create_reflora_optimizer(_make_lora_model(), dict, lr=1e-3)  # type: ignore[arg-type]

    def test_raises_when_optimizer_requires_closure(self):
        with pytest.raises(ValueError, match="requires a closure"):
            create_reflora_optimizer(_make_lora_model(), torch.optim.LBFGS, lr=0.1)
