"""An adapter's folder: what is in it, and a copy with new factors that is whole or absent."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path

from torch import Tensor

from ..contract import fail
from .rules import CONFIG, shown

WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
# of Trainer, accelerate, FSDP and DeepSpeed: their moments and counts belong to the old factors. Then what belongs to
# a place (git, the Hub's cache), and factors in a second file
RUN = (
    "optimizer.*", "optimizer_[0-9]*", "scheduler.*", "scheduler_[0-9]*", "scaler.*", "rng_state*", "random_states_*",
    "sampler*.bin", "dl_state_dict*", "custom_checkpoint_*", "trainer_state.json", "training_args.bin", "checkpoint-*",
    "global_step*", "latest", "latest_universal", "zero_to_fp32.py", "pytorch_model_fsdp*", "runs", "wandb",
    "events.out.tfevents*",
)  # fmt: skip
ELSEWHERE = (".git", ".cache", PICKLE)


def check_folder(folder: Path) -> None:
    """Raises ValueError, with the remedy, where the two files of an adapter are not there."""
    for name in (WEIGHTS, CONFIG):
        if (folder / name).is_file():
            continue
        got, remedy = "none there", "Pass what PeftModel.save_pretrained(FOLDER) has written, with safetensors."
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
    """The tensors of a safetensors file and its metadata; raises ValueError where it is none."""
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
    """Raises FileExistsError where `out` is taken, ValueError where it lies in `folder`."""
    inside = folder.resolve()
    if inside in (out.resolve(), *out.resolve().parents):
        fail(f"--refactor {shown(out)}", "a folder outside of the adapter's", "one in it", "Pass another OUT.")
    if os.path.lexists(out):
        got = "a folder that is there" if out.is_dir() else "a file that is there"
        fail(f"--refactor {shown(out)}", "a name not taken", got, "Remove it or pass another OUT.", FileExistsError)
    if not next((parent for parent in out.parents if parent.exists()), Path()).is_dir():
        fail(f"--refactor {shown(out)}", "a folder to write", "a file on the way", "Pass another OUT.")


def write_copy(folder: Path, out: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> list[str]:
    """`folder` at `out` with `tensors` as its weights; the names of what was left out.

    Raises FileExistsError, ValueError and OSError; `out` is whole then, or not there.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    check_place(folder, out)
    left_out = sorted(p.name for p in folder.iterdir() if any(fnmatch(p.name, one) for one in RUN + ELSEWHERE))
    part = out.parent / f".{out.name[:100]}.{os.getpid()}.part"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        skipped = {*left_out, WEIGHTS}

        def skip(place: str, names: list[str]) -> set[str]:
            return skipped.intersection(names) if Path(place) == folder else set()

        shutil.copytree(folder, part, ignore=skip, ignore_dangling_symlinks=True)
        save_file(dict(tensors), str(part / WEIGHTS), dict(metadata) if metadata else None)
        shutil.copymode(folder / WEIGHTS, part / WEIGHTS)  # safetensors writes for the owner alone
        part.rename(out)
    except (OSError, SafetensorError) as error:
        reason = error.args[0][0][2] if isinstance(error, shutil.Error) else getattr(error, "strerror", None) or error
        remedy = "Pass an OUT that can be written, with room for the adapter."
        fail(f"--refactor {shown(out)}", "a folder to write", shown(reason, 90), remedy, OSError)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return left_out
