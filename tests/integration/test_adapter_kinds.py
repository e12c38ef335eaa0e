"""Every kind of adapter PEFT saves: the balanced copy keeps the model's logits, or the doctor refuses in a sentence."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from adapter_cases import change_config
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from reflora import __main__ as program
from reflora import adapters, doctor
from reflora.adapters import rules

lora_variants = pytest.importorskip("peft.tuners.lora.variants", reason="a PEFT without these kinds of LoRA")
variants = peft.tuners.lora.config
TOLERANCE = 1e-5


class Experts(nn.Module):
    """Two stacks of four experts, `[E, n_out, n_in]` as in transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up, self.down = (nn.Parameter(0.2 * torch.randn(4, *shape)) for shape in ((24, 16), (16, 24)))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(torch.einsum("bti,eoi->ebto", x, self.gate_up))
        return torch.einsum("ebti,eoi->bto", hidden, self.down)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.experts = nn.Linear(16, 16), nn.Linear(16, 16), Experts()
        self.conv, self.grouped = nn.Conv1d(16, 16, 3, padding=1), nn.Conv1d(16, 16, 3, padding=1, groups=2)
        self.image, self.attn = nn.Conv2d(1, 6, 3, padding=1), nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.first(x))
        x = x + torch.tanh(self.second(x)) + torch.tanh(self.experts(x))
        x = x + torch.tanh(self.conv(x.mT) + self.grouped(x.mT)).mT + self.image(x[:, None]).mean(1)
        return x + self.attn(x, x, x)[0]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 16), nn.Linear(16, 20)
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.layers:
            x = torch.tanh(block(x))
        return self.head(x)


def base() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def tokens() -> Tensor:
    return torch.randint(0, 20, (2, 7), generator=torch.Generator().manual_seed(1))


def save_adapter(folder: Path, config: Any, make: Callable[[], nn.Module] = base) -> Path:
    """Random factors, none of them zero; DoRA's magnitudes stay near what they are."""
    torch.manual_seed(3)  # PiSSA by iterations draws at loading too
    model = get_peft_model(make(), config)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator)
            size = 0.6 if "_A" in name else 0.1
            parameter.data = parameter.data + size * noise if "magnitude" in name else size * noise
    model.save_pretrained(str(folder))
    return folder


def logits(folder: Path, make: Callable[[], nn.Module] = base, **inputs: Any) -> tuple[Tensor, Tensor]:
    """With the adapter, and without it."""
    torch.manual_seed(3)
    model = PeftModel.from_pretrained(make(), str(folder)).eval()
    inputs = inputs or {"tokens": tokens()}
    with torch.no_grad():
        results = [model(**inputs)]
        with model.disable_adapter():
            results.append(model(**inputs))
    return tuple(getattr(one, "logits", one) for one in results)


def check(folder: Path, make: Callable[[], nn.Module] = base, **inputs: Any) -> doctor.Written:
    """That the balanced copy has the logits of the adapter, and that its layers are balanced."""
    out = folder.parent / "balanced"
    written = doctor.write_balanced(adapters.Adapter(folder), out)
    (before, without), (after, _) = (logits(one, make, **inputs) for one in (folder, out))
    effect = (before - without).norm()
    assert effect > 1e-2 * without.norm() and (after - before).norm() < TOLERANCE * effect
    same = {name for names in written.kept.values() for name in names}
    layers = [one for one in doctor.layers_of(adapters.Adapter(out)) if one.name not in same]
    assert layers and all(one.balance < 1e-5 for one in layers)
    return written


