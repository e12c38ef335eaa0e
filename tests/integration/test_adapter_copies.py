"""The balanced copy of `python -m reflora doctor FOLDER --refactor OUT`: what is in it, and whole or absent."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import A0, B0, add, change_config, change_tensors, put
from safetensors.torch import load_file
from torch import Tensor

from reflora import __main__ as program
from reflora import adapters, doctor
from reflora.doctor import balanced


def test_of_a_training_run_only_the_adapter_is_copied(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_1.pth", "latest"]
    run += ["trainer_state.json", "training_args.bin", "zero_to_fp32.py", "random_states_0.pkl", "adapter_model.bin"]
    folders = ["global_step12", "checkpoint-3", "runs", ".git", "pytorch_model_fsdp_0", "optimizer_0"]
    kept = ["README.md", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
    kept += ["chat_template.jinja", "vocab.txt", "optimizer-notes.md", "latest.md"]
    for name in run + kept:
        (saved / name).write_text(name)
    for name in folders:
        (saved / name).mkdir()
        (saved / name / "file").write_text(name)
    shutil.copytree(saved, saved / "other", ignore=lambda *_: run + folders)
    out = tmp_path / "out"
    program.main(["doctor", str(saved), "--refactor", str(out)])
    assert {path.name for path in out.iterdir()} == {*kept, "other", adapters.CONFIG, adapters.WEIGHTS}
    assert (out / "README.md").read_text() == "README.md"
    assert (out / adapters.CONFIG).read_bytes() == (saved / adapters.CONFIG).read_bytes()
    printed = capsys.readouterr().out
    assert "from a training run or the old factors: .git, adapter_model.bin, checkpoint-3 and 15 more" in printed
    assert "adapters of their own, copied as they are: other" in printed


def test_links_are_followed_and_dead_ones_left(saved: Path, tmp_path: Path) -> None:
    """A snapshot in the Hub's cache is all relative links."""
    snapshot, out = tmp_path / "snapshot", tmp_path / "out"
    snapshot.mkdir()
    (saved / "inner").mkdir()
    (saved / "inner" / "notes.md").write_text("notes")
    for path in saved.iterdir():
        (snapshot / path.name).symlink_to(Path("..", saved.name, path.name))
    (snapshot / "gone").symlink_to(tmp_path / "nowhere")
    (snapshot / "itself").symlink_to("itself")
    assert program.main(["doctor", str(snapshot), "--refactor", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == [adapters.CONFIG, adapters.WEIGHTS, "inner"]
    assert (out / "inner" / "notes.md").read_text() == "notes"
    assert not any(path.is_symlink() for path in out.rglob("*"))


def test_what_cannot_be_balanced_stays(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """B = 0, as PEFT starts, and experts of which one has a NaN."""
    path, A = "base_model.model.experts.lora", torch.randn(8, 5)
    A[5] = float("nan")  # of the second expert
    change_tensors(add({f"{path}_A.weight": A, f"{path}_B.weight": torch.randn(6, 8)}))(saved)
    change_tensors(put(B0, torch.zeros_like))(saved)
    change_config(target_parameters=["experts.w"])(saved)
    assert program.main(["doctor", str(saved), "--refactor", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "2 layers balanced" in printed and "\ncopied as they are (degenerate): layers.0.q\n" in printed
    assert "\ncopied as they are (not finite): experts\n" in printed
    before, after = load_file(saved / adapters.WEIGHTS), load_file(tmp_path / "out" / adapters.WEIGHTS)
    for key, factor in before.items():
        assert torch.equal(factor.nan_to_num(7), after[key].nan_to_num(7)) == ("experts" in key or ".0.q." in key), key


def one_row_twice(tensors: dict[str, Tensor]) -> None:
    tensors[A0][1] = tensors[A0][0]


def nearly_cancelled(tensors: dict[str, Tensor]) -> None:
    """B A is a thousandth of what its halves are: any rounding of these factors would move it."""
    A, B = tensors[A0][:2], tensors[B0][:, :2]
    tensors[A0] = torch.cat([A, A])
    tensors[B0] = torch.cat([B, -(B + 1e-3 * torch.randn(10, 2))], dim=1)


def ranks_above_the_width(tensors: dict[str, Tensor]) -> None:
    for key in tensors:
        tensors[key] = torch.randn(14, 12) if "lora_A" in key else torch.randn(10, 14)


@pytest.mark.parametrize(
    ("spoil", "rank", "layers"),
    [(one_row_twice, 4, ["0.q"]), (nearly_cancelled, 4, ["0.q"]), (ranks_above_the_width, 14, ["0.q", "0.v", "1.q"])],
    ids=["one row twice", "nearly cancelled", "ranks above the width"],
)
def test_a_degenerate_layer_is_copied_bit_for_bit(
    spoil: Callable[[dict[str, Tensor]], None], rank: int, layers: list[str], saved: Path, tmp_path: Path
) -> None:
    change_tensors(spoil)(saved)
    change_config(r=rank)(saved)
    written = doctor.write_balanced(adapters.Adapter(saved), tmp_path / "out")
    assert written.kept == {"degenerate": [f"layers.{layer}" for layer in layers]}
    assert written.balanced == 3 - len(layers)
    assert 0 < written.moved < 1e-6 if written.balanced else written.moved == 0
    before, after = load_file(saved / adapters.WEIGHTS), load_file(tmp_path / "out" / adapters.WEIGHTS)
    for key, factor in before.items():
        assert torch.equal(factor, after[key]) == any(f".{layer}." in key for layer in layers), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_degenerate_expert_stays_and_the_others_are_balanced(dtype: torch.dtype, saved: Path, tmp_path: Path) -> None:
    path, A, B = "base_model.model.experts.lora", torch.randn(12, 9), 0.1 * torch.randn(7, 12)
    A[5] = A[4]  # rows 4 to 7 are of the second expert, and columns 1, 4, 7, 10
    change_tensors(add({f"{path}_A.weight": A.to(dtype), f"{path}_B.weight": B.to(dtype)}))(saved)
    change_config(target_parameters=["experts.w"])(saved)
    written = doctor.write_balanced(adapters.Adapter(saved), tmp_path / "out")
    assert written.kept == {"degenerate": ["experts[1]"]} and written.balanced == 5
    before, after = load_file(saved / adapters.WEIGHTS), load_file(tmp_path / "out" / adapters.WEIGHTS)
    old_A, new_A = (tensors[f"{path}_A.weight"].unflatten(0, (3, 4)) for tensors in (before, after))
    old_B, new_B = (tensors[f"{path}_B.weight"].unflatten(1, (4, 3)) for tensors in (before, after))
    assert [torch.equal(old_A[e], new_A[e]) for e in range(3)] == [False, True, False]
    assert [torch.equal(old_B[..., e], new_B[..., e]) for e in range(3)] == [False, True, False]
    balance = {one.name: one.balance for one in doctor.layers_of(adapters.Adapter(tmp_path / "out"))}
    assert max(balance["experts[0]"], balance["experts[2]"]) < 4 * torch.finfo(dtype).eps < 0.1 < balance["experts[1]"]


def link_to_itself(folder: Path) -> None:
    (folder / "inner").mkdir()
    (folder / "inner" / "loop").symlink_to(folder)


UNCOPIED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pipe": (lambda folder: os.mkfifo(folder / "pipe"), "pipe: expected a file or a folder, got a named pipe. Move"),
    "a device": (lambda folder: (folder / "null").symlink_to("/dev/null"), "null: .* got a socket or device. Move"),
    "a loop": (link_to_itself, "loop: .* got a link to a folder it lies in. Remove the link"),
    "to be listed": (lambda folder: (folder / "locked").mkdir(), "locked: .* read, got Permission denied. Check"),
    "a name": (lambda folder: (folder / "link").symlink_to("x" * 300), "link: .* read, got File name too long. Check"),
    # opens, and fails when it is read, for root too
    "at reading": (lambda folder: (folder / "README.md").symlink_to("/proc/self/mem"), "README.md: .* read, got .*Che"),
}


@pytest.mark.parametrize("case", UNCOPIED)
def test_what_cannot_be_copied_is_named(
    case: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listdir = os.listdir

    def locked(path: Path) -> list[str]:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return listdir(path)

    change, said = UNCOPIED[case]
    change(saved)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(os, "listdir", locked)
        program.main(["doctor", str(saved), "--refactor", str(tmp_path / "out")])
    caught.match(f"^reflora doctor: .*adapter/.*{said}")
    assert "--refactor" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


# OUT, from where the adapter's folder is
PLACES = {
    "equal": ("adapter", "expected a folder outside the adapter's"),
    "inside": ("adapter/balanced", "expected a folder outside the adapter's"),
    "inside, by a detour": ("adapter/../adapter/a/b", "expected a folder outside"),
    "taken": ("taken", "expected a name not taken, got a folder that is there"),
    "a file": ("adapter/../file", "expected a name not taken, got a file that is there"),
    "below a file": ("file/out", "expected a folder to write, got a file on the way"),
    "a loop on the way": ("adapter/../loop/out", "expected a folder to write, got a file on the way"),
    "unwritable": ("/proc/out", "expected a folder to write"),
    "too long": ("long" * 100, "expected a folder to write, got File name too long"),
}


@pytest.mark.parametrize("place", PLACES)
def test_where_out_cannot_be(place: str, saved: Path) -> None:
    (saved.parent / "file").write_text("mine")
    (saved.parent / "taken").mkdir()
    (saved.parent / "loop").symlink_to("loop")
    where, said = PLACES[place]
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(SystemExit, match=f"^reflora doctor: --refactor .*{said}") as caught:
        program.main(["doctor", str(saved), "--refactor", str(saved.parent / where)])
    assert len(str(caught.value)) < 300
    assert before == {path.name: path.read_bytes() for path in saved.iterdir()}
    assert sorted(path.name for path in saved.parent.iterdir()) == ["adapter", "file", "loop", "taken"]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "^C"])
def test_out_is_whole_or_absent(
    failure: BaseException, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise failure

    monkeypatch.setattr("safetensors.torch.save_file", fails)
    with pytest.raises(KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else SystemExit):
        program.main(["doctor", str(saved), "--refactor", str(tmp_path / "out")])
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_out_gets_the_usual_permissions(saved: Path, tmp_path: Path) -> None:
    (saved / adapters.WEIGHTS).chmod(0o644)
    program.main(["doctor", str(saved), "--refactor", str(tmp_path / "new" / "out")])
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "new" / "out" / adapters.WEIGHTS).stat().st_mode & 0o777 == 0o644
    assert os.stat(tmp_path / "new" / "out").st_mode == os.stat(saved).st_mode == os.stat(tmp_path / "plain").st_mode


def test_a_product_that_moves_is_not_written(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check does not lean on what wrote the factors."""
    refactor_ = balanced.refactor_

    def spoil(pairs: list[Any]) -> Any:
        report = refactor_(pairs)
        pairs[1].A[2] *= 1 + 1e-4
        return report

    monkeypatch.setattr(balanced, "refactor_", spoil)
    with pytest.raises(SystemExit, match="layers.0.v: expected B A that moves by no more than rounding, got .*e-05"):
        program.main(["doctor", str(saved), "--refactor", str(tmp_path / "out")])
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])
def test_rounding_is_no_move(dtype: torch.dtype, scale: float, saved: Path, tmp_path: Path) -> None:
    def cast(tensors: dict[str, Tensor]) -> None:
        tensors.update({key: (scale * factor).to(dtype) for key, factor in tensors.items()})

    change_tensors(cast)(saved)
    written = doctor.write_balanced(adapters.Adapter(saved), tmp_path / "out")
    assert written.moved < torch.finfo(dtype).eps + 1e-14
    assert all(
        one.balance < 4 * torch.finfo(dtype).eps + 1e-12 for one in doctor.layers_of(adapters.Adapter(tmp_path / "out"))
    )


def test_huge_factors_are_measured(saved: Path) -> None:
    tensors = load_file(saved / adapters.WEIGHTS)
    norm = float((tensors[B0].double() @ tensors[A0].double()).norm())
    change_tensors(put(A0, lambda A: A.double() * 1e200))(saved)
    change_tensors(put(B0, lambda B: B.double() * 1e-200))(saved)
    layers = {one.name: one for one in doctor.layers_of(adapters.Adapter(saved))}
    assert layers["layers.0.q"].norm == pytest.approx(norm, rel=1e-6)
