"""An adapter's folder: what is in it, and a copy with new factors that is whole or absent."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import NoReturn

from torch import Tensor

from ..checks import fail
from .rules import CONFIG, shown

WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
# files of Trainer, accelerate, FSDP and DeepSpeed: their moments and counts belong to the old factors. Then what
# belongs to a place (git, the Hub's cache), and factors in a second file
RUN = (
    "optimizer.*", "optimizer_[0-9]*", "scheduler.*", "scheduler_[0-9]*", "scaler.*", "rng_state*", "random_states_*",
    "sampler*.bin", "dl_state_dict*", "custom_checkpoint_*", "trainer_state.json", "training_args.bin", "checkpoint-*",
    "global_step*", "latest", "latest_universal", "zero_to_fp32.py", "pytorch_model_fsdp*", "runs", "wandb",
    "events.out.tfevents*",
)  # fmt: skip
ELSEWHERE = (".git", ".cache", PICKLE)


def check_folder(folder: Path) -> None:
    """Raises ValueError, with the remedy, unless both files of an adapter are there."""
    for name in (WEIGHTS, CONFIG):
        if (folder / name).is_file():
            continue
        got, remedy = "none there", "Pass a folder written by PeftModel.save_pretrained, with safetensors."
        if folder.is_file():
            got, remedy = "a file", "Pass the folder it is in."
        elif not folder.is_dir():
            got, remedy = (
                "no such folder",
                "Pass a folder on this machine; hf download fetches one from the Hub.",
            )
        elif (folder / name).is_dir():
            got = "a folder of that name"
        elif inner := adapters_in(folder):
            got = f"adapters in folders of it: {shown(', '.join(inner[:3]))}"
            remedy = f"Pass one of them, as {shown(folder / inner[0])}."
        elif name == WEIGHTS and (folder / PICKLE).is_file():
            got = f"{PICKLE}, a pickle, which can run code"
            remedy = "Load it with PeftModel.from_pretrained and save_pretrained it: that writes safetensors."
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


def check_place(folder: Path, out: Path) -> None:
    """Raises FileExistsError if `out` exists, ValueError if it lies in `folder`."""
    inside, real = (Path(os.path.realpath(path)) for path in (folder, out))
    if inside in (real, *real.parents):
        fail(f"--refactor {shown(out)}", "a folder outside the adapter's", "one in it", "Pass another OUT.")
    if os.path.lexists(out):
        got = "a folder that is there" if out.is_dir() else "a file that is there"
        fail(f"--refactor {shown(out)}", "a name not taken", got, "Remove it or pass another OUT.", FileExistsError)
    if below_a_file(out):
        fail(f"--refactor {shown(out)}", "a folder to write", "a file on the way", "Pass another OUT.")


def below_a_file(path: Path) -> bool:
    return not os.path.isdir(next(filter(os.path.lexists, path.parents), "."))


def contents(folder: Path) -> tuple[list[Path], list[str]]:
    """Folders and files beside the weights, a folder before what is in it, and the names of what is left out.

    Links are followed, dead ones dropped. Raises ValueError for what cannot be copied.
    """
    names = _names(folder)
    left_out = [name for name in names if any(fnmatch(name, one) for one in RUN + ELSEWHERE)]
    above = (Path(os.path.realpath(folder)),)
    return list(_below(folder, [name for name in names if name not in (*left_out, WEIGHTS)], above)), left_out


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


def write_copy(folder: Path, out: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> list[str]:
    """Copy `folder` to `out` with `tensors` as its weights. Returns the names of what was left out.

    Raises FileExistsError, ValueError and OSError; `out` is then whole or absent.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    check_place(folder, out)
    paths, left_out = contents(folder)
    part = out.parent / f".{out.name[:100]}.{os.getpid()}.part"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir()
        for path in paths:
            _copy(path, part / path.relative_to(folder))
        save_file(dict(tensors), str(part / WEIGHTS), dict(metadata) if metadata else None)
        shutil.copymode(folder / WEIGHTS, part / WEIGHTS)  # safetensors makes it readable by the owner alone
        part.rename(out)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        remedy = "Pass an OUT that can be written, with room for the adapter."
        fail(f"--refactor {shown(out)}", "a folder to write", shown(reason, 90), remedy, OSError)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return left_out


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
