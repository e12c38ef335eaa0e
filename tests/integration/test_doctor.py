"""`python -m reflora` and `python -m reflora doctor` on adapters that PEFT has saved."""

from __future__ import annotations

import io
import os
import sys
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from adapter_cases import change_tensors
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reflora import __main__ as program
from reflora import adapters, doctor
from reflora.backends import triton_backend


def base() -> nn.Module:
    torch.manual_seed(0)
    layers = {"embedding": nn.Embedding(9, 12), "conv": nn.Conv1d(12, 10, 3, padding=1)}
    return nn.Sequential(OrderedDict(layers, first=nn.Linear(10, 16), last=nn.Linear(16, 5)))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Factors of unlike sizes; one layer is at PEFT's start, B = 0."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["embedding", "conv", "first", "last"])
    model = get_peft_model(base(), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=3.0 if "_A" in name else 0.05)
        if "last.lora_B" in name:
            nn.init.zeros_(parameter)
    model.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def test_report(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png = tmp_path / "pictures" / "adapter.png"
    assert program.main(["doctor", str(saved), "--png", str(png)]) == 0
    printed = capsys.readouterr().out
    for word in ("embedding", "conv", "first", "last", "degenerate", "eff. rank", "4 layers"):
        assert word in printed
    assert png.read_bytes().startswith(b"\x89PNG")
    found = {one.name: one for one in doctor.layers_of(adapters.Adapter(saved))}
    model = PeftModel.from_pretrained(base(), str(saved)).base_model.model
    A, B = (getattr(model.first, side)["default"].weight.detach().double() for side in ("lora_A", "lora_B"))
    one = found["first"]
    assert one.norm == pytest.approx(float((B @ A).norm()), rel=1e-9)
    assert one.scale == pytest.approx(float(B.norm() / A.norm()), rel=1e-6)
    Ga, Gb = A @ A.mT, B.mT @ B
    assert one.balance == pytest.approx(float((Ga - Gb).norm() / Ga.norm()), rel=1e-6)
    share = torch.linalg.svdvals(B @ A)[:4]
    share = share / share.sum()
    assert one.effective_rank == pytest.approx(float((-share * share.log()).sum().exp()), rel=1e-6)
    assert found["last"].status == "degenerate" and found["last"].effective_rank == found["last"].norm == 0
    assert found["last"].stable_rank == 0 and 1 < one.stable_rank < one.effective_rank
    assert "one direction" not in printed


def test_a_collapsed_adapter_is_told_of(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def collapse(tensors: dict[str, Tensor]) -> None:
        for name, factor in tensors.items():
            if "_B" in name:
                factor[:, 1:] = factor[:, :1]

    change_tensors(collapse)(saved)
    program.main(["doctor", str(saved)])
    assert "stable rank 1.00 in the median: nearly all of B A is one direction" in capsys.readouterr().out


def test_a_picture_without_matplotlib(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = tmp_path / "balanced"
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        program.main(["doctor", str(saved), "--refactor", str(out), "--png", str(tmp_path / "adapter.png")])
    assert (out / "adapter_model.safetensors").exists()  # what needs no picture is done


@pytest.mark.parametrize(("name", "written"), [("pic", "pic.png"), ("pic.PNG", "pic.PNG"), ("a\tb", "a\tb.png")])
def test_a_picture_is_where_the_doctor_says(
    name: str, written: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "p"
    program.main(["doctor", str(saved), "--png", str(folder / name)])
    assert [path.name for path in folder.iterdir()] == [written]
    assert (folder / written).read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {adapters.shown(folder / written)}"


NO_PICTURE = {
    "empty": ("", r" \.: expected a file to write, got a folder"),
    "a folder": ("dir.png", "dir.png: expected a file to write, got a folder that is there"),
    "a folder with .png": ("dir", "dir: expected a file to write, got a folder that is there"),
    "a pipe": ("pipe.png", "expected a file to write, got a pipe or device"),
    "another kind": ("pic.xyz", "expected a name that ends in .png, got .xyz. Pass another FILE"),
    "below a file": ("file/pic.png", "expected a file to write, got a file on the way"),
}


@pytest.mark.parametrize("case", NO_PICTURE)
def test_a_picture_that_cannot_be_is_refused_first(
    case: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dir.png").mkdir()
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "pipe.png")
    where, said = NO_PICTURE[case]
    with pytest.raises(SystemExit, match=f"^reflora doctor: --png.*{said}"):
        program.main(["doctor", str(saved), "--refactor", str(tmp_path / "out"), "--png", where])
    assert capsys.readouterr().out == "" and not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["/proc/pic.png", f"{'long' * 100}.png"], ids=["unwritable", "too long"])
def test_a_picture_that_cannot_be_written(place: str, saved: Path) -> None:
    with pytest.raises(SystemExit, match="^reflora doctor: --png .*: expected a file to write, got [A-Z].* FILE.$"):
        program.main(["doctor", str(saved), "--png", place])


def test_names_that_the_terminal_cannot_show(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = load_file(saved / adapters.WEIGHTS)
    renamed = {key.replace("first", "pr\u0435mier"): factor for key, factor in tensors.items()}
    save_file(renamed, saved / adapters.WEIGHTS, {"format": "pt"})
    out, written = tmp_path / "\u4e2d", io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252"))
        assert program.main(["doctor", str(saved), "--refactor", str(out)]) == 0
        sys.stdout.flush()
        printed = written.getvalue().decode("cp1252")
    assert (out / adapters.WEIGHTS).exists()
    assert "\npr\\u0435mier " in printed and "\\u4e2d: 3 layers balanced" in printed


def test_what_serves(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "unavailable", lambda device: "not today")
    assert program.main([]) == 0
    printed = capsys.readouterr().out
    assert "torch   ok" in printed and f"torch {torch.__version__.split('+')[0]}" in printed
    assert "triton  -  not today" in printed
    wrong = SimpleNamespace(status=torch.zeros(24))
    monkeypatch.setattr(program, "refactor_", lambda pairs, backend: wrong)
    assert program.main([]) == 1 and "WRONG" in capsys.readouterr().out
