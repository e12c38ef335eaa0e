"""`python -m reflora doctor` on folders as they are found: one line for what cannot be read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapter_cases import A0, B0, add, change_config, change_tensors, put, save, spot
from safetensors.torch import load_file, save_file
from torch import Tensor

from reflora import __main__ as program
from reflora import adapters


def config_of(text: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / adapters.CONFIG).write_bytes(text)


def weights_of(content: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / adapters.WEIGHTS).write_bytes(content((folder / adapters.WEIGHTS).read_bytes()))


def into_subfolders(folder: Path) -> None:
    for name in (adapters.CONFIG, adapters.WEIGHTS):
        (folder / name).unlink()
    for name in ("one", "two"):
        save(folder / name)


def as_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


def spelt_twice(key: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({key.removeprefix("base_model.model."): torch.ones_like(tensors[key])})


def grouped(tensors: dict[str, Tensor]) -> None:
    for key in tensors:
        tensors[key] = torch.ones(4, 12, 3) if "lora_A" in key else torch.ones(10, 2, 1)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 12345\n"
UNREADABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "got no such folder or file. Pass a folder or file on this machine"),
    "a file": (as_file, "got an empty file"),
    "nothing in it": (lambda folder: [path.unlink() for path in folder.iterdir()], "got none there"),
    "several adapters": (into_subfolders, "got adapters in folders of it: one, two. Pass one of them, as .*one"),
    "a pickle": (
        lambda folder: (folder / adapters.WEIGHTS).rename(folder / "adapter_model.bin"),
        "got adapter_model.bin, a pickle, .* save_pretrained it",
    ),
    "no config": (
        lambda folder: (folder / adapters.CONFIG).unlink(),
        "a folder with adapter_config.json, got none there",
    ),
    "another kind": (
        lambda folder: save_file({"prompt": torch.zeros(3)}, folder / adapters.WEIGHTS),
        "expected a LoRA adapter, got 1 tensors, none named lora_A and lora_B",
    ),
    "git-lfs": (weights_of(lambda _: LFS), "got a pointer of Git LFS. Run git lfs pull"),
    "empty": (weights_of(lambda _: b""), "got an empty file"),
    "truncated": (weights_of(lambda whole: whole[:-40]), "got a damaged file .*not fully covered"),
    "head cut": (weights_of(lambda whole: whole[:20]), "got a damaged file"),
    "a list": (config_of(b"[1, 2]"), "expected a JSON object, got list"),
    "half of a config": (config_of(b'{"r": 4,'), "expected JSON, got text that is not"),
    "not UTF-8": (config_of("{'ä': 1}".encode("utf-16")), "expected JSON in UTF-8, got bytes"),
    "empty config": (config_of(b""), "expected JSON, got text that is not"),
    "deep config": (config_of(b"[" * 100_000), "expected JSON, got text that is not"),
    "r a text": (change_config(r="4"), "r: expected an integer > 0, got '4'"),
    "r null": (change_config(r=None), "r: expected an integer > 0, got None"),
    "no r": (config_of(b'{"peft_type": "LORA", "target_modules": ["q", "v"]}'), "r: expected an integer > 0, got none"),
    "r true": (change_config(r=True), "r: expected an integer > 0, got True"),
    "alpha a text": (change_config(lora_alpha="8"), "lora_alpha: expected a finite number, got '8'"),
    "alpha_pattern of texts": (change_config(alpha_pattern={"q": "8"}), "alpha_pattern: expected names with finite"),
    "rank_pattern of lists": (change_config(rank_pattern={"q": [True]}), "rank_pattern: expected names with integers"),
    "rank_pattern no regex": (change_config(rank_pattern={"(": 4}), "rank_pattern: expected regular expressions"),
    "target_parameters a text": (change_config(target_parameters="w"), "target_parameters: expected a list of names"),
    "blocks that are none": (change_config(use_bdlora=4), "use_bdlora: expected an object, got 4"),
    "no kind": (change_config(peft_type=None), "peft_type: expected 'LORA', got None"),
    "a kind to come": (change_config(peft_type="NEXT"), "peft_type: expected 'LORA', got 'NEXT'"),
    "a variant to come": (change_config(next_config={"x": 1}), "next_config: expected null, .* reflora knows nothing"),
    "a start to come": (change_config(init_lora_weights="next"), "init_lora_weights: expected a start"),
    "A spelt twice": (change_tensors(spelt_twice(A0)), "layers.0.q, lora_A: expected one tensor, got two, .* save it"),
    "B spelt twice": (change_tensors(spelt_twice(B0)), "layers.0.q, lora_B: expected one tensor, got two, .* save it"),
    "all grouped": (change_tensors(grouped), r"got none of 3 \(layers.0.q: grouped convolution\)"),
}


@pytest.mark.parametrize("spoilt", UNREADABLE)
def test_what_cannot_be_read_gets_one_line(spoilt: str, saved: Path, tmp_path: Path) -> None:
    change, said = UNREADABLE[spoilt]
    change(saved)
    with pytest.raises(SystemExit, match=f"^reflora doctor: .*{said}") as caught:
        program.main(["doctor", str(saved), "--refactor", str(tmp_path / "out")])
    line = str(caught.value)
    assert len(line) < 300 and ": expected " in line and "\n" not in line and line.endswith(".")
    assert not (tmp_path / "out").exists()


BAD_LAYERS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "NaN": (put(A0, spot(float("nan"))), "not finite"),
    "inf": (put(B0, spot(float("inf"))), "not finite"),
    "no A": (lambda tensors: tensors.pop(A0), "A is missing"),
    "no B": (lambda tensors: tensors.pop(B0), "B is missing"),
    "shapes": (put(B0, lambda B: B[:, :3].contiguous()), "A (4, 12) and B (10, 3) do not match"),
    "three dimensions": (put(A0, lambda A: A[None].clone()), "A (1, 4, 12) and B (10, 4) do not match"),
    "flat": (put(A0, lambda A: A.flatten().clone()), "not gathered from ZeRO-3 or FSDP"),
    "no elements": (put(B0, lambda B: B[:0].clone()), "not gathered from ZeRO-3 or FSDP"),
    "int8": (put(A0, lambda A: A.to(torch.int8)), "int8 factors"),
    "float8": (put(B0, lambda B: B.to(torch.float8_e4m3fn)), "float8_e4m3fn factors"),
    "complex": (put(A0, lambda A: A.to(torch.complex64)), "complex64 factors"),
    "bias of A": (add({A0.replace("weight", "bias"): torch.ones(4)}), "lora_A.bias is not known"),
    "a new tensor": (add({A0.replace("A.weight", "next"): torch.ones(4)}), "lora_next is not known"),
    "AdaLoRA's scale": (add({A0.replace("A.weight", "E"): torch.ones(4)}), "lora_E stands between B and A"),
    "another rank": (add({A0: torch.ones(6, 12), B0: torch.ones(10, 6)}), "A has 6 rows, not 4"),
    "grouped": (add({A0: torch.ones(4, 12, 3), B0: torch.ones(10, 2, 1)}), "grouped convolution"),
}


@pytest.mark.parametrize("spoilt", BAD_LAYERS)
def test_a_bad_layer_is_told_of_and_copied_as_it_is(
    spoilt: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (change, status), out = BAD_LAYERS[spoilt], tmp_path / "out"
    change_tensors(change)(saved)
    assert program.main(["doctor", str(saved), "--refactor", str(out)]) == 0
    printed = capsys.readouterr().out
    (row,) = [line for line in printed.splitlines() if line.startswith("layers.0.q ")]
    assert row.endswith(status) and f"\ncopied as they are ({status}): layers.0.q\n" in printed
    assert "layers.0.v" in printed and "the worst conditioned is layers" in printed
    before, after = load_file(saved / adapters.WEIGHTS), load_file(out / adapters.WEIGHTS)
    assert before.keys() == after.keys()
    for key, factor in before.items():
        assert torch.equal(factor.view(torch.uint8), after[key].view(torch.uint8)) == (".0.q." in key), key


def test_a_picture_leaves_bad_layers_out(saved: Path, tmp_path: Path) -> None:
    change_tensors(put(A0, spot(float("nan"))))(saved)
    assert program.main(["doctor", str(saved), "--png", str(tmp_path / "it.png")]) == 0
    change_tensors(lambda tensors: [factor.fill_(float("nan")) for factor in tensors.values()])(saved)
    with pytest.raises(SystemExit, match="expected layers with finite factors, got none"):
        program.main(["doctor", str(saved), "--png", str(tmp_path / "none.png")])


def test_lines_are_short_however_large_the_model(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = f"base_model.model.{'deep.' * 80}"
    tensors = {f"{path}{index}.lora_A.weight": torch.ones(2, 3) for index in range(500)}
    save_file({**load_file(saved / adapters.WEIGHTS), **tensors}, saved / adapters.WEIGHTS)
    assert program.main(["doctor", str(saved)]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) < 300
    save_file(tensors, saved / adapters.WEIGHTS)
    with pytest.raises(SystemExit, match="none of 500") as caught:
        program.main(["doctor", str(saved)])
    assert len(str(caught.value)) < 300