LINEAR, EXPERTS = ["first", "second"], ["experts.gate_up", "experts.down"]
OF_BOTH = {name: 2 for name in EXPERTS}
ALONE: dict[str, Any] = {"target_modules": [], "target_parameters": EXPERTS}
# options of LoraConfig
SERVED: dict[str, dict[str, Any]] = {
    "linear": {},
    "every layer": {"target_modules": [*LINEAR, "embed", "conv", "image", "attn", "head"]},
    "attention, rank_pattern": {"target_modules": ["attn"], "rank_pattern": {"attn": 6}},
    "DoRA": {"use_dora": True, "target_modules": [*LINEAR, "conv", "image", "embed"]},
    "rsLoRA": {"use_rslora": True},
    "lora_bias": {"lora_bias": True},
    "bias": {"bias": "all"},
    "modules_to_save": {"modules_to_save": ["head"]},
    "trainable tokens": {"trainable_token_indices": {"embed": [1, 2]}},
    "VeLoRA": {"velora_config": variants.VeloraConfig(num_groups=4)},
    "rank and alpha patterns": {"rank_pattern": {"first": 6, r"layers\.1\.second": 2}, "alpha_pattern": {"first": 3}},
    **{
        start: {"init_lora_weights": start}
        for start in ("gaussian", "pissa", "pissa_niter_4", "olora", "orthogonal", "mica", "eva", "lora_ga")
    },
    "experts": ALONE,
    "experts, rank_pattern down": {**ALONE, "r": 8, "rank_pattern": OF_BOTH},
    "experts, rank_pattern up": {**ALONE, "r": 1, "rank_pattern": OF_BOTH},
    "experts, one parameter": {**ALONE, "target_parameters": EXPERTS[:1], "rank_pattern": {"gate_up": 2}},
    "experts, regular expression": {**ALONE, "rank_pattern": {r".*\.experts\..*": 2}},
    "experts and linear": {"target_parameters": EXPERTS, "rank_pattern": OF_BOTH},
    "experts and linear of 2 r": {"target_parameters": EXPERTS, "r": 2, "rank_pattern": {"first": 4, "second": 8}},
    "experts and all-linear": {**ALONE, "target_modules": "all-linear", "r": 2, "rank_pattern": {"first": 4}},
    "a matrix by its parameter": {**ALONE, "target_parameters": ["first.weight"]},
}
# and layers that are left as they are, with the reason
SERVED_IN_PART: dict[str, tuple[dict[str, Any], dict[str, list[str]]]] = {
    "experts, unlike ranks, one fits": (
        {**ALONE, "r": 2, "rank_pattern": {"experts.gate_up": 3}},
        {"rank 2 or 3, and the file does not say which": [f"layers.{i}.experts.base_layer" for i in range(2)]},
    ),
    "names that fit any layer": (
        {"target_parameters": ["gate_up", "down"], "r": 2, "rank_pattern": {"first": 4}},
        {"rank 2 or 4, and the file does not say which": [f"layers.{i}.first" for i in range(2)]},
    ),
    "grouped convolution": (
        {"target_modules": ["first", "grouped"]},
        {"grouped convolution": ["layers.0.grouped", "layers.1.grouped"]},
    ),
    "BD-LoRA on some": (
        {"use_bdlora": variants.BdLoraConfig(target_modules_bd_a=["first"], nblocks=2, match_strict=False)},
        {"block-diagonal factors": ["layers.0.first", "layers.1.first"]},
    ),
}


@pytest.mark.parametrize("kind", [*SERVED, *SERVED_IN_PART])
@pytest.mark.filterwarnings("ignore")
def test_the_copy_keeps_the_logits(kind: str, tmp_path: Path) -> None:
    options, kept = SERVED_IN_PART[kind] if kind in SERVED_IN_PART else (SERVED[kind], {})
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LINEAR, **options})
    assert check(save_adapter(tmp_path / "adapter", config)).kept == kept


