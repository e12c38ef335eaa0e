"""`python -m reflora extract`: the adapter nearest to what a fine-tuning has changed, as PEFT reads it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from reflora import __main__ as program
from reflora import adapters, extract


def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=2, **sizes))


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=32, n_embd=24, n_layer=2, n_head=2))


def tune(model: nn.Module, which: Callable[[str], bool], rank: int = 3) -> nn.Module:
    """A copy with changes of this rank, in all matrices of these names."""
    tuned = copy.deepcopy(model)
    for name, parameter in tuned.named_parameters():
        if parameter.dim() == 2 and which(name):
            change = torch.randn(parameter.shape[0], rank) @ torch.randn(rank, parameter.shape[1])
            parameter.data += 0.05 * change
    return tuned


def saved_as(model: nn.Module, folder: Path, **options: Any) -> str:
    model.save_pretrained(str(folder), **options)  # type: ignore[operator]
    return str(folder)


def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(ids).logits


@pytest.mark.parametrize("make", [llama, gpt2], ids=lambda make: make.__name__)
@pytest.mark.parametrize("shard", [None, "20KB"], ids=["one file", "shards"])
@pytest.mark.filterwarnings("ignore")
def test_a_change_of_low_rank_is_found_whole(make: Callable[[], nn.Module], shard: str | None, tmp_path: Path) -> None:
    """Linear layers, the Conv1D of GPT-2 and embeddings; a loaded adapter has the logits of the tuned model."""
    model = make()
    tuned, options = tune(model, lambda name: "wpe" not in name), {"max_shard_size": shard} if shard else {}
    base, other = saved_as(model, tmp_path / "base", **options), saved_as(tuned, tmp_path / "tuned", **options)
    program.main(["extract", base, other, str(tmp_path / "out"), "--rank", "3"])
    before, wanted = logits(model), logits(tuned)
    found = logits(PeftModel.from_pretrained(make(), str(tmp_path / "out")))
    assert (wanted - before).norm() > 0.1 * before.norm()
    assert (found - wanted).norm() < 1e-4 * (wanted - before).norm()


def test_the_nearest_of_its_rank_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = llama()
    tuned = tune(model, lambda name: "q_proj" in name or "1.mlp.up_proj" in name, rank=24)
    base, other = saved_as(model, tmp_path / "base"), saved_as(tuned, tmp_path / "tuned")
    program.main(["extract", base, other, str(tmp_path / "out"), "--rank", "4"])
    adapter = adapters.Adapter(tmp_path / "out")
    old, new = model.state_dict(), tuned.state_dict()
    whole = lost = 0.0
    printed = capsys.readouterr().out
    assert len(adapter.pairs) == 3
    for pair in adapter.pairs:
        D = (new[f"{pair.name}.weight"] - old[f"{pair.name}.weight"]).double()
        s, error = torch.linalg.svdvals(D), (D - pair.B.double() @ pair.A.double()).norm()
        assert error == pytest.approx(float(s[4:].norm()), rel=1e-5)
        whole, lost = whole + float(D.square().sum()), lost + float(error**2)
        (row,) = [line.split() for line in printed.splitlines() if line.startswith(pair.name)]
        assert row[-3] == f"{float(error / D.norm()):.1e}" and row[-5] == "4"
    assert f"in all: error {(lost / whole) ** 0.5:.2e} of ||W' - W||_F" in printed
    assert adapter.config is not None and adapter.config["target_modules"] == ["model.layers.1.mlp.up_proj", "q_proj"]
    assert (adapter.config["r"], adapter.config["lora_alpha"], adapter.config["task_type"]) == (4, 4, "CAUSAL_LM")


def test_the_ranks_that_keep_the_energy(tmp_path: Path) -> None:
    model = llama()
    tuned = tune(tune(model, lambda name: "q_proj" in name, rank=1), lambda name: "v_proj" in name, rank=20)
    base, other = saved_as(model, tmp_path / "base"), saved_as(tuned, tmp_path / "tuned")
    program.main(["extract", base, other, str(tmp_path / "out"), "--rank", "16", "--energy", "0.8"])
    old, new = model.state_dict(), tuned.state_dict()
    for pair in adapters.Adapter(tmp_path / "out").pairs:
        s = torch.linalg.svdvals((new[f"{pair.name}.weight"] - old[f"{pair.name}.weight"]).double()).square()
        assert pair.rank == int((s.cumsum(0) < 0.8 * s.sum()).sum()) + 1
        assert (pair.rank == 1) == ("q_proj" in pair.name)


def test_convolutions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    old = {
        "conv.weight": torch.randn(8, 6, 3, 3),
        "long.weight": torch.randn(5, 4, 3),
        "same.weight": torch.randn(3, 3),
    }
    new = {
        name: tensor + (0.1 * torch.randn(tensor.shape) if name != "same.weight" else 0) for name, tensor in old.items()
    }
    for tensors, name in ((old, "base"), (new, "tuned")):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    files = [str(tmp_path / f"{name}.safetensors") for name in ("base", "tuned")]
    program.main(["extract", *files, str(tmp_path / "out"), "--rank", "2"])
    pairs = {pair.name: pair for pair in adapters.Adapter(tmp_path / "out").pairs}
    assert {name: pair.layout for name, pair in pairs.items()} == {"conv": "conv", "long": "conv"}
    for name, pair in pairs.items():
        D = (new[f"{name}.weight"] - old[f"{name}.weight"]).flatten(1).double()
        A, B = pair.factors[0]
        assert (D - B.double() @ A.double()).norm() == pytest.approx(
            float(torch.linalg.svdvals(D)[2:].norm()), rel=1e-5
        )


def test_what_is_not_in_the_adapter_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = {name: torch.ones(4, 4) for name in ("q.weight", "grown.weight", "gone.weight", "bad.weight", "table")}
    old |= {
        "norm.weight": torch.ones(4),
        "packed.weight": torch.ones(4, 4, dtype=torch.uint8),
        "same.weight": torch.ones(2),
    }
    new = {
        name: tensor * 2 if name != "same.weight" else tensor for name, tensor in old.items() if name != "gone.weight"
    }
    new |= {"grown.weight": torch.ones(5, 4), "more.weight": torch.ones(4), "bad.weight": torch.full((4, 4), torch.inf)}
    save_file(old, tmp_path / "base.safetensors")
    save_file(new, tmp_path / "tuned.safetensors")
    files = [str(tmp_path / f"{name}.safetensors") for name in ("base", "tuned")]
    program.main(["extract", *files, str(tmp_path / "out"), "--rank", "2"])
    printed = capsys.readouterr().out
    for reason, names in {
        "not in TUNED": "gone.weight", "not in BASE": "more.weight", "another shape": "grown.weight",
        "no matrix": "norm.weight, table", "quantised": "packed.weight", "not finite": "bad.weight",
    }.items():  # fmt: skip
        assert f"changed and not in the adapter ({reason}): {names}\n" in printed
    assert "1 layers; 1 tensors have not changed" in printed
    assert set(load_file(tmp_path / "out" / adapters.WEIGHTS)) == {
        f"base_model.model.q.lora_{side}.weight" for side in "AB"
    }


def rewrite(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


INDEX = "model.safetensors.index.json"
UNREADABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda folder: folder.rename(folder.with_name("gone")), "got no such folder or file. Save the model"),
    "nothing in it": (lambda folder: (folder / "model.safetensors").unlink(), "got none there. Save the model"),
    "damaged": (rewrite("model.safetensors", b"x" * 40), r"expected a safetensors file, got one that cannot be read"),
    "no index": (rewrite(INDEX, b"[]"), "expected an index of shards, got TypeError"),
    "a shard gone": (
        rewrite(INDEX, json.dumps({"weight_map": {"q.weight": "one.safetensors"}}).encode()),
        "expected every shard of its index, got no one.safetensors",
    ),
    "another model": (
        lambda folder: save_file({"k.weight": torch.ones(2, 2)}, folder / "model.safetensors"),
        "expected checkpoints of one model, got q.weight and k.weight",
    ),
    "the same": (
        lambda folder: save_file({"q.weight": torch.ones(4, 4)}, folder / "model.safetensors"),
        r"TUNED: expected a matrix that is not as in BASE, got 1 tensors that are the same, and 0 others",
    ),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_cannot_be_extracted(case: str, tmp_path: Path) -> None:
    change, said = UNREADABLE[case]
    for name, factor in (("base", 1.0), ("tuned", 2.0)):
        (tmp_path / name).mkdir()
        save_file({"q.weight": factor * torch.ones(4, 4)}, tmp_path / name / "model.safetensors")
    change(tmp_path / "tuned")
    with pytest.raises(SystemExit, match=f"^reflora extract: .*{said}") as caught:
        program.main(["extract", str(tmp_path / "base"), str(tmp_path / "tuned"), str(tmp_path / "out"), "--rank", "2"])
    assert len(str(caught.value)) < 300 and not (tmp_path / "out").exists()


def test_where_it_cannot_go_and_at_which_rank(tmp_path: Path) -> None:
    for name in ("base", "tuned", "out"):
        (tmp_path / name).mkdir()
    given = [str(tmp_path / name) for name in ("base", "tuned", "out")]
    for name in ("base", "tuned"):
        save_file({"q.weight": torch.randn(4, 4)}, tmp_path / name / "model.safetensors")
    with pytest.raises(SystemExit, match="OUT .*out: expected a name not taken, got a folder that is there"):
        program.main(["extract", *given, "--rank", "2"])
    with pytest.raises(SystemExit, match="--rank: expected an integer >= 1, got none. Pass the highest rank"):
        program.main(["extract", *given[:2], str(tmp_path / "new"), "--energy", "0.5"])


def test_a_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a checkpoint, only what is looked at is read, in pairs."""
    model = llama()
    base = saved_as(model, tmp_path / "base")
    other = saved_as(tune(model, lambda name: "q_proj" in name), tmp_path / "tuned")
    read, seen = extract.Checkpoint.read, list[str]()
    monkeypatch.setattr(extract.Checkpoint, "read", lambda self, name: seen.append(name) or read(self, name))
    program.main(["extract", base, other, str(tmp_path / "out"), "--rank", "3"])
    names = sorted(load_file(tmp_path / "base" / "model.safetensors"))
    assert seen == [name for name in names for _ in range(2)]
