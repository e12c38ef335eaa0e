"""Real models to fine-tune: a packaged one, known shapes with random weights, any hub id. All weights are frozen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import data, hub, packaged
from .batches import WordHashTokenizer

HUB_IDS = {"deberta-v3-base": "microsoft/deberta-v3-base", "vit-base": "google/vit-base-patch16-224-in21k"}
LLAMA_IDS = {  # with their weights; the names alone stand for random ones
    "llama-7b": "yahma/llama-7b-hf",
    "llama2-7b": "meta-llama/Llama-2-7b-hf",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B",
}
_QKV_UP_DOWN = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Preset:
    """A known model and the setting its figures are quoted in: the paper's (Appendix D), MiniLM's and ViT's are ours.

    dtype: of the frozen weights; None for that of the checkpoint.
    """

    targets: str | tuple[str, ...]
    rank: int
    alpha: int
    batch: int
    length: int
    lr: float
    dtype: torch.dtype | None = None
    checkpointing: bool = False


_LLAMA_7B = Preset(_QKV_UP_DOWN, 32, 64, 16, 256, 2e-4, torch.bfloat16, True)
PRESETS = {
    "minilm": Preset("all-linear", 8, 8, 16, 64, 1e-3, torch.float32),
    "deberta-v3-base": Preset(
        ("query_proj", "key_proj", "value_proj", "output.dense", "intermediate.dense"),
        8,
        8,
        32,
        128,
        1e-3,
        torch.float32,
    ),
    "vit-base": Preset("all-linear", 8, 8, 32, 197, 1e-3, torch.float32),
    "mpnet-base": Preset("all-linear", 8, 8, 16, 64, 1e-3, torch.float32),
    "smollm2-135m": Preset("all-linear", 8, 8, 4, 64, 1e-3, torch.float32),
    "proxy": Preset("all-linear", 16, 16, 16, 64, 3e-3, torch.float32),
    "llama-7b": _LLAMA_7B,
    "llama2-7b": _LLAMA_7B,
    "llama3-8b": Preset(_QKV_UP_DOWN, 32, 64, 16, 256, 1e-4, torch.bfloat16, True),
}
OTHER = Preset("all-linear", 8, 8, 16, 128, 2e-4)


def preset(name: str) -> Preset:
    """Of a name of PRESETS or the hub id of one, else OTHER."""
    known = {hub_id: short for short, hub_id in (HUB_IDS | LLAMA_IDS).items()}
    return PRESETS.get(known.get(name, name), OTHER)


_DEBERTA = {
    "vocab_size": 128100, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "max_position_embeddings": 512, "type_vocab_size": 0, "relative_attention": True,
    "max_relative_positions": -1, "position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "pooler_dropout": 0.0, "pad_token_id": 0,
}  # fmt: skip
_VIT = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
_LLAMA_1 = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 11008,
}
_LLAMA = {
    "llama-7b": {**_LLAMA_1, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    "llama2-7b": {**_LLAMA_1, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
    "llama3-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "rope_theta": 500000.0,
    },
}  # fmt: skip


LLAMAS = tuple(_LLAMA)


@dataclass(frozen=True)
class Loaded:
    """A model on its device, every weight frozen. kind: "text", "causal" or "image"; weights: where they are from."""

    model: nn.Module
    tokenizer: Any
    kind: str
    weights: str


def load(
    name: str,
    classes: int,
    device: torch.device,
    seed: int,
    dtype: torch.dtype | None = None,
    checkpointing: bool = False,
    trained: bool = False,
) -> Loaded:
    """`name` of PRESETS, a hub id or a local folder; a head that no checkpoint has is drawn from `seed`.

    dtype: of the weights, None for the checkpoint's. trained: weights drawn at random, which do for timing, will not
    do. Raises OSError for a model that cannot be had.
    """
    torch.manual_seed(seed)
    if trained and name in _LLAMA:
        raise OSError(f"--model: expected trained weights, got {name}, whose shape alone is known. Pass a folder.")
    model, tokenizer, kind, weights = _base(name, classes, device, dtype)
    if trained and weights != "pretrained":
        raise OSError(f"--model: expected trained weights of {name}, got {weights}. Pass a folder, or go online.")
    model = model.to(device, dtype).requires_grad_(False)
    if checkpointing:
        # renamed in transformers 5
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return Loaded(model, tokenizer, kind, weights)


def identity(name: str) -> dict[str, str]:
    """What tells apart models that share a name: the proxy depends on the machine that has made it."""
    if name != "proxy":
        return {}
    return {"weights": data.digest([(packaged.folder(name) / "model.safetensors").read_bytes()])}


def end_of_text(name: str) -> str:
    """The token after which a model is to say no more; "" where its tokenizer has none. Raises OSError."""
    hub.prepare(needed=not Path(name).exists())
    try:
        return _tokenizer(name).eos_token or ""
    except (OSError, ValueError) as error:
        first = str(error).partition("\n")[0]
        raise OSError(f"--model: expected a folder or the hub id of a causal model, got {name!r} ({first})") from error


def check_length(loaded: Loaded, length: int) -> None:
    """Raises ValueError where the model's table of positions is shorter."""
    for path, module in loaded.model.named_modules():
        if path.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.num_embeddings < length:
            raise ValueError(f"--length: expected at most {module.num_embeddings} for this model, got {length}.")


