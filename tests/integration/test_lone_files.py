"""`doctor` and `resize` on files of kohya's sd-scripts, ComfyUI and diffusers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lone_file_cases import KOHYA, LAYERS, METADATA, NAMES, kohya, named
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from reflora import __main__ as program
from reflora import adapters


def metadata(path: Path) -> dict[str, str]:
    with safe_open(str(path), "pt") as file:
        return file.metadata() or {}


def product(tensors: dict[str, Tensor], names: tuple[str, str]) -> Tensor:
    A, B = (tensors[name].double().flatten(1) for name in names)
    return B @ A


def nearest(whole: Tensor, rank: int) -> Tensor:
    U, s, Vt = torch.linalg.svd(whole, full_matrices=False)
    return (U[:, :rank] * s[:rank]) @ Vt[:rank]


@pytest.mark.parametrize("alpha", [2.0, 0.3, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_file_of_kohya(
    dtype: torch.dtype, alpha: float | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = kohya(tmp_path / "it.safetensors", dtype, alpha), tmp_path / "new" / "out.safetensors"
    assert program.main(["doctor", str(path)]) == 0
    assert "3 layers" in capsys.readouterr().out
    program.main(["resize", str(path), str(out), "--rank", "3"])
    assert [place.name for place in out.parent.iterdir()] == ["out.safetensors"]
    before, after = load_file(path), load_file(out)
    assert before.keys() == after.keys()
    for name in LAYERS:
        ends = (f"{name}.{KOHYA[0]}", f"{name}.{KOHYA[1]}")
        assert all(after[end].dtype == dtype for end in ends) and after[ends[0]].shape[0] == 3
        old, new = (
            product(tensors, ends) * (float(tensors[f"{name}.alpha"]) / rank if alpha is not None else 1.0)
            for tensors, rank in ((before, 4), (after, 3))
        )
        assert (new - nearest(old, 3)).norm() < 2 * torch.finfo(dtype).eps * old.norm()
    said = metadata(out)
    assert said["ss_network_dim"] == "3" and said["ss_base_model_version"] == "sdxl" and "sshs_model_hash" not in said
    if alpha == 2.0:
        assert float(said["ss_network_alpha"]) == 1.5


def test_ranks_of_a_file_of_kohya_by_energy(tmp_path: Path) -> None:
    path, out = kohya(tmp_path / "it.safetensors", torch.float32), tmp_path / "out.safetensors"
    program.main(["resize", str(path), str(out), "--energy", "0.95"])
    before, after, ranks = load_file(path), load_file(out), set()
    for name in LAYERS:
        ends = (f"{name}.{KOHYA[0]}", f"{name}.{KOHYA[1]}")
        s = torch.linalg.svdvals(product(before, ends)).square()
        rank = int((s.cumsum(0) < 0.95 * s.sum()).sum()) + 1
        assert after[ends[0]].shape[0] == rank and float(after[f"{name}.alpha"]) == rank / 2
        ranks.add(rank)
    assert len(ranks) > 1 and metadata(out)["ss_network_dim"] == metadata(out)["ss_network_alpha"] == "Dynamic"


@pytest.mark.parametrize("kind", NAMES)
def test_names_of_every_kind(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = named(tmp_path / "it.safetensors", NAMES[kind]), tmp_path / "out.safetensors"
    program.main(["doctor", str(path), "--refactor", str(tmp_path / "balanced.safetensors")])
    assert "q" in capsys.readouterr().out.splitlines()[2]
    program.main(["resize", str(path), str(out), "--rank", "2"])
    before, balanced, after = (load_file(one) for one in (path, tmp_path / "balanced.safetensors", out))
    whole = product(before, NAMES[kind])
    assert (product(after, NAMES[kind]) - nearest(whole, 2)).norm() < 1e-6 * whole.norm()
    assert (product(balanced, NAMES[kind]) - whole).norm() < 1e-6 * whole.norm()
    assert not torch.equal(balanced[NAMES[kind][0]], before[NAMES[kind][0]])


def test_a_folder_of_diffusers(tmp_path: Path) -> None:
    folder = tmp_path / "lora"
    folder.mkdir()
    named(folder / adapters.DIFFUSERS, NAMES["diffusers"])
    (folder / "README.md").write_text("mine")
    program.main(["resize", str(folder), str(tmp_path / "out"), "--rank", "2"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", adapters.DIFFUSERS]
    assert load_file(tmp_path / "out" / adapters.DIFFUSERS)[NAMES["diffusers"][0]].shape == (2, 12)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("part", ["unet", ""])
def test_the_configuration_that_diffusers_keeps_in_the_file(part: str, rslora: bool, tmp_path: Path) -> None:
    """A PEFT configuration for each part of the pipeline: r and alpha follow, so that each layer keeps its scale."""
    from peft import LoraConfig

    config = LoraConfig(r=4, lora_alpha=8, use_rslora=rslora, target_modules=["to_q"], init_lora_weights="gaussian")
    start = f"{part}." if part else ""
    said = {start + key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    if part:
        said |= {"text_encoder.r": 16, "text_encoder.lora_alpha": 4}
    path = named(tmp_path / "it.safetensors", NAMES["diffusers"], said)
    (one,) = adapters.Adapter(path).stored
    assert one.scale == pytest.approx(4 if rslora else 2)
    program.main(["resize", str(path), str(tmp_path / "out.safetensors"), "--rank", "1"])
    found = json.loads(metadata(tmp_path / "out.safetensors")["lora_adapter_metadata"])
    assert found[f"{start}r"] == 1 and found[f"{start}lora_alpha"] == (4 if rslora else 2)
    assert (found[f"{start}rank_pattern"], found[f"{start}alpha_pattern"]) == ({}, {})
    if part:
        assert (found["text_encoder.r"], found["text_encoder.lora_alpha"]) == (16, 4)


LEFT = {
    "LoCon with a middle": ("lora_mid.weight", torch.ones(4, 4, 3, 3), "lora_mid stands between B and A"),
    "LoHa": ("hada_w1_a", torch.ones(3, 2), "LoHa, no B A"),
    "LoKr": ("lokr_w1", torch.ones(3, 2), "LoKr, no B A"),
}


@pytest.mark.parametrize("kind", LEFT)
def test_what_is_no_b_a_is_left_as_it_is(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    end, tensor, reason = LEFT[kind]
    path, out = kohya(tmp_path / "it.safetensors"), tmp_path / "out.safetensors"
    name = next(iter(LAYERS)) if kind.startswith("LoCon") else "lora_unet_mid_block"
    before = {**load_file(path), f"{name}.{end}": tensor, f"{name}.alpha": torch.tensor(1.0)}
    save_file(before, path, METADATA)
    program.main(["resize", str(path), str(out), "--rank", "2"])
    assert f"copied as they are ({reason}): {adapters.shown(name, 50)}\n" in capsys.readouterr().out
    after = load_file(out)
    for key in before:
        same = key.startswith(f"{name}.")
        assert torch.equal(before[key], after[key]) == same or key.endswith("alpha"), key


def test_dora_keeps_its_magnitude(tmp_path: Path) -> None:
    path, name = kohya(tmp_path / "it.safetensors"), next(iter(LAYERS))
    save_file({**load_file(path), f"{name}.dora_scale": torch.ones(10, 1)}, path, METADATA)
    program.main(["resize", str(path), str(tmp_path / "out.safetensors"), "--rank", "2"])
    after = load_file(tmp_path / "out.safetensors")
    assert torch.equal(after[f"{name}.dora_scale"], torch.ones(10, 1)) and after[f"{name}.{KOHYA[0]}"].shape == (2, 12)


REFUSED = {
    "a name without it": (["out", "--rank", "2"], "OUT .*out: expected a file, .safetensors, got a name without it"),
    "another name": (["out.ckpt", "--rank", "2"], "expected a file, .safetensors, got a name that ends in .ckpt"),
    "itself": (["it.safetensors", "--rank", "2"], "expected a folder outside the adapter's, got one in it"),
    "below itself": (["it.safetensors/x.safetensors", "--rank", "2"], "outside the adapter's, got one in it"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_where_a_file_cannot_go(case: str, tmp_path: Path) -> None:
    (out, *given), said = REFUSED[case]
    path = kohya(tmp_path / "it.safetensors")
    with pytest.raises(SystemExit, match=f"^reflora resize: .*{said}"):
        program.main(["resize", str(path), str(tmp_path / out), *given])
    assert [one.name for one in tmp_path.iterdir()] == ["it.safetensors"]


UNREAD = {
    "a pickle": ("it.ckpt", r"expected a safetensors file, got a pickle \(.ckpt\), which can run code"),
    "PEFT's file alone": (adapters.WEIGHTS, "or a file that stands alone, got a file of a folder. Pass the folder"),
}


@pytest.mark.parametrize("case", UNREAD)
def test_what_is_not_read(case: str, tmp_path: Path) -> None:
    name, said = UNREAD[case]
    kohya(tmp_path / name)
    with pytest.raises(SystemExit, match=f"^reflora doctor: .*{said}"):
        program.main(["doctor", str(tmp_path / name)])


def test_files_of_other_names_in_a_folder(tmp_path: Path) -> None:
    kohya(tmp_path / "it.safetensors")
    with pytest.raises(SystemExit, match=r"got files of other names \(.*it.safetensors\). Pass the file itself"):
        program.main(["doctor", str(tmp_path)])


@pytest.mark.parametrize(("said", "told"), [("[1]", r"a JSON object, got \[1\]"), ("{", "JSON, got text that is not")])
def test_metadata_that_is_none(said: str, told: str, tmp_path: Path) -> None:
    path = kohya(tmp_path / "it.safetensors")
    save_file(load_file(path), path, {"lora_adapter_metadata": said})
    with pytest.raises(SystemExit, match=f"lora_adapter_metadata: expected {told}"):
        program.main(["doctor", str(path)])
