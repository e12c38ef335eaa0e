"""`python -m reflora resize`: every layer has the nearest update of its rank, as PEFT reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import A0, B0, change_config, change_tensors, put, spot
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from test_adapter_kinds import LINEAR, SERVED, SERVED_IN_PART, base, save_adapter
from torch import Tensor

from reflora import __main__ as program
from reflora import adapters, doctor

# PiSSA and the like make the base from r
FROM_RANK = [kind for kind in SERVED if kind.startswith(("pissa", "olora"))]


def updates(folder: Path) -> dict[str, Tensor]:
    """`s B A` of every layer of a model with this adapter, as PEFT computes it: a matrix, or one for each expert."""
    torch.manual_seed(3)
    model = PeftModel.from_pretrained(base(), str(folder)).base_model.model
    found = {}
    for name, module in model.named_modules():
        if getattr(module, "scaling", None) and getattr(module.get_base_layer(), "groups", 1) == 1:
            delta = module.get_delta_weight("default").detach().double()
            found[name] = delta if delta.dim() == 3 and "experts" in name else delta.flatten(1)
    return found


def nearest(whole: Tensor, rank: int) -> Tensor:
    U, s, Vt = torch.linalg.svd(whole, full_matrices=False)
    return (U[..., :rank] * s[..., None, :rank]) @ Vt[..., :rank, :]


def options_of(kind: str) -> tuple[dict[str, Any], dict[str, list[str]]]:
    options, kept = SERVED_IN_PART[kind] if kind in SERVED_IN_PART else (SERVED[kind], {})
    return {"r": 4, "lora_alpha": 8, "target_modules": LINEAR, **options}, kept


@pytest.mark.parametrize("rank", [1, 2, 7])
@pytest.mark.parametrize("kind", [kind for kind in [*SERVED, *SERVED_IN_PART] if kind not in FROM_RANK])
@pytest.mark.filterwarnings("ignore")
def test_every_layer_has_the_nearest_update(
    kind: str, rank: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, kept = options_of(kind)
    folder, out = save_adapter(tmp_path / "adapter", LoraConfig(**options)), tmp_path / "out"
    before = updates(folder)
    program.main(["resize", str(folder), str(out), "--rank", str(rank)])
    after, left = updates(out), {name for names in kept.values() for name in names}
    assert before.keys() == after.keys()
    for name, whole in before.items():
        wanted = whole if name in left else nearest(whole, rank)
        assert (after[name] - wanted).norm() < 1e-5 * whole.norm(), name
    for key, factor in load_file(folder / adapters.WEIGHTS).items():
        if any(f".{name}.lora" in key for name in left):
            assert torch.equal(factor, load_file(out / adapters.WEIGHTS)[key])
    printed = capsys.readouterr().out
    assert f"layers of rank {rank}, " in printed
    for reason, names in kept.items():
        assert f"copied as they are ({reason}): {names[0]}" in printed


@pytest.mark.parametrize("kind", ["every layer", "rsLoRA", "rank and alpha patterns", "experts", "experts and linear"])
@pytest.mark.filterwarnings("ignore")
def test_the_ranks_that_keep_the_energy(kind: str, tmp_path: Path) -> None:
    options, _ = options_of(kind)
    folder, out = save_adapter(tmp_path / "adapter", LoraConfig(**options)), tmp_path / "out"

    def uneven(tensors: dict[str, Tensor]) -> None:
        for place, key in enumerate(sorted(tensors)):
            if "_A" in key:  # spectra that fall at unlike rates
                A = tensors[key]
                tensors[key] = A * (1.2 + place / 4) ** -(torch.arange(len(A)) % 4).view(-1, *[1] * (A.dim() - 1))

    change_tensors(uneven)(folder)
    before = updates(folder)
    program.main(["resize", str(folder), str(out), "--energy", "0.9"])
    after, config = updates(out), json.loads((out / adapters.CONFIG).read_text())
    ranks: dict[str, int] = {}
    for name, whole in before.items():
        s, own = torch.linalg.svdvals(whole), name.replace(".base_layer", "")  # two parameters of a module share a rank
        share = (s.square().cumsum(-1) / s.square().sum(-1, keepdim=True) >= 0.9).int().argmax(-1) + 1
        ranks[own] = max(ranks.get(own, 1), int(share.max()))
    for name, whole in before.items():
        wanted = nearest(whole, ranks[name.replace(".base_layer", "")])
        assert (after[name] - wanted).norm() < 1e-5 * whole.norm(), name
    assert set(config["rank_pattern"].values()) | {config["r"]} == set(ranks.values())


def test_a_rank_bounds_those_of_an_energy(saved: Path, tmp_path: Path) -> None:
    program.main(["resize", str(saved), str(tmp_path / "out"), "--energy", "1", "--rank", "3"])
    assert {one.rank for one in doctor.layers_of(adapters.Adapter(tmp_path / "out"))} == {3}
    program.main(["resize", str(saved), str(tmp_path / "whole"), "--energy", "1"])
    assert {one.rank for one in doctor.layers_of(adapters.Adapter(tmp_path / "whole"))} == {4}


def test_what_is_said_is_what_was_done(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, png = tmp_path / "out", tmp_path / "spectra"
    program.main(["resize", str(saved), str(out), "--rank", "2", "--png", str(png)])
    lines = capsys.readouterr().out.splitlines()
    whole = lost = 0.0
    before, after = load_file(saved / adapters.WEIGHTS), load_file(out / adapters.WEIGHTS)
    for layer in ("layers.0.q", "layers.0.v", "layers.1.q"):
        A, B, new_A, new_B = (
            tensors[f"base_model.model.{layer}.lora_{side}.weight"].double()
            for tensors in (before, after)
            for side in "AB"
        )
        error = float((B @ A - new_B @ new_A).norm() / (B @ A).norm())
        (row,) = [line.split() for line in lines if line.startswith(layer)]
        assert row[1:3] == ["4", "2"] and row[4] == f"{error:.1e}" and row[5] == f"{100 * error**2:.2g}"
        whole, lost = whole + float((B @ A).norm()) ** 2, lost + float((B @ A - new_B @ new_A).norm()) ** 2
    assert (
        f"in all: error {(lost / whole) ** 0.5:.2e} of ||s B A||_F, {100 * lost / whole:.2g} % of its energy"
        in lines[-2]
    )
    assert "3 layers of rank 2, 264 -> 132 numbers" in lines[-3]
    assert lines[-1] == f"wrote {adapters.shown(tmp_path / 'spectra.png')}"
    assert (tmp_path / "spectra.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_dtype_stays_and_the_factors_are_balanced(dtype: torch.dtype, saved: Path, tmp_path: Path) -> None:
    change_tensors(lambda tensors: tensors.update({k: t.to(dtype) for k, t in tensors.items()}))(saved)
    program.main(["resize", str(saved), str(tmp_path / "out"), "--rank", "3"])
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / adapters.WEIGHTS).values()} == {dtype}
    layers = doctor.layers_of(adapters.Adapter(tmp_path / "out"))
    assert all(one.balance < 4 * torch.finfo(dtype).eps + 1e-12 and one.rank == 3 for one in layers)


def test_a_layer_that_is_not_finite_keeps_its_rank(saved: Path, tmp_path: Path, capsys: Any) -> None:
    change_tensors(put(A0, spot(float("nan"))))(saved)
    program.main(["resize", str(saved), str(tmp_path / "out"), "--rank", "2"])
    assert "copied as they are (not finite): layers.0.q" in capsys.readouterr().out
    before, after = load_file(saved / adapters.WEIGHTS), load_file(tmp_path / "out" / adapters.WEIGHTS)
    assert torch.equal(before[A0].nan_to_num(7), after[A0].nan_to_num(7)) and torch.equal(before[B0], after[B0])
    config = json.loads((tmp_path / "out" / adapters.CONFIG).read_text())
    assert (config["r"], config["rank_pattern"]) == (2, {"layers.0.q": 4})
    assert (config["lora_alpha"], config["alpha_pattern"]) == (4, {"layers.0.q": 8})


def test_a_name_that_ends_in_another_layers(saved: Path, tmp_path: Path) -> None:
    """PEFT takes the first pattern that fits the end of a name."""

    def nested(tensors: dict[str, Tensor]) -> None:
        for side, factor in (("A", A0), ("B", B0)):
            tensors[f"base_model.model.deep.layers.0.q.lora_{side}.weight"] = tensors[factor].clone()
        tensors[A0] *= torch.tensor([1, 1e-3, 1e-4, 1e-5])[:, None]

    change_tensors(nested)(saved)
    program.main(["resize", str(saved), str(tmp_path / "out"), "--energy", "0.99"])
    ranks = {one.name: one.rank for one in doctor.layers_of(adapters.Adapter(tmp_path / "out"))}
    assert ranks["layers.0.q"] == 1 < ranks["deep.layers.0.q"]


REFUSED: dict[str, tuple[list[str], str]] = {
    "neither": ([], "rank: expected --rank N or --energy SHARE, got neither"),
    "rank 0": (["--rank", "0"], "--rank: expected an integer >= 1, got 0"),
    "energy 0": (["--energy", "0"], r"--energy: expected a share .* in \(0, 1\], got 0.0"),
    "energy 99": (["--energy", "99"], r"--energy: expected a share .* in \(0, 1\], got 99.0. Pass 0.99"),
    "energy nan": (["--energy", "nan"], r"--energy: expected a share .* in \(0, 1\], got nan"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_asked_for(case: str, saved: Path, tmp_path: Path) -> None:
    given, said = REFUSED[case]
    with pytest.raises(SystemExit, match=f"^reflora resize: {said}") as caught:
        program.main(["resize", str(saved), str(tmp_path / "out"), *given])
    assert len(str(caught.value)) < 300 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq"])
def test_a_base_that_depends_on_the_rank_is_refused(start: str, saved: Path, tmp_path: Path) -> None:
    change_config(init_lora_weights=start)(saved)
    with pytest.raises(
        SystemExit, match=f"expected a start that leaves the base as it is, got {start}. save_pretrained"
    ):
        program.main(["resize", str(saved), str(tmp_path / "out"), "--rank", "2"])
    assert not (tmp_path / "out").exists()


def test_nothing_to_cut_or_to_draw(saved: Path, tmp_path: Path) -> None:
    change_tensors(lambda tensors: [factor.zero_() for factor in tensors.values()])(saved)
    with pytest.raises(SystemExit, match="a layer whose B A is not 0, got none"):
        program.main(["resize", str(saved), str(tmp_path / "zero"), "--rank", "2", "--png", str(tmp_path / "it.png")])
    assert (tmp_path / "zero").exists()  # what needs no picture is done
    change_tensors(lambda tensors: [factor.fill_(float("inf")) for factor in tensors.values()])(saved)
    with pytest.raises(SystemExit, match=r"a layer that can be cut, got none \(layers.0.q: not finite\)"):
        program.main(["resize", str(saved), str(tmp_path / "out"), "--rank", "2"])


def test_a_rank_that_the_file_could_not_tell(tmp_path: Path) -> None:
    """24 rows would be 4 experts of rank 6, or 8 of rank 3, which the other parameter of the module keeps."""
    options, _ = options_of("experts, unlike ranks, one fits")
    folder = save_adapter(tmp_path / "adapter", LoraConfig(**options))
    with pytest.raises(SystemExit, match="experts: expected rank 6 for this layer alone, got other layers"):
        program.main(["resize", str(folder), str(tmp_path / "out"), "--rank", "6"])
    assert not (tmp_path / "out").exists()
