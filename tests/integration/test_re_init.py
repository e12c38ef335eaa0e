"""`Refactorer(re_init=True)` takes a difference out of base weights: of none that something else reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed_cases import trainable
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import reflora


class Tied(nn.Module):
    """An embedding and a head of one weight, two linears of another, and one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
        self.left, self.right, self.own = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.part = nn.Linear(8, 4)
        self.head.weight, self.left.weight = self.embedding.weight, self.right.weight
        self.part.weight.data = self.own.weight.data[2:6]

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.right(torch.tanh(self.left(self.embedding(tokens))))
        return self.head(torch.tanh(self.own(hidden))) + self.part(hidden).sum()


def adapted(*targets: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(Tied(), LoraConfig(r=3, target_modules=list(targets), init_lora_weights=False, **options))


@pytest.mark.parametrize("target", ["embedding", "head", "left", "right", "own", "part"])
def test_shared_base_weights_are_refused_before_anything_changes(target: str) -> None:
    """Also where one alone of those that share it has an adapter, and where they share a part."""
    model = adapted(target)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"re_init of .*{target}.*: expected a base weight of its own.*re_init=False"):
        reflora.Refactorer(model, re_init=True)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def one_layer() -> Any:
    config = LoraConfig(r=3, target_modules=["0"], init_lora_weights=False)
    return get_peft_model(nn.Sequential(nn.Linear(8, 8)), config)


def test_layer_replication_is_refused() -> None:
    import transformers

    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**size, vocab_size=20))
    config = LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[(0, 2), (0, 2)])
    with pytest.raises(ValueError, match="a base weight of its own"):
        reflora.Refactorer(get_peft_model(model, config), re_init=True)


def test_a_merged_adapter_is_refused() -> None:
    model = one_layer()
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"without merged adapters.*unmerge_adapter\(\)"):
        reflora.Refactorer(model, re_init=True)


def test_weights_that_lie_side_by_side_in_one_buffer_are_served() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    buffer = torch.randn(2, 8, 8)
    for layer, weight in zip(net, buffer):
        layer.weight.data = weight
    model = get_peft_model(net, LoraConfig(r=3, target_modules=["0", "1"], init_lora_weights=False))
    x = torch.randn(5, 8)
    before = model(x)
    reflora.Refactorer(model, re_init=True)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def test_accelerates_wrapper_is_looked_into() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = one_layer()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    wrapped = accelerate.Accelerator(cpu=True).prepare(optimizer)
    refactorer = reflora.Refactorer(model)
    refactorer.integrate_into_optimizer(wrapped)
    assert refactorer.integrated_into(wrapped) and refactorer.integrated_into(optimizer)
    model(torch.randn(5, 8)).square().mean().backward()
    wrapped.step()
    assert refactorer.diagnostics().refactored == 1
    with pytest.raises(TypeError, match="optimizer: expected a torch.optim.Optimizer, got object"):
        refactorer.integrate_into_optimizer(object())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "merged, said", [(False, "no other adapter on the layer, got other"), (True, "without merged adapters")]
)
def test_a_layer_with_another_adapter_is_refused(merged: bool, said: str) -> None:
    """Its outputs would follow the base weights."""
    model = one_layer()
    model.add_adapter("other", LoraConfig(r=3, target_modules=["0"], init_lora_weights=False))
    if merged:
        model.merge_adapter(["other"])
    with pytest.raises(ValueError, match=said):
        reflora.Refactorer(model, re_init=True)


@pytest.mark.parametrize("how", ["positional", "keyword"])
@pytest.mark.parametrize("use_scalar", [False, True])
def test_a_closure_has_its_gradients_preconditioned(how: str, use_scalar: bool) -> None:
    """Lightning steps with one."""

    def trained(closure: bool) -> list[nn.Parameter]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        model = get_peft_model(net, LoraConfig(r=3, target_modules=["0", "2"], init_lora_weights=False))
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        reflora.Refactorer(model, warmup_steps=1, interval=2, use_scalar=use_scalar).integrate_into_optimizer(optimizer)
        x = torch.randn(5, 8)

        def evaluate() -> Tensor:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        for _ in range(6):
            if not closure:
                evaluate()
                optimizer.step()
            elif how == "keyword":
                assert optimizer.step(closure=evaluate) > 0
            else:
                assert optimizer.step(evaluate) > 0
        return trainable(model)

    assert all(map(torch.equal, trained(True), trained(False)))


@pytest.mark.parametrize("name", ["re_init", "use_scalar"])
@pytest.mark.parametrize("value", ["False", 1, None])
def test_flags_are_flags(name: str, value: Any) -> None:
    model = one_layer()
    with pytest.raises(TypeError, match=f"^{name}: expected True or False"):
        reflora.Refactorer(model, **{name: value})
    with pytest.raises(TypeError, match="^follow: expected True or False"):
        reflora.GradientHooks(model, follow=value)


def test_an_optimizer_around_one_is_looked_into() -> None:
    pytorch_optimizer = pytest.importorskip("pytorch_optimizer")
    model = one_layer()
    refactorer = reflora.Refactorer(model)
    inner = torch.optim.SGD(trainable(model), lr=1e-2)
    refactorer.integrate_into_optimizer(pytorch_optimizer.Lookahead(inner))
    assert refactorer.integrated_into(inner)
    ours = reflora.RefLoRAAdamW(trainable(model), pairs=reflora.find_pairs(model), lr=1e-2)
    with pytest.raises(ValueError, match="does not refactor by itself"):
        refactorer.integrate_into_optimizer(pytorch_optimizer.Lookahead(ours))
