"""find_pairs on every kind of layer PEFT puts LoRA on, by the property a layout must have: B A is the update."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from transformers.pytorch_utils import Conv1D

import reflora
from reflora.integrations.peft import find_sites


class Experts(nn.Module):
    """Three experts in one parameter, `[E, in, out]` or, as most models have it, `[E, out, in]`."""

    def __init__(self, is_transposed):
        super().__init__()
        self.is_transposed = is_transposed
        self.weight = nn.Parameter(torch.randn(3, 10, 7))


class Int8Linear(nn.Module):
    """A quantised base layer: integer weight, no gradient."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 10, 7
        self.weight = nn.Parameter(torch.randint(-9, 9, (7, 10), dtype=torch.int8), requires_grad=False)
        self.bias = None

    def forward(self, x):
        return x @ self.weight.to(x.dtype).T


def adapted(layer, **config):
    """A model with `layer` at .layer under LoRA whose factors are both random."""
    base = nn.Module()
    base.layer = layer
    base.dtype = torch.float32
    if "target_parameters" not in config:
        config["target_modules"] = ["layer"]
    lora = LoraConfig(r=4, init_lora_weights=False, **config)
    if isinstance(layer, Int8Linear):
        lora._register_custom_module({Int8Linear: LoraLinear})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(base, lora)


KINDS = {
    "linear": (lambda: nn.Linear(10, 7), {}, "linear"),
    "rslora": (lambda: nn.Linear(10, 7), {"use_rslora": True}, "linear"),
    "lora_bias": (lambda: nn.Linear(10, 7), {"lora_bias": True}, "linear"),
    "dora": (lambda: nn.Linear(10, 7), {"use_dora": True}, "linear"),
    "transformers Conv1D": (lambda: Conv1D(7, 10), {"fan_in_fan_out": True}, "linear"),
    "quantised": (Int8Linear, {}, "linear"),
    "embedding": (lambda: nn.Embedding(11, 6), {}, "embedding"),
    "dora embedding": (lambda: nn.Embedding(11, 6), {"use_dora": True}, "embedding"),
    "conv1d": (lambda: nn.Conv1d(5, 6, 3), {}, "conv"),
    "conv2d": (lambda: nn.Conv2d(5, 6, 3), {}, "conv"),
    "conv2d channels last": (lambda: nn.Conv2d(5, 6, 3).to(memory_format=torch.channels_last), {}, "conv"),
    "conv2d 1x1": (lambda: nn.Conv2d(5, 6, 1), {}, "conv"),
    "conv3d": (lambda: nn.Conv3d(5, 6, 3), {}, "conv"),
    "attention": (lambda: nn.MultiheadAttention(8, 2), {}, "linear"),
    "experts in-out": (lambda: Experts(True), {"target_parameters": ["layer.weight"]}, "experts(3)"),
    "experts out-in": (lambda: Experts(False), {"target_parameters": ["layer.weight"]}, "experts(3)"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_refactoring_the_pairs_keeps_the_update(kind):
    make, config, layout = KINDS[kind]
    model = adapted(make(), **config)
    sites = find_sites(model)
    trainable = {p for name, p in model.named_parameters() if p.requires_grad and "magnitude" not in name}
    found = {t for site in sites for t in (site.pair.A, site.pair.B)}
    assert found == {p for p in trainable if p.dim() > 1}
    before = [site.module.get_delta_weight("default").detach().clone() for site in sites]
    reflora.refactor_([site.pair for site in sites])
    for site, delta in zip(sites, before):
        assert site.pair.layout == layout
        torch.testing.assert_close(site.module.get_delta_weight("default"), delta, rtol=1e-4, atol=1e-5)
        for A, B in zip(site.pair.views_A(site.pair.A), site.pair.views_B(site.pair.B)):
            torch.testing.assert_close(A @ A.T, B.T @ B, rtol=1e-4, atol=1e-5)


def test_names_are_module_paths_and_adapters():
    model = adapted(nn.MultiheadAttention(8, 2))
    names = [pair.name for pair in reflora.find_pairs(model)]
    assert names == ["base_model.model.layer.default", "base_model.model.layer.base_layer.out_proj.default"]
    for name in names:
        path, adapter = name.rsplit(".", 1)
        assert adapter in model.get_submodule(path).lora_A


def test_adapters():
    model = adapted(nn.Linear(10, 7))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["layer"]))
    assert [pair.rank for pair in reflora.find_pairs(model)] == [4]
    assert [pair.rank for pair in reflora.find_pairs(model, adapter="other")] == [2]
    model.set_adapter("other")
    assert [pair.name for pair in reflora.find_pairs(model)] == ["base_model.model.layer.other"]
    model.base_model.set_adapter(["default", "other"])
    assert [pair.rank for pair in reflora.find_pairs(model)] == [4, 2]
    with pytest.raises(ValueError, match="none of adapter 'third' .*default, other"):
        reflora.find_pairs(model, adapter="third")


