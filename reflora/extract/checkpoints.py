"""The weights of a model on disk, a tensor at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapters import shown
from ..checks import fail

NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors")
INDEX = ".index.json"


class Checkpoint:
    """A folder of transformers or diffusers, sharded or not, or a safetensors file; nothing is read until it is asked
    for. `shapes` has every tensor.

    Raises ValueError where there is no such file, or a shard is missing, and OSError.
    """

    def __init__(self, path: Path):
        from safetensors import SafetensorError, safe_open

        self.path, self.shapes, self._homes = path, dict[str, tuple[int, ...]](), dict[str, Any]()
        for file in _files(path):
            try:
                shard = safe_open(str(file), framework="pt")
            except (SafetensorError, OSError) as error:
                got = f"one that cannot be read ({shown(error, 60)})"
                fail(shown(file), "a safetensors file", got, "Copy or download it again.")
            for name in shard.keys():  # noqa: SIM118  # not a dictionary
                self._homes[name] = shard
                self.shapes[name] = tuple(shard.get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        return self._homes[name].get_tensor(name)

    def config(self) -> dict[str, Any]:
        """config.json, or nothing where there is none that can be read."""
        try:
            found = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    for name in NAMES:
        index = path / f"{name}{INDEX}"
        if index.is_file():
            try:
                shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                fail(shown(index), "an index of shards", type(error).__name__, "Copy or download it again.")
            missing = [shard for shard in shards if not (path / shard).is_file()]
            if missing:
                fail(shown(path), "every shard of its index", f"no {shown(missing[0])}", "Copy or download it again.")
            return [path / shard for shard in shards]
        if (path / name).is_file():
            return [path / name]
    got = "no such folder or file" if not path.exists() else "none there"
    fail(shown(path), f"a folder with {NAMES[0]} or a safetensors file", got, "Save the model with save_pretrained.")
