"""What the code blocks of a page take as given, such as `model`; `page_cases.py JOBS RESULTS` runs them.

JOBS are lists: the last one is run here, and each of the others in a process that is forked of this one before.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import multiprocessing
import os
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

TEXTS = ["To be, or not to be, that is the question.", "All the world's a stage.", "Now is the winter."] * 8
SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}


def causal() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZE))


def adapted() -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(causal(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))


def two_adapters() -> dict[str, Any]:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(causal(), config, adapter_name="alice")
    model.add_adapter("bob", config)
    return {"model": model, "batches": [("alice", batch()), ("bob", batch())]}


def rows(count: int = 16) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(64, (8,), generator=generator) for _ in range(count)]
    return [{"input_ids": row, "labels": row} for row in tokens]


def batch() -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows(4)]) for name in ("input_ids", "labels")}


def loader() -> Any:
    return torch.utils.data.DataLoader(rows(), batch_size=4)  # type: ignore[arg-type]


def arguments(**more: Any) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments("out", max_steps=3, use_cpu=True, report_to=[], **more)


def one_process() -> None:
    where = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    os.environ.update({name: str(value) for name, value in where.items()}, DS_ACCELERATOR="cpu")
    store = Path("store").absolute()
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)


def readme() -> dict[str, Any]:
    from transformers import Trainer

    X = torch.randn(5, 8, 8)
    pair = torch.randn(4, 16, requires_grad=True), torch.randn(12, 4, requires_grad=True)
    (pair[1] @ pair[0]).square().sum().backward()
    given = {"Trainer": Trainer, "args": arguments(), "data": rows(), "pairs": [pair], "X": X + X.mT}
    return {"model": adapted(), **given}


def trainer() -> dict[str, Any]:
    import datasets
    from tiny_models import save_causal
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(save_causal(Path("causal"), TEXTS))
    tokenizer.pad_token = tokenizer.eos_token
    given = {"causal_model": causal(), "text_dataset": datasets.Dataset.from_dict({"text": TEXTS})}
    given["causal_model"].resize_token_embeddings(len(tokenizer))
    return {"model": adapted(), "train_dataset": rows(), "tokenizer": tokenizer, **given}


def qlora() -> dict[str, Any]:
    from tiny_models import save_causal

    return {"folder": str(save_causal(Path("causal"), TEXTS))}


def fsdp2() -> dict[str, Any]:
    one_process()
    return {"model": adapted()}


def tensor_parallel() -> dict[str, Any]:
    """A mesh of one process."""
    from torch.distributed.tensor.parallel import ColwiseParallel

    one_process()
    mesh = torch.distributed.init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp"))
    plan = {"base_model.model.model.layers.*.self_attn.q_proj.lora_B.default": ColwiseParallel()}
    return {"model": adapted(), "mesh": mesh, "plan": plan}


def deepspeed() -> dict[str, Any]:
    one_process()
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled; without it goes over gloo
    return {"model": adapted(), "loader": loader(), "folder": "engine"}


def trained_by(cls: Any, **given: Any) -> None:
    """A run of a stand-in, in which all pairs take RefLoRA steps."""
    trainer = cls(adapted(), arguments(), train_dataset=rows(), **given)
    trainer.train()
    assert trainer.optimizer.optimizer.diagnostics().refactored == len(trainer.optimizer.optimizer.pairs) == 14


def llama_factory() -> dict[str, Any]:
    import stand_ins

    def run_sft() -> None:
        optimizer = stand_ins.OptimizerPlugin("reflora")(adapted(), {"name": "reflora", "lr": 1e-4})
        assert len(optimizer.pairs) == 14 and optimizer.param_groups[0]["lr"] == 1e-4

    stand_ins.module("llamafactory.train.sft", trainer=stand_ins)
    stand_ins.module("llamafactory.train.tuner", run_exp=lambda: trained_by(stand_ins.LlamaFactory095))
    where = "llamafactory.v1.plugins.trainer_plugins.optimizer"
    stand_ins.module(where, OptimizerPlugin=stand_ins.OptimizerPlugin)
    stand_ins.module("llamafactory.v1.trainers.sft_trainer", run_sft=run_sft)
    return {}


def ms_swift() -> dict[str, Any]:
    """A name that is added is tried at once."""
    import stand_ins

    class Tried(dict[str, Any]):
        def __setitem__(self, name: str, callback: Any) -> None:
            stand_ins.Swift460.optimizers_map[name] = callback
            trained_by(stand_ins.Swift460)

    stand_ins.module("swift.optimizers", OptimizerCallback=stand_ins.OptimizerCallback, optimizers_map=Tried())
    return {}


def unsloth() -> dict[str, Any]:
    import stand_ins

    def made(output_dir: str, max_steps: int, embedding_learning_rate: float) -> Any:
        args = arguments()
        args.embedding_learning_rate = embedding_learning_rate
        return args

    stand_ins.module("unsloth", UnslothTrainer=stand_ins.Unsloth20261009, UnslothTrainingArguments=made)
    return {"model": adapted(), "train_dataset": rows()}


def trl() -> dict[str, Any]:
    import datasets
    from peft import LoraConfig, get_peft_model

    given = trainer()
    given["tokenizer"].padding_side = "left"
    model = get_peft_model(given["causal_model"], LoraConfig(r=4, target_modules="all-linear"))
    columns = {"prompt": TEXTS, "chosen": [" Yes."] * len(TEXTS), "rejected": [" No."] * len(TEXTS)}
    sets = {
        "preferences": datasets.Dataset.from_dict(columns),
        "prompts": datasets.Dataset.from_dict({"prompt": TEXTS}),
    }
    return {**given, **sets, "model": model}


def torchtitan() -> dict[str, Any]:
    import stand_ins

    names = {name: getattr(stand_ins, name) for name in ("OptimizersContainer", "ParamGroupConfig")}
    stand_ins.module("torchtitan.components.optimizer", **names)
    return {"model_parts": stand_ins.parts()}


def embedded() -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(causal(), LoraConfig(r=4, target_modules="all-linear", modules_to_save=["embed_tokens"]))


BY_NAME = "docs/howto/trainers_by_name.md"
GIVEN: dict[str, Any] = {
    "README.md": readme,
    "docs/quickstart.md": dict,
    "docs/howto/trainer.md": trainer,
    "docs/howto/loop.md": lambda: {"model": adapted(), "batches": itertools.cycle(loader())},
    "docs/howto/many_adapters.md": two_adapters,
    "docs/howto/qlora.md": qlora,
    "docs/howto/optimizers.md": lambda: {"model": adapted()},
    "docs/howto/distributed.md#accelerate": lambda: {"model": adapted(), "loader": loader()},
    "docs/howto/distributed.md#FSDP2": fsdp2,
    "docs/howto/distributed.md#Tensor parallelism": tensor_parallel,
    "docs/howto/distributed.md#DeepSpeed, ZeRO-1 and 2": deepspeed,
    "docs/howto/compile.md": lambda: {"model": adapted(), "batch": batch()},
    "docs/howto/config.md": lambda: {"model": adapted()},
    f"{BY_NAME}#LLaMA-Factory": llama_factory,
    f"{BY_NAME}#ms-swift": ms_swift,
    f"{BY_NAME}#unsloth": unsloth,
    f"{BY_NAME}#TRL": trl,
    f"{BY_NAME}#Lightning and Fabric": lambda: {"model": adapted(), "loader": loader()},
    f"{BY_NAME}#torchtitan": torchtitan,
    f"{BY_NAME}#LoRA+ and embedding rates": lambda: {"model": embedded()},
    "docs/howto/published.md": lambda: {"model": adapted(), "arguments": arguments(), "train_dataset": rows()},
    "docs/howto/adapters.md": lambda: {"model": adapted()},
    "docs/howto/linalg.md": dict,
}


def run(unit: str, page: str, folder: str) -> dict[str, str]:
    """What the blocks print, and the traceback of what they raise."""
    printed = io.StringIO()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(printed):
            program = compile(Path(page).read_text(), page, "exec")
            exec(program, GIVEN[unit]() | {"__name__": "__page__"})
    except Exception:  # told by the test of this unit; the later ones are run
        return {"printed": printed.getvalue(), "error": traceback.format_exc()}
    return {"printed": printed.getvalue(), "error": ""}


def run_all(jobs: list[tuple[str, str, str]]) -> dict[str, dict[str, str]]:
    return {job[0]: run(*job) for job in jobs}


if __name__ == "__main__":
    import peft  # noqa: F401
    from transformers import Trainer  # noqa: F401

    torch.set_num_threads(1)
    *alone, together = json.loads(Path(sys.argv[1]).read_text())
    found: dict[str, dict[str, str]] = {}
    for jobs in alone:
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as process:
            found |= process.submit(run_all, jobs).result()
    Path(sys.argv[2]).write_text(json.dumps(found | run_all(together)))
