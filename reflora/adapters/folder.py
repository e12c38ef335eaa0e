"""An adapter's folder or file: what is in it, and a copy with new factors that is whole or absent."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from ..checks import fail
from .rules import CONFIG, shown

WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
DIFFUSERS = "pytorch_lora_weights.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# files of Trainer, accelerate, FSDP and DeepSpeed: their moments and counts belong to the old factors. Then what
# belongs to a place (git, the Hub's cache), and factors in a second file
RUN = (
    "optimizer.*", "optimizer_[0-9]*", "scheduler.*", "scheduler_[0-9]*", "scaler.*", "rng_state*", "random_states_*",
    "sampler*.bin", "dl_state_dict*", "custom_checkpoint_*", "trainer_state.json", "training_args.bin", "checkpoint-*",
    "global_step*", "latest", "latest_universal", "zero_to_fp32.py", "pytorch_model_fsdp*", "runs", "wandb",
    "events.out.tfevents*",
)  # fmt: skip
ELSEWHERE = (".git", ".cache", PICKLE)


def weights_of(path: Path) -> Path:
    """The safetensors file of an adapter: `path` itself, or one in that folder, of PEFT or of diffusers.

    Raises ValueError, with the remedy, unless it is there, in PEFT's folder with adapter_config.json.
    """
    if path.is_file():
        if path.name in (WEIGHTS, CONFIG):
            fail(
                shown(path),
                "an adapter's folder, or a file that stands alone",
                "a file of a folder",
                "Pass the folder.",
            )
        if path.suffix in PICKLES:
            got, remedy = f"a pickle ({path.suffix}), which can run code", "Save it as safetensors where you trust it."
            fail(shown(path), "a safetensors file", got, remedy)
        return path
    if (path / DIFFUSERS).is_file() and not (path / WEIGHTS).exists():
        return path / DIFFUSERS
    for name in (WEIGHTS, CONFIG):
        if not (path / name).is_file():
            _fail_absent(path, name)
    return path / WEIGHTS


def _fail_absent(folder: Path, name: str) -> NoReturn:
    got, remedy = "none there", "Pass a folder written by PeftModel.save_pretrained, or a .safetensors file."
    if not folder.is_dir():
        got, remedy = (
            "no such folder or file",
            "Pass a folder or file on this machine; hf download fetches one from the Hub.",
        )
    elif (folder / name).is_dir():
        got = "a folder of that name"
    elif inner := adapters_in(folder):
        got = f"adapters in folders of it: {shown(', '.join(inner[:3]))}"
        remedy = f"Pass one of them, as {shown(folder / inner[0])}."
    elif name == WEIGHTS and (folder / PICKLE).is_file():
        got = f"{PICKLE}, a pickle, which can run code"
        remedy = "Load it with PeftModel.from_pretrained and save_pretrained it: that writes safetensors."
    elif name == WEIGHTS and (alone := sorted(folder.glob("*.safetensors"))):
        got, remedy = f"files of other names ({shown(alone[0].name)})", "Pass the file itself."
    fail(shown(folder), f"a folder with {name}", got, remedy)


def adapters_in(folder: Path) -> list[str]:
    """Names of the folders in `folder` that have an adapter of their own."""
    return sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """The tensors of a safetensors file and its metadata; raises ValueError if it is not one."""
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("reading an adapter needs safetensors: pip install safetensors") from error
    try:
        with path.open("rb") as raw:
            head = raw.read(24)
    except OSError as error:
        fail(shown(path), "a file that can be read", error.strerror, "Check its permissions.", OSError)
    if head.startswith(b"version https://git-lfs"):
        fail(shown(path), "safetensors", "a pointer of Git LFS", "Run git lfs pull in the folder.")
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    except SafetensorError as error:
        got = "an empty file" if not head else f"a damaged file ({str(error).rpartition(': ')[2]})"
        fail(shown(path), "safetensors", got, "Copy or download it again.")


def check_place(adapter: Path, out: Path, what: str) -> None:
    """Raises FileExistsError if `out` exists, ValueError if it lies in the adapter's folder or is no name for a file.

    what: How the user passed it, for messages.
    """
    inside, real = (Path(os.path.realpath(path)) for path in (adapter, out))
    if inside in (real, *real.parents):
        fail(f"{what} {shown(out)}", "a folder outside the adapter's", "one in it", "Pass another OUT.")
    check_free(out, what)
    if adapter.is_file() and out.suffix != ".safetensors":
        got = f"a name that ends in {shown(out.suffix)}" if out.suffix else "a name without it"
        fail(f"{what} {shown(out)}", "a file, .safetensors", got, "The adapter is one file: so is what is written.")


def check_free(out: Path, what: str) -> None:
    """Raises FileExistsError if `out` exists, ValueError where it cannot be made."""
    if os.path.lexists(out):
        got = "a folder that is there" if out.is_dir() else "a file that is there"
        fail(f"{what} {shown(out)}", "a name not taken", got, "Remove it or pass another OUT.", FileExistsError)
    if below_a_file(out):
        fail(f"{what} {shown(out)}", "a folder to write", "a file on the way", "Pass another OUT.")


def below_a_file(path: Path) -> bool:
    return not os.path.isdir(next(filter(os.path.lexists, path.parents), "."))


def contents(folder: Path, weights: str) -> tuple[list[Path], list[str]]:
    """Folders and files beside `weights`, a folder before what is in it, and the names of what is left out.

    Links are followed, dead ones dropped. Nothing lies beside an adapter that is one file. Raises ValueError for what
    cannot be copied.
    """
    if folder.is_file():
        return [], []
    names = _names(folder)
    left_out = [name for name in names if any(fnmatch(name, one) for one in RUN + ELSEWHERE)]
    above = (Path(os.path.realpath(folder)),)
    return list(_below(folder, [name for name in names if name not in (*left_out, weights)], above)), left_out


def _below(place: Path, names: list[str], above: tuple[Path, ...]) -> Iterator[Path]:
    for path in (place / name for name in names):
        try:
            mode = path.stat().st_mode
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP):
                continue
            _unreadable(path, error)
        if stat.S_ISDIR(mode):
            real = Path(os.path.realpath(path))
            if any(one.is_relative_to(real) for one in above):
                fail(shown(path), "a folder that ends", "a link to a folder it lies in", "Remove the link.")
            yield path
            yield from _below(path, _names(path), (*above, real))
        elif stat.S_ISREG(mode):
            yield path
        else:
            kind = "a named pipe" if stat.S_ISFIFO(mode) else "a socket or device"
            fail(shown(path), "a file or a folder", kind, "Move it out of the adapter's folder.")


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        _unreadable(folder, error)


def _unreadable(path: Path, error: OSError) -> NoReturn:
    remedy = "Check its permissions, or move it out of the adapter's folder."
    fail(shown(path), "what can be read", error.strerror, remedy)


def write_copy(
    adapter: Path, out: Path, files: Mapping[str, Any], metadata: Mapping[str, str] | None, what: str
) -> list[str]:
    """Copy `adapter`, a folder or a file, to `out` with `files` in place of its own. Returns the names of what was left
    out.

    Args:
        files: Name in the folder -> tensors for a safetensors file, or what to write as JSON.

    Raises FileExistsError, ValueError and OSError; `out` is then whole or absent.
    """
    check_place(adapter, out, what)
    weights = weights_of(adapter)
    paths, left_out = contents(adapter, weights.name)
    with whole_or_absent(out, what) as part:
        if adapter.is_file():
            _save(part, weights, files[weights.name], metadata)
        else:
            part.mkdir()
            for path in paths:
                _copy(path, part / path.relative_to(adapter))
            for name, content in files.items():
                if name == weights.name:
                    _save(part / name, weights, content, metadata)
                else:
                    write_json(part / name, content)
    return left_out


@contextmanager
def whole_or_absent(out: Path, what: str) -> Iterator[Path]:
    """A name beside `out` to write a file or folder at, which becomes `out` if nothing is raised, or is removed.

    Raises OSError, in a sentence, where it cannot be written.
    """
    from safetensors import SafetensorError

    part = out.parent / f".{out.name[:100]}.{os.getpid()}.part"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield part
        part.rename(out)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        remedy = "Pass an OUT that can be written, with room for the adapter."
        fail(f"{what} {shown(out)}", "a folder to write", shown(reason, 90), remedy, OSError)
    finally:
        shutil.rmtree(part, ignore_errors=True) if part.is_dir() else part.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _save(path: Path, like: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> None:
    from safetensors.torch import save_file

    save_file(dict(tensors), str(path), dict(metadata) if metadata else None)
    shutil.copymode(like, path)  # safetensors makes it readable by the owner alone


def _copy(path: Path, copy: Path) -> None:
    """Raises ValueError where `path` cannot be read, and OSError where `copy` cannot be written."""
    if path.is_dir():
        copy.mkdir()
        return
    with copy.open("wb") as file:
        for chunk in _chunks(path):
            file.write(chunk)
    shutil.copystat(path, copy)


def _chunks(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                yield chunk
    except OSError as error:
        _unreadable(path, error)
