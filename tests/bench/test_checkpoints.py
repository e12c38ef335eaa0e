"""A training that is stopped and goes on is bit for bit the one that was not, whatever the method."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import checkpoints, data, finetuning

CPU = torch.device("cpu")
TASK = data.Task("words", [data.Example(f"the {i} cat {i % 5}", i % 2) for i in range(24)], [], 2)


def recipe(method: str, steps: int) -> finetuning.Recipe:
    return finetuning.Recipe(
        "minilm", method, 0, 1e-2, steps, 4, 16, 2, 2, lr_warmup=2, plain_steps=2, dropout=0.2, lora_dropout=0.1
    )


@pytest.mark.parametrize(
    "method",
    ["lora", "reflora", "reflora-carried", "reflora-s", "reflora-unit", "preclora", "nora+", "lora-rite", "lora-pro",
     "lora-pro-full", "balora", "lora-muon", "lora+", "dora", "pissa", "bitfit", "full"],
)  # fmt: skip
def test_resumed_run_is_bit_equal(tiny: None, tmp_path: Path, method: str) -> None:
    def stop(step: int, _: finetuning.Trained) -> None:
        if step == 5:
            raise KeyboardInterrupt

    kept = checkpoints.Checkpoint(tmp_path / "c.pt", 3)
    whole = finetuning.train(recipe(method, 8), TASK, CPU)
    with pytest.raises(KeyboardInterrupt):
        finetuning.train(recipe(method, 8), TASK, CPU, after_step=stop, checkpoint=kept)
    seen: list[int] = []
    resumed = finetuning.train(recipe(method, 8), TASK, CPU, after_step=lambda s, _: seen.append(s), checkpoint=kept)
    assert seen == [4, 5, 6, 7, 8]
    assert resumed.losses == whole.losses
    for one, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)
    again = finetuning.train(recipe(method, 8), TASK, CPU, after_step=lambda *_: pytest.fail("a step"), checkpoint=kept)
    assert again.losses == whole.losses


def test_write_that_fails_leaves_the_last_one(tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = checkpoints.Checkpoint(tmp_path / "c.pt", 1)
    run = finetuning.train(recipe("lora", 2), TASK, CPU, checkpoint=kept)
    before = kept.path.read_bytes()

    def half(content: object, file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        kept.save(run)
    assert kept.path.read_bytes() == before


def test_checkpoint_of_another_model_is_refused_and_a_damaged_one_is_named(tiny: None, tmp_path: Path) -> None:
    kept = checkpoints.Checkpoint(tmp_path / "c.pt", 1)
    finetuning.train(recipe("lora", 1), TASK, CPU, checkpoint=kept)
    with pytest.raises(ValueError, match="expected the trainable weights of this run, got others. Remove the file"):
        finetuning.train(recipe("dora", 2), TASK, CPU, checkpoint=kept)
    kept.path.write_bytes(kept.path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"c.pt: expected a checkpoint, got a damaged file. Remove it."):
        finetuning.train(recipe("lora", 2), TASK, CPU, checkpoint=kept)


def test_parts_of_a_batch_add_up(tiny: None) -> None:
    whole = finetuning.train(recipe("lora", 3), TASK, CPU)
    parts = [finetuning.train(recipe("lora", 3), TASK, CPU, micro_batch=most) for most in (4, 5)]
    assert all(run.losses == whole.losses for run in parts)
    # dropout draws other masks in parts; without it the sums agree
    still = finetuning.Recipe("minilm", "lora", 0, 1e-2, 3, 4, 16, 2, 2, dropout=0.0)
    runs = []
    for most in (4, 3, 1):
        run = finetuning.build(still, 2, CPU)
        run.model.eval()
        runs.append([finetuning._backward(run, still, TASK.train[:4], most), run.pairs[0][1].grad])
    for loss, gradient in runs[1:]:
        assert loss == pytest.approx(runs[0][0], rel=1e-5)
        torch.testing.assert_close(gradient, runs[0][1], rtol=1e-4, atol=1e-7)
