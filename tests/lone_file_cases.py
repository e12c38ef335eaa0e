"""Adapters in one file, as kohya's sd-scripts, ComfyUI and diffusers write them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

KOHYA = ("lora_down.weight", "lora_up.weight")
METADATA = {"ss_network_dim": "4", "ss_network_alpha": "2.0", "ss_base_model_version": "sdxl", "sshs_model_hash": "0"}
# names of layers -> shapes of A and B
LAYERS = {
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": ((4, 12), (10, 4)),
    "lora_unet_down_blocks_0_resnets_0_conv1": ((4, 6, 3, 3), (8, 4, 1, 1)),
    "lora_te_text_model_encoder_layers_0_mlp_fc1": ((4, 9), (7, 4)),
}


def factors(shapes: tuple[tuple[int, ...], tuple[int, ...]], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    A, B = (torch.randn(shape, generator=generator) for shape in shapes)
    decay = 1 + A.dim() + A.shape[1] / 10  # unlike spectra
    return A * (decay ** -torch.arange(4)).view(-1, *[1] * (A.dim() - 1)), B


def kohya(path: Path, dtype: torch.dtype = torch.float16, alpha: float | None = 2.0) -> Path:
    """Linear and convolutional layers of rank 4, with alpha beside them."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, shapes in LAYERS.items():
        for end, factor in zip(KOHYA, factors(shapes, generator)):
            tensors[f"{name}.{end}"] = factor.to(dtype)
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha).to(dtype)
    save_file(tensors, path, METADATA)
    return path


# the same layer, to_q, as others name it
NAMES = {
    "ComfyUI": ("diffusion_model.blocks.0.to_q.lora_A.weight", "diffusion_model.blocks.0.to_q.lora_B.weight"),
    "ComfyUI, down": ("diffusion_model.blocks.0.to_q.lora_down.weight", "diffusion_model.blocks.0.to_q.lora_up.weight"),
    "diffusers": ("unet.blocks.0.to_q.lora_A.weight", "unet.blocks.0.to_q.lora_B.weight"),
    "diffusers 0.2": ("unet.blocks.0.to_q.lora.down.weight", "unet.blocks.0.to_q.lora.up.weight"),
    "diffusers 0.1": ("unet.blocks.0.processor.to_q_lora.down.weight", "unet.blocks.0.processor.to_q_lora.up.weight"),
    "diffusers, text": (
        "text_encoder.layers.0.q_proj.lora_linear_layer.down.weight",
        "text_encoder.layers.0.q_proj.lora_linear_layer.up.weight",
    ),
    "no weight": ("lora_unet_to_q.lora_down", "lora_unet_to_q.lora_up"),
}


def named(path: Path, names: tuple[str, str], metadata: dict[str, object] | None = None) -> Path:
    pair = factors(((4, 12), (10, 4)), torch.Generator().manual_seed(0))
    said = {"lora_adapter_metadata": json.dumps(metadata)} if metadata else None
    save_file(dict(zip(names, pair)), path, said)
    return path