def _base(name: str, classes: int, device: torch.device, dtype: torch.dtype | None) -> tuple[nn.Module, Any, str, str]:
    _quiet_transformers()
    if name in packaged.NAMES:
        return _packaged(name, classes)
    if name in _LLAMA:
        hub.prepare(needed=False)
        return _drawn(name, classes, device, dtype or torch.bfloat16, "random weights, hashed words")
    online = hub.prepare(needed=True)
    if name not in HUB_IDS:
        try:
            return *_pretrained(name, classes), "pretrained"
        except (OSError, ValueError) as error:
            known = f"{', '.join(PRESETS)}, a folder with a config.json, or the id of a model of the hub"
            why = "" if online else "; the hub cannot be reached"
            first = str(error).partition("\n")[0]
            raise OSError(f"--model: expected {known}, got {name!r}{why} ({first})") from error
    try:
        return *_pretrained(HUB_IDS[name], classes), "pretrained"
    except (OSError, ValueError, ImportError) as error:
        reason = f"{type(error).__name__} for {HUB_IDS[name]}" if online else "hub not reachable"
    return _drawn(name, classes, device, dtype or torch.float32, f"random weights ({reason}), hashed words")


def _drawn(
    name: str, classes: int, device: torch.device, dtype: torch.dtype, weights: str
) -> tuple[nn.Module, Any, str, str]:
    """A known shape with random weights. Built on its device in its dtype: a 7B model never exists in host memory."""
    import transformers as hf

    config: Any
    if name in _LLAMA:
        config, kind = hf.LlamaConfig(**_LLAMA[name], use_cache=False), "causal"
    elif name == "vit-base":
        config, kind, weights = hf.ViTConfig(**_VIT, num_labels=classes), "image", weights.replace(", hashed words", "")
    else:
        config, kind = hf.DebertaV2Config(**_DEBERTA, layer_norm_eps=1e-7, num_labels=classes), "text"
    tokenizer = None if kind == "image" else WordHashTokenizer(config.vocab_size)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return _factory(kind).from_config(config), tokenizer, kind, weights
    finally:
        torch.set_default_dtype(default)


def _packaged(name: str, classes: int) -> tuple[nn.Module, Any, str, str]:
    return *_pretrained(str(packaged.folder(name)), classes), "pretrained"


def _pretrained(source: str, classes: int) -> tuple[nn.Module, Any, str]:
    """Model in its own dtype, tokenizer (None for images), and its kind, which its config tells."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source)
    if hasattr(config, "image_size") and hasattr(config, "patch_size"):
        return _factory("image").from_pretrained(source, num_labels=classes), None, "image"
    causal = any(name.endswith("ForCausalLM") for name in config.architectures or ())
    tokenizer = _tokenizer(source)
    if causal:
        return _factory("causal").from_pretrained(source), tokenizer, "causal"
    return _factory("text").from_pretrained(source, num_labels=classes), tokenizer, "text"


def _tokenizer(source: str) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _factory(kind: str) -> Any:
    import transformers as hf

    return {
        "text": hf.AutoModelForSequenceClassification,
        "causal": hf.AutoModelForCausalLM,
        "image": hf.AutoModelForImageClassification,
    }[kind]


def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
