"""A saved adapter: its tensors, its LoRA pairs, and a copy with other factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checks import fail
from .alone import read_alone
from .folder import WEIGHTS, adapters_in, check_place, contents, read_tensors, weights_of, write_copy
from .rules import CONFIG, read_config, read_rules, shown
from .stored import read_stored


@dataclass(frozen=True)
class Copied:
    """left_out: files of a training run. adapters: subfolders with adapters of their own, copied as they are."""

    left_out: list[str]
    adapters: list[str]


class Adapter:
    """The tensors of a folder written by `PeftModel.save_pretrained` or by diffusers, or of one safetensors file, with
    the names that PEFT, kohya's sd-scripts, ComfyUI or diffusers give them.

    `stored` are its layers; `pairs` those whose update is known to be B A.

    Raises ValueError where there is no safetensors file (a pickle is not read: it can run code), no config in a folder
    of PEFT, no LoRA pair, or an adapter whose update is not known to be B A.
    """

    def __init__(self, path: Path):
        self.path = path
        self.weights = weights_of(path)
        self.config: dict[str, Any] | None = None
        if self.weights.name == WEIGHTS:
            self.config = read_config(path)
        self.tensors, self.metadata = read_tensors(self.weights)
        self.rules = (
            read_alone(self.metadata, shown(self.weights))
            if self.config is None
            else read_rules(self.config, shown(path / CONFIG))
        )
        self.stored = read_stored(self.tensors, self.rules)
        self.pairs = [one.pair for one in self.stored if one.pair]
        if not any(one.key_A or one.key_B for one in self.stored):
            others = f"; {shown(self.stored[0].name, 30)}: {self.stored[0].reason}" if self.stored else ""
            got = f"{len(self.tensors)} tensors, none named lora_A and lora_B, or lora_down and lora_up{others}"
            fail(shown(path), "a LoRA adapter", got, "Other kinds of adapters have no such factors.")
        if not self.pairs:
            first = self.stored[0]
            got = f"none of {len(self.stored)} ({shown(first.name, 40)}: {shown(first.reason)})"
            fail(shown(path), "layers whose update is B A", got, "Leave this adapter as it is.")

    def check_out(self, out: Path, what: str) -> None:
        """Whether a copy can be written to `out`, before the work; raises what `write` does."""
        check_place(self.path, out, what)
        contents(self.path, self.weights.name)

    def write(
        self,
        out: Path,
        tensors: Mapping[str, Tensor],
        what: str,
        config: Mapping[str, Any] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Copied:
        """A copy with these tensors, and with this configuration and metadata, or its own for None.

        Raises FileExistsError if `out` exists, ValueError and OSError; `out` is then whole or absent.
        """
        files: dict[str, Any] = {self.weights.name: tensors}
        if config is not None:
            files[CONFIG] = config
        left_out = write_copy(self.path, out, files, self.metadata if metadata is None else metadata, what)
        return Copied(left_out, [name for name in adapters_in(self.path) if name not in left_out])