REFUSED: dict[str, tuple[Any, str]] = {
    "KaSA": (LoraConfig(kasa_config=variants.KasaConfig()), "kasa_config: expected null, .* lora_diag stands between"),
    "MonteCLoRA": (
        LoraConfig(monteclora_config=variants.MontecloraConfig()), "monteclora_config: .* learnt for the entries"
    ),
    "BD-LoRA": (
        LoraConfig(use_bdlora=variants.BdLoraConfig(["first"], ["second"], 2)), r"none of 4 \(layers.0.first: block"
    ),
    "two ranks in one module": (
        LoraConfig(target_parameters=EXPERTS, rank_pattern={"experts.down": 4}), "rank 2 or 4, .* does not say which"
    ),
    "AdaLoRA": (AdaLoraConfig(init_r=6, target_r=4, total_step=100), "peft_type: expected 'LORA', got 'ADALORA'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_what_is_not_b_a_is_refused(kind: str, tmp_path: Path) -> None:
    config, said = REFUSED[kind]
    config.target_modules = [] if config.target_parameters else set(LINEAR)
    config.r, out = 2, tmp_path / "out"
    folder = save_adapter(tmp_path / "adapter", config)
    with pytest.raises(SystemExit, match=f"^reflora doctor: .*{said}") as caught:
        program.main(["doctor", str(folder), "--refactor", str(out)])
    assert len(str(caught.value)) < 300 and not out.exists()


@pytest.mark.parametrize("kind", [kind.value for kind in peft.PeftType if kind != "LORA"])
def test_other_tuners_are_refused(kind: str, saved: Path) -> None:
    change_config(peft_type=kind)(saved)
    with pytest.raises(ValueError, match=f"peft_type: expected 'LORA', got '{kind}'"):
        adapters.Adapter(saved)


def test_every_option_of_peft_is_decided_on() -> None:
    """A new field of LoraConfig has to be looked at: is the update still B A alone?"""
    fields = {field.name: field for field in dataclasses.fields(LoraConfig)}
    assert fields.keys() <= {*rules.HARMLESS, *rules.REFUSED}
    assert not set(rules.HARMLESS) & set(rules.REFUSED)
    rules.read_rules(json.loads(json.dumps(LoraConfig(target_modules=["q"]).to_dict(), default=list)), "config")


@pytest.mark.parametrize("key", ["megatron_config", "arrow_config", "enable_lora", "kasa_config", "next_config"])
def test_variants_are_refused_by_their_options(key: str, saved: Path) -> None:
    for off in (None, False, []):
        change_config(**{key: off})(saved)
        adapters.Adapter(saved)
    change_config(**{key: {}})(saved)  # PEFT makes a KasaConfig of {}
    with pytest.raises(ValueError, match=f"{key}: expected null, for an update B A"):
        adapters.Adapter(saved)


@pytest.mark.parametrize("key", ["layers.0.q", "q", "a.q.b", "aq", "layers.11.mlp.experts.gate_up", ""])
@pytest.mark.parametrize(
    "patterns", [[], ["q"], ["^q"], ["0.q", "q"], [r".*\.experts\..*", "gate_up"], [r"layers\.1.*"], ["a|q"], [""]]
)
def test_ranks_are_those_of_peft(key: str, patterns: list[str]) -> None:
    ranks = {pattern: place + 1 for place, pattern in enumerate(patterns)}
    found = rules.read_rules({"peft_type": "LORA", "r": 9, "rank_pattern": ranks}, "config")
    assert found.rank(key) == ranks.get(get_pattern_key(ranks.keys(), key), 9)


def test_qalora_pools_its_inputs(saved: Path, tmp_path: Path) -> None:
    """Its layers need GPTQ: PEFT's forward pass of the variant, on stored factors."""
    x = torch.randn(3, 5, 48)
    change_config(use_qalora=True, qalora_group_size=4)(saved)
    doctor.write_balanced(adapters.Adapter(saved), tmp_path / "balanced")

    def effect(adapter: adapters.Adapter) -> Tensor:
        A, B = (SimpleNamespace(weight=factor) for factor in (adapter.pairs[0].A, adapter.pairs[0].B))
        module = SimpleNamespace(lora_A={"x": A}, lora_B={"x": B}, scaling={"x": 2.0}, in_features=48, training=False)
        module.lora_dropout, module.qalora_group_size = {"x": nn.Identity()}, {"x": 4}
        return lora_variants.QALoraLinearVariant.forward(module, "x", x, torch.zeros(3, 5, 10))

    before, after = (effect(adapters.Adapter(folder)) for folder in (saved, tmp_path / "balanced"))
    assert 0 < (after - before).norm() < TOLERANCE * before.norm()


def test_pissa_made_a_lora_has_twice_the_rank(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=LINEAR, target_parameters=EXPERTS, rank_pattern={"first": 3})
    start = save_adapter(tmp_path / "start", config)
    model = PeftModel.from_pretrained(base(), str(start), is_trainable=True)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter) if parameter.requires_grad else 0.0
    model.save_pretrained(str(tmp_path / "adapter"), path_initial_model_for_weight_conversion=str(start))
    assert check(tmp_path / "adapter").kept == {}
    assert {one.rank for one in doctor.layers_of(adapters.Adapter(tmp_path / "adapter"))} == {4, 6}


@pytest.mark.parametrize("kind", ["aLoRA", "tied", "replicated", "experts"])
@pytest.mark.filterwarnings("ignore")
def test_models_of_transformers(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    size = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": kind == "tied"}

    def make() -> nn.Module:
        torch.manual_seed(0)
        if kind == "experts":
            return transformers.MixtralForCausalLM(transformers.MixtralConfig(**size, num_local_experts=4))
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**size))

    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    options: dict[str, Any] = {
        "aLoRA": {"alora_invocation_tokens": [3, 4]},
        "tied": {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
        "replicated": {"layer_replication": [[0, 2], [1, 2]]},
        "experts": {"target_parameters": parameters, "rank_pattern": {name: 2 for name in parameters}},
    }[kind]
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options})
    ids = torch.randint(5, 40, (2, 9), generator=torch.Generator().manual_seed(1))
    ids[:, 3], ids[:, 4] = 3, 4
    assert check(save_adapter(tmp_path / "adapter", config, make), make, input_ids=ids).kept == {}
