"""How the tensors of an adapter are named: by PEFT, by kohya's sd-scripts and ComfyUI, and by diffusers."""

from __future__ import annotations

from dataclasses import dataclass

from ..integrations.peft import SCALED_INSIDE

PREFIX = "base_model.model."
FACTORS = {"lora_A": 0, "lora_B": 1, "lora_embedding_A": 0, "lora_embedding_B": 1, "lora_down": 0, "lora_up": 1}
# diffusers: to_q.lora.down.weight, q_proj.lora_linear_layer.down.weight, processor.to_q_lora.down.weight
HOLDERS, ENDS = ("lora", "lora_linear_layer"), {"down": 0, "up": 1}
# tensors that need no change when A and B do: DoRA's magnitude, VeLoRA's projection of inputs
BESIDE = ("lora_magnitude_vector", "lora_velora_embed", "dora_scale")
MIDDLE = (*SCALED_INSIDE, "lora_mid")
# first letters of the tensors of LyCORIS' other kinds
OTHERS = {"hada_": "LoHa", "lokr_": "LoKr", "oft_": "OFT", "glora_": "GLoRA", "boft_": "BOFT"}


@dataclass(frozen=True)
class Key:
    """What the name of a tensor says: its layer, and the factor A (`side` 0) or B (1) of `adapter`; or `alpha`; or,
    as `reason`, why the layer is no B A.
    """

    layer: str
    mark: str
    side: int | None = None
    adapter: str = ""
    embedding: bool = False
    reason: str = ""


def parse(key: str) -> Key | None:
    """None for a tensor that says nothing about a LoRA layer, such as one of `modules_to_save`."""
    parts = key.removeprefix(PREFIX).split(".")
    if parts[-1] == "alpha":
        return Key(".".join(parts[:-1]), "alpha")
    return _of_diffusers(parts) or _marked(parts) or _of_lycoris(parts)


def _of_diffusers(parts: list[str]) -> Key | None:
    if len(parts) < 3 or parts[-1] != "weight" or parts[-2] not in ENDS:
        return None
    *layer, holder, end, _ = parts
    if holder.endswith("_lora"):
        layer.append(holder.removesuffix("_lora"))
    elif holder not in HOLDERS:
        return None
    return Key(".".join(layer), f"{holder}.{end}", ENDS[end])


def _marked(parts: list[str]) -> Key | None:
    """PEFT's names, and those of kohya and ComfyUI, whose first part may be lora_unet_..."""
    marks = [place for place, part in enumerate(parts) if part in FACTORS]
    marks = marks or [place for place, part in enumerate(parts) if part in (*MIDDLE, *BESIDE)]
    marks = marks or [place for place, part in enumerate(parts) if place and part.startswith("lora_")]
    if not marks:
        return None
    layer, mark, tail = ".".join(parts[: marks[-1]]), parts[marks[-1]], parts[marks[-1] + 1 :]
    embedding, weight = "embedding" in mark, tail[-1:] == ["weight"]
    adapter = tail[:-1] if weight else tail  # PEFT removes its name
    # kohya's script reads lora_down without .weight too
    whole = weight != embedding or (mark in ("lora_down", "lora_up") and not tail)
    if mark in FACTORS and whole and len(adapter) <= 1:
        return Key(layer, mark, FACTORS[mark], ".".join(adapter), embedding)
    if mark in MIDDLE:
        return Key(layer, mark, reason=f"{mark} stands between B and A")
    if mark in BESIDE or (mark, tail[-1:]) in (("lora_B", ["bias"]), ("lora_up", ["bias"])):
        return Key(layer, mark)
    return Key(layer, mark, reason=f"{'.'.join([mark, *tail])} is not known")


def _of_lycoris(parts: list[str]) -> Key | None:
    for place, part in enumerate(parts):
        kind = next((kind for start, kind in OTHERS.items() if part.startswith(start)), None)
        if kind and place:
            return Key(".".join(parts[:place]), part, reason=f"{kind}, no B A")
    return None