def test_frozen_adapters_are_found_by_name_only():
    model = adapted(nn.Linear(10, 7), inference_mode=True)
    with pytest.raises(ValueError, match="only frozen ones .*is_trainable=True"):
        reflora.find_pairs(model)
    assert len(reflora.find_pairs(model, adapter="default")) == 1


def test_a_model_without_lora():
    with pytest.raises(ValueError, match="get_peft_model.*pairs="):
        reflora.find_pairs(nn.Linear(3, 3))
    with pytest.raises(TypeError, match="expected a torch.nn.Module"):
        reflora.find_pairs([nn.Linear(3, 3)])


def test_a_scaling_between_the_factors_is_no_pair():
    base = nn.Module()
    base.layer = nn.Linear(10, 7)
    model = get_peft_model(base, AdaLoraConfig(target_modules=["layer"], init_r=4, total_step=10))
    with pytest.raises(ValueError, match="lora_E stands between"):
        reflora.find_pairs(model)


def test_grouped_convolutions_are_left_out_with_a_warning():
    base = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(6, 6, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, LoraConfig(r=4, target_modules=["0", "1"]))
    with pytest.warns(UserWarning, match=r"base_model.model.0.default\): grouped convolution"):
        pairs = reflora.find_pairs(model)
    assert [pair.name for pair in pairs] == ["base_model.model.1.default"]


def test_shared_modules_appear_once_and_tied_factors_too():
    base = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0", "1"]))
    first, second = model.base_model.model
    model.base_model.model.append(first)
    assert len(reflora.find_pairs(model)) == 2
    second.lora_A["default"].weight = nn.Parameter(first.lora_B["default"].weight.data.t())
    second.lora_B["default"].weight = nn.Parameter(first.lora_A["default"].weight.data.t())
    with pytest.warns(UserWarning, match="tied to another layer"):
        assert len(reflora.find_pairs(model)) == 1


def test_flattened_parameters_are_refused():
    model = adapted(nn.Linear(10, 7))
    factor = model.base_model.model.layer.lora_A["default"]
    factor.weight = nn.Parameter(factor.weight.detach().flatten())
    with pytest.raises(ValueError, match="FSDP1 flattens parameters"):
        reflora.find_pairs(model)
    view = factor._parameters.pop("weight").view(4, 10)
    factor.weight = view
    with pytest.raises(ValueError, match="factors that are parameters.*FSDP1"):
        reflora.find_pairs(model)


def test_wrappers_are_looked_through(tmp_path):
    model = adapted(nn.Linear(10, 7))
    expected = [pair.A for pair in reflora.find_pairs(model)]
    assert reflora.find_pairs(torch.compile(model))[0].A is expected[0]
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert reflora.find_pairs(wrapped)[0].A is expected[0]
    finally:
        torch.distributed.destroy_process_group()


def test_no_heavy_import():
    code = (
        "import sys, torch, reflora\n"
        "layer = torch.nn.Module()\n"
        "layer.lora_A = torch.nn.ModuleDict({'a': torch.nn.Linear(5, 2, bias=False)})\n"
        "layer.lora_B = torch.nn.ModuleDict({'a': torch.nn.Linear(2, 3, bias=False)})\n"
        "assert reflora.find_pairs(layer)[0].name == 'a'\n"
        "reflora.Refactorer, reflora.PEFTArguments, reflora.create_reflora_optimizer\n"
        "assert not {'peft', 'transformers', 'triton'} & set(sys.modules)\n"
        "reflora.create_reflora_optimizer(layer, lr=1e-3)\n"  # torch itself may load triton here
        "assert not {'peft', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(reflora.__file__).parents[1])


def test_factors_whose_weight_is_not_their_matrix_are_left_out():
    """BD-LoRA's block-diagonal factors, for one."""

    class BlockDiagonalLinear(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 32))

    model = nn.Sequential(nn.Module(), nn.Module())
    for layer, A in zip(model, (BlockDiagonalLinear(), nn.Linear(32, 8, bias=False))):
        layer.lora_A = nn.ModuleDict({"default": A})
        layer.lora_B = nn.ModuleDict({"default": nn.Linear(8, 16, bias=False)})
    with pytest.warns(UserWarning, match="BlockDiagonalLinear factors"):
        pairs = reflora.find_pairs(model)
    assert [pair.name for pair in pairs] == ["1.default"]
