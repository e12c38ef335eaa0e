"""What is known of an adapter that has no adapter_config.json: a file of kohya, ComfyUI or diffusers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..checks import fail
from .rules import Rules, read_rules, shown

# where diffusers keeps the LoraConfig of each part of a pipeline: {"unet.r": 4, ...}
METADATA = "lora_adapter_metadata"


@dataclass(frozen=True)
class Alone:
    """The rules of a file whose tensors say all: a layer's rank is that of its A, and its scale is 1 unless there is an
    alpha beside the factors.

    parts: By the first words of a layer's name, "" for none, what the file's metadata say about it.
    """

    parts: Mapping[str, Rules]
    alphas = True

    @property
    def block_diagonal(self) -> tuple[str, ...]:
        return sum((rules.block_diagonal for rules in self.parts.values()), ())

    def of(self, name: str) -> tuple[Rules | None, str]:
        """The rules for the layer at `name`, and its name under them."""
        for part, rules in self.parts.items():
            if not part or name.startswith(f"{part}."):
                return rules, name[len(part) + 1 :] if part else name
        return None, name

    def scale(self, name: str) -> float:
        rules, key = self.of(name)
        return rules.scale(key) if rules else 1.0

    def wrong(self, name: str, rows: int) -> str:
        rules, key = self.of(name)
        return rules.wrong(key, rows) if rules else ""

    def experts(self, name: str, rows: int) -> tuple[int, tuple[str, ...]] | str:
        return self.wrong(name, rows) or (1, (name,))


def read_alone(metadata: Mapping[str, str] | None, where: str) -> Alone:
    """Raises ValueError for metadata of diffusers that say anything but plain LoRA."""
    said = (metadata or {}).get(METADATA)
    if said is None:
        return Alone({})
    return Alone({part: read_rules(given, where) for part, given in configs(said, where).items()})


def configs(said: str, where: str) -> dict[str, dict[str, Any]]:
    """The LoraConfig of each part, the longest name first."""
    try:
        flat = json.loads(said)
    except (ValueError, RecursionError) as error:
        fail(f"{where}, {METADATA}", "JSON", f"text that is not ({error})", "Save it again with diffusers.")
    if not isinstance(flat, dict):
        fail(f"{where}, {METADATA}", "a JSON object", shown(repr(flat)), "Save it again with diffusers.")
    parts = sorted({key.rpartition(".")[0] for key in flat}, key=lambda part: (-len(part), part))
    found: dict[str, dict[str, Any]] = {part: {"peft_type": "LORA"} for part in parts}
    for key, value in flat.items():
        part, _, field = key.rpartition(".")
        found[part][field] = value
    return found
